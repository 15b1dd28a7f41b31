"""What the fused twins have in common: they stand in for a plain block, over the same children."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from .. import ops
from .._library import unavailable_reason
from .folding import FoldedWeights

# Block class -> the twin that replaces it; slowfast_ext.accelerate fills it in.
TWINS: dict[type[nn.Module], type[FusedBlock]] = {}

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


_unavailable_reason = functools.cache(unavailable_reason)  # asked for each block in each forward


@torch.compiler.assume_constant_result
def _backend_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the plain children serve tensors of this kind better, or None."""
    if device.type == "cuda" and dtype == torch.float64:
        return "the CUDA kernels do not compute in float64"
    return None if device.type == "cpu" else _unavailable_reason(device)


def _call_reason(module: nn.Module) -> str | None:
    """Why calling ``module`` is more than running its class's forward, or None."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "has hooks, which a fused block cannot run"
    if "forward" in module.__dict__:
        return "has had its forward replaced"
    return None


def _convolution_reason(conv: nn.Module, bn: nn.Module | None) -> str | None:
    """Why ``bn(conv(x))`` in evaluation mode is not what ``conv3d_bn_relu`` computes, or None."""
    if type(conv) is not nn.Conv3d:
        return f"conv is a {type(conv).__name__}, not a Conv3d"
    if conv.groups != 1:
        return f"conv has {conv.groups} groups"
    if conv.dilation != (1, 1, 1):
        return f"conv has dilation {conv.dilation}"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"conv has padding {conv.padding!r} with padding_mode {conv.padding_mode!r}"
    if conv.weight.dtype not in _DTYPES:
        return f"conv has weights in {conv.weight.dtype}"
    reason = _call_reason(conv)
    if reason is not None:
        return f"conv {reason}"
    if bn is not None:
        if type(bn) not in (nn.BatchNorm3d, nn.SyncBatchNorm):
            return f"bn is a {type(bn).__name__}, not a BatchNorm3d"
        if bn.running_mean is None or bn.running_var is None:
            return "bn has no running statistics"
        reason = _call_reason(bn)
        if reason is not None:
            return f"bn {reason}"
    return None


class FusedBlock(nn.Module):
    """Base of the twins: a module over the children, parameters, buffers and hooks of the plain block it replaces.

    Twin and plain block share these registries themselves: state-dict keys are the same, and a hook or child given to
    one is the other's too. A forward in evaluation mode is fused; it is the plain block's own in training mode, where
    gradients of parameters are recorded (so they are the plain block's, for Grad-CAM as for fine-tuning with frozen
    batch norm), and for whatever :meth:`reason_against` finds, which is asked in each forward. Fused results are in
    channels_last_3d. Global module hooks see the twin as one module.

    Args:
        plain: an instance of a block class that this twin is registered for.

    Raises:
        ValueError: there is a reason against it.
    """

    # The children that have ``conv`` and ``bn``, in classes whose twin is ``part_twin``; none: the block itself has.
    convolutions: tuple[str, ...] = ()
    part_twin: type[FusedBlock] | None = None

    def __init__(self, plain: nn.Module):
        reason = self.reason_against(plain)
        if reason is not None:
            raise ValueError(
                f"{type(self).__name__}: plain must be a block that can be replaced, got one where {reason}"
            )
        super().__init__()
        self.__dict__.update(plain.__dict__)
        object.__setattr__(self, "plain", plain)  # around registration: its children are this module's
        self.folded = {name: FoldedWeights() for name in self.convolutions or ("",)}
        self.last_forward: str | None = None  # "fused", or why not

    @classmethod
    def reason_against(cls, module: nn.Module) -> str | None:
        """Why this twin cannot replace ``module``, or None. Looks at everything but the input."""
        if TWINS.get(type(module)) is not cls:
            return f"{cls.__name__} does not know the class {type(module).__name__}"
        if "forward" in module.__dict__ or module._compiled_call_impl is not None:
            return "its forward has been replaced or compiled"
        return cls._children_reason(module)

    @classmethod
    def _parts(cls, module: nn.Module) -> list[tuple[str, nn.Module]]:
        """The modules that have ``conv`` and ``bn``, with their names."""
        if not cls.convolutions:
            return [("", module)]
        parts = [(name, getattr(module, name)) for name in cls.convolutions]
        return [(name, part) for name, part in parts if part is not None]

    @classmethod
    def _children_reason(cls, module: nn.Module) -> str | None:
        parts, fused_part = cls._parts(module), None
        for name, part in parts:
            if name:
                if type(part) is cls.part_twin:
                    fused_part = fused_part or f"{name} is fused by itself"
                elif TWINS.get(type(part)) is not cls.part_twin:
                    return f"{name} is a {type(part).__name__}"
                reason = _call_reason(part)
                if reason is not None:
                    return f"{name} {reason}"
            reason = _convolution_reason(part.conv, part.bn)
            if reason is not None:
                return f"{name}.{reason}" if name else reason
        weight = parts[0][1].conv.weight
        return fused_part or _backend_reason(weight.device, weight.dtype)

    def _reason_now(self) -> str | None:
        """Why this forward has to be the plain block's, or None."""
        if self.training:
            return "it is in training mode"
        reason = self._children_reason(self)
        if reason is not None:
            return reason
        recording = torch.is_grad_enabled()
        for name, part in self._parts(self):
            conv, bn = part.conv, part.bn
            if bn is not None and bn.training:
                return f"{name}.bn is in training mode" if name else "bn is in training mode"
            if recording:
                tensors = (conv.weight, conv.bias) if bn is None else (conv.weight, conv.bias, bn.weight, bn.bias)
                if any(tensor is not None and tensor.requires_grad for tensor in tensors):
                    return "gradients of its parameters are recorded (torch.inference_mode() turns that off)"
        return None

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """As the plain block's."""
        reason = self._reason_now()
        if not torch.compiler.is_compiling():
            self.last_forward = reason or "fused"
        if reason is None:
            return self.fused_forward(*args, **kwargs)
        return type(self.plain).forward(self, *args, **kwargs)

    def _convolve(
        self, name: str, x: Tensor, residual: Tensor | None = None, relu: bool | None = None, out: Tensor | None = None
    ) -> Tensor:
        """The part ``name`` as one operator call; ``relu`` in place of its own."""
        part = getattr(self, name) if name else self
        conv = part.conv
        weight, bias = self.folded[name].get(conv, part.bn, compute_dtype(conv.weight))
        relu = part.relu if relu is None else relu
        return ops.conv3d_bn_relu(
            x, weight, bias, residual, stride=conv.stride, padding=conv.padding, relu=relu, out=out
        )

    def train(self, mode: bool = True) -> FusedBlock:
        """As :meth:`torch.nn.Module.train`; frees the folded weights when training begins."""
        if mode:
            for folded in self.folded.values():
                folded.clear()
        return super().train(mode)

    def restored(self) -> nn.Module:
        """The plain block itself, in the state that this module is in."""
        own = ("plain", "folded", "last_forward")
        self.plain.__dict__.update({name: value for name, value in self.__dict__.items() if name not in own})
        return self.plain

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "plain" not in self.__dict__:  # while being copied
                raise
            return getattr(self.plain, name)  # properties and methods of the block's class

    def extra_repr(self) -> str:
        return self.plain.extra_repr()


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype a convolution with this weight computes in: autocast's where it is on."""
    device_type = weight.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype
