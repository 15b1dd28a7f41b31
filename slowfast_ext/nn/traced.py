"""The twin of modules of any class: their recorded forward, with the convolutions in it fused."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from .block import FusedBlock, backend_reason, call_reason, compute_dtype, recording_reason
from .conv import convolution_reason
from .folding import FoldedWeights
from .program import Call, Fused, Program, Value, child, find_program
from .recording import Untraceable
from .traced_training import Group, make_plan, train_group

_SIMPLE = (bool, int, float, str, tuple)  # compared by value, all else by identity


class FusedTraced(FusedBlock):
    """Twin of a module in whose forward convolutions are followed by batch norm, an addition or ReLU.

    What the forward computes in evaluation mode is recorded by :mod:`torch.fx` when the twin is made; if it computes
    the same in training mode, it trains fused. Modules that have nothing to do with a convolution are called, hooks and
    all. If an attribute or child of a recorded module has changed since, the twin runs the plain forward; under
    ``torch.compile`` it does not look.

    Args:
        plain: a module of any class.
    """

    nested = True
    own = (*FusedBlock.own, "folded", "program", "training_plan", "recorded", "recorded_convolutions")

    def __init__(self, plain: nn.Module):
        super().__init__(plain)
        self.program, _ = find_program(plain)
        self.training_plan = make_plan(plain, self.program)
        self.folded = {step.conv: FoldedWeights() for step in self.program.fused}
        # What the record holds for. These are looked up in no registry, so that they are no children.
        self.recorded = {
            name: (plain.get_submodule(name), _attributes(plain.get_submodule(name), ()))
            for name in self.program.traced
        }
        self.recorded_convolutions = {step.conv: plain.get_submodule(step.conv) for step in self.program.fused}

    @classmethod
    def examine(cls, module: nn.Module) -> tuple[Program | None, str | None, dict[str, str]]:
        """How ``module`` runs fused, None if that is a matter of modules inside; the reason against it, or None; and
        the convolutions in it that stay plain, with theirs.
        """
        try:
            program, plain = find_program(module)
        except Untraceable as error:
            return None, str(error), {}
        if program is None:
            return None, None, plain
        if "forward" in module.__dict__ or module._compiled_call_impl is not None:
            return program, "its forward has been replaced or compiled", plain
        taken = {*module.__dict__, *module._modules, *module._parameters, *module._buffers}.intersection(cls.own)
        if taken:
            return program, f"it has the attribute {min(taken)}, which its twin would hide", plain
        conv = module.get_submodule(program.fused[0].conv)
        return program, backend_reason(conv.weight.device, conv.weight.dtype), plain

    @classmethod
    def reason_against(cls, module: nn.Module) -> str | None:
        """Why this twin cannot replace ``module``, or None. Looks at everything but the input."""
        return cls._children_reason(module)

    @classmethod
    def _children_reason(cls, module: nn.Module) -> str | None:
        program, reason, _ = cls.examine(module)
        return reason if program is not None or reason is not None else "nothing in its own forward can be fused"

    def _reason_now(self) -> str | None:
        if self.training:
            return "it is in training mode"
        # In place of _children_reason, which would record the forward anew.
        return (None if torch.compiler.is_compiling() else self._change()) or self._state_reason()

    def _state_reason(self) -> str | None:
        for name in self.program.traced[1:]:
            if child(self, name).training:
                return f"{name} is in training mode"
        return self._convolutions_reason(training=False)

    def _convolutions_reason(self, training: bool) -> str | None:
        """Why the convolutions and batch norms are not what the operators, or blocks in training, compute, or None."""
        for step in self.program.fused:
            conv, bn = child(self, step.conv), child(self, step.bn)
            reason = convolution_reason(conv, bn, type(conv))
            if reason is not None:
                return f"{step.conv}: {reason}"
            if training:
                continue
            if bn is not None and bn.training:
                return f"{step.bn} is in training mode"
            reason = recording_reason(conv.weight, conv.bias, *(() if bn is None else (bn.weight, bn.bias)))
            if reason is not None:
                return reason
        return backend_reason(conv.weight.device, conv.weight.dtype)

    def _training_reason(self) -> str | None:
        reason = self.training_plan.reason or (None if torch.compiler.is_compiling() else self._change())
        if reason is not None:
            return reason
        for name in self.program.traced[1:]:
            if child(self, name).training != self.training:
                return f"{name} is {'not ' if self.training else ''}in training mode, unlike the module around it"
        return self._convolutions_reason(training=True)

    def _change(self) -> str | None:
        """What is not as it was recorded, or None."""
        for name, (module, attributes) in self.recorded.items():
            current = child(self, name) if name else self
            if name and current is not module:
                return f"{name} has been replaced since accelerate()"
            if name and (reason := call_reason(module)) is not None:
                return f"{name} {reason}"
            if not _alike(_attributes(current, () if name else self.own), attributes):
                return f"{name or 'the module'} has been changed since accelerate()"
        for step in self.program.fused:
            conv, bn, relu = (child(self, name) for name in (step.conv, step.bn, step.relu_module))
            if conv is not self.recorded_convolutions[step.conv] or (bn is None) != (step.bn == ""):
                return f"{step.conv} or {step.bn} has been replaced since accelerate()"
            if (tuple(conv.stride), tuple(conv.padding)) != (step.stride, step.padding):
                return f"{step.conv} has been changed since accelerate()"
            if step.relu_module and type(relu) is not nn.ReLU:
                return f"{step.relu_module} has been replaced since accelerate()"
            if step.relu_module and (reason := call_reason(relu)) is not None:
                return f"{step.relu_module} {reason}"
        return None

    def forward(self, *args, **kwargs):
        """As the plain module's."""
        names = self.program.inputs[len(args) :]
        if kwargs and kwargs.keys() == set(names):
            args, kwargs = (*args, *(kwargs[name] for name in names)), {}
        if kwargs or len(args) != len(self.program.inputs):
            if not torch.compiler.is_compiling():
                self.last_forward = "it was called with other arguments than when it was recorded"
            return self._plain_forward(*args, **kwargs)
        return super().forward(*args)

    def fused_forward(self, *args):
        self._note_layer_by_layer(None)
        return self._run(self.program.steps, args)

    def training_forward(self, *args):
        self._note_layer_by_layer(self.training_plan.layer_by_layer)
        return self._run(self.training_plan.steps, args)

    def _run(self, steps: tuple, args: tuple):
        values: list = [*args, *[None] * len(self.program.steps)]
        for step, position, released in steps:
            if isinstance(step, Fused):
                values[position] = self._fused(step, values[step.x], step.residual_of(values))
            elif isinstance(step, Group):
                values[position] = train_group(step, self, values)
            else:
                values[position] = self._call(step, values)
            for index in released:
                values[index] = None
        return _fill(self.program.result, values)

    def _fused(self, step: Fused, x: Tensor, residual: object) -> Tensor:
        conv, bn = child(self, step.conv), child(self, step.bn)
        dtype = compute_dtype(conv.weight)
        if x.dim() == 5 and (residual is None or _fits(step, conv, x, residual, dtype)):
            weight, bias = self.folded[step.conv].get(conv, bn, dtype)
            options = {"stride": step.stride, "padding": step.padding, "relu": step.relu}
            return ops.conv3d_bn_relu(x, weight, bias, residual, **options)
        return step.run_plain(self, x, residual)

    def _call(self, step: Call, values: list):
        args, kwargs = _fill(step.args, values), _fill(step.kwargs, values)
        if step.kind == "call_module":
            return child(self, step.target)(*args, **kwargs)
        if step.kind == "call_function":
            return step.target(*args, **kwargs)
        if step.kind == "call_method":
            return getattr(args[0], step.target)(*args[1:], **kwargs)
        module, _, name = step.target.rpartition(".")
        return getattr(child(self, module) if module else self, name)

    def _plain_forward(self, *args, **kwargs):
        """By the plain module itself: its forward may ask for its class, as super() does."""
        if torch.compiler.is_compiling():
            return self.plain.forward(*args, **kwargs)
        plain = self.restored()
        try:
            return plain.forward(*args, **kwargs)
        finally:
            self.__dict__.update({name: value for name, value in plain.__dict__.items() if name not in self.own})

    def train(self, mode: bool = True) -> FusedTraced:
        """As the plain module's; frees the folded weights when training begins."""
        if mode:
            for folded in self.folded.values():
                folded.clear()
        self.training = self.plain.train(mode).training
        return self


class FusedSequential(FusedTraced, nn.Sequential):
    """Twin of a Sequential, which is one too: it can be indexed and iterated over."""

    def __getitem__(self, index):
        return self.plain[index]


def _fits(step: Fused, conv: nn.Conv3d, x: Tensor, residual: object, dtype: torch.dtype) -> bool:
    """Whether the sum has neither broadcasting nor another dtype."""
    return (
        isinstance(residual, Tensor) and residual.dtype == dtype and residual.shape == step.result_shape(conv, x.shape)
    )


def _fill(argument, values: list):
    if isinstance(argument, Value):
        return values[argument.position]
    if isinstance(argument, tuple):
        return tuple([_fill(item, values) for item in argument])
    if isinstance(argument, list):
        return [_fill(item, values) for item in argument]
    if isinstance(argument, dict):
        return {key: _fill(item, values) for key, item in argument.items()}
    if isinstance(argument, slice):
        return slice(*(_fill(item, values) for item in (argument.start, argument.stop, argument.step)))
    return argument


def _attributes(module: nn.Module, apart_from: tuple[str, ...]) -> dict[str, object]:
    """What a forward may depend on, besides parameters, buffers and the modes of children."""
    attributes = {
        name: value
        for name, value in module.__dict__.items()
        if name[0] != "_" and name != "training" and name not in apart_from
    }
    children = tuple((name, inner is None) for name, inner in module._modules.items())
    return {**attributes, "children": children}


def _alike(a: dict[str, object], b: dict[str, object]) -> bool:
    if a.keys() != b.keys():
        return False
    return all(a[key] is value or (type(value) in _SIMPLE and a[key] == value) for key, value in b.items())
