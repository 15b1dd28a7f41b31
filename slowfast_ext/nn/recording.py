"""What a module's forward computes, recorded by torch.fx."""

from __future__ import annotations

import contextlib
import inspect
import operator
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import fx, nn

from .block import TWINS, FusedBlock, call_reason


class Untraceable(Exception):
    """Why a forward cannot be recorded."""


def is_torchs(module: nn.Module) -> bool:
    """Whether a class of torch that computes, which is no container, is called as a whole."""
    return type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Sequential)


def has_twin(module: nn.Module) -> bool:
    return isinstance(module, FusedBlock) or any(base in TWINS for base in type(module).__mro__)


class _Proxy(fx.Proxy):
    """fx takes ``x += y`` for ``x = x + y``, and whoever else has x would not see it change."""


def _record_in_place(name: str):
    function = getattr(operator, name)

    def method(self, other):
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    setattr(_Proxy, f"__{name}__", method)


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    _record_in_place(_name)


class _Tracer(fx.Tracer):
    """Notes for each node in whose forward it is; convolutions, modules of torch and blocks with twins are one node."""

    proxy_buffer_attributes = True  # so that changes of buffers are recorded and not made

    def __init__(self, called: set[nn.Module], training: bool):
        super().__init__()
        self.called, self.scopes = called, [""]
        with torch.enable_grad():
            self.training, self.surroundings = training, _surroundings(training)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return has_twin(module) or module in self.called or isinstance(module, nn.Conv3d) or is_torchs(module)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        """Only parameters without a default are inputs."""
        parameters = list(inspect.signature(root_fn).parameters.values())[1:]
        if any(parameter.kind is not parameter.POSITIONAL_OR_KEYWORD for parameter in parameters):
            raise Untraceable("its forward has other than plain parameters")
        inputs = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in inputs)]

    def call_module(self, module, forward, args, kwargs):
        name = self.path_of_module(module)
        if self.is_leaf_module(module, name):
            return self.create_proxy("call_module", name, args, kwargs)
        reason = call_reason(module)
        if reason is not None:
            raise Untraceable(f"{name} {reason}")
        self.scopes.append(name)
        try:
            return forward(*args, **kwargs)
        finally:
            self.scopes.pop()

    def create_node(self, *args, **kwargs):
        if _surroundings(self.training) != self.surroundings:  # of which no node would know
            raise Untraceable("its forward turns gradients or checkpointing on or off")
        node = super().create_node(*args, **kwargs)
        node.meta["scope"] = self.scopes[-1]
        return node


def _surroundings(training: bool) -> tuple:
    """The state of autograd. Hooks on saved tensors are what checkpointing works by."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False) if training else None
    return torch.is_grad_enabled(), hooks


@contextlib.contextmanager
def _all_is_seen(tracer: _Tracer):
    """Of autograd functions the calls are recorded, not what they do, which has not their gradients; autocast, of which
    no node would know, is refused.
    """
    base, enter = torch.autograd.Function.__base__, torch.autocast.__enter__  # the base: apply may be bound already

    def record_call(function, *args, **kwargs):
        if any(isinstance(argument, fx.Proxy) for argument in (*args, *kwargs.values())):
            return tracer.create_proxy("call_function", function.apply, args, kwargs)
        return super(base, function).apply(*args, **kwargs)

    def refuse(context):
        raise Untraceable("its forward turns autocast on or off")

    base.apply, torch.autocast.__enter__ = classmethod(record_call), refuse
    try:
        with torch.enable_grad():
            yield
    finally:
        del base.apply
        torch.autocast.__enter__ = enter


class _Modes(NamedTuple):
    """Whether modules are in training mode: those whose forward is recorded, and those that it calls."""

    recorded: bool
    called: bool


_EVALUATION = _Modes(False, False)
_OTHERS = (_Modes(True, True), _Modes(True, False), _Modes(False, True))


def record(module: nn.Module, called: set[nn.Module], modes: _Modes = _EVALUATION) -> fx.Graph:
    """The graph of the forward in these modes. Leaves the module as it is."""
    tracer = _Tracer(called, modes != _EVALUATION)
    modules = list(module.modules())
    modes_before = [each.training for each in modules]
    for each in modules:  # not by train(), which classes override
        each.training = modes.called if tracer.is_leaf_module(each, "") else modes.recorded
    before = [(dict(each.__dict__), dict(each._modules), dict(each._buffers)) for each in modules]
    wrote = False
    try:
        with _all_is_seen(tracer):
            graph = tracer.trace(module)
    except Untraceable:
        raise
    except Exception as error:  # anything can happen in a forward that gets no tensors
        message = (str(error).strip().splitlines() or [""])[0]
        raise Untraceable(f"its forward cannot be traced ({type(error).__name__}: {message[:120]})") from None
    finally:
        for each, (attributes, children, buffers) in zip(modules, before, strict=True):
            same = _same(each.__dict__, attributes) and _same(each._modules, children) and _same(each._buffers, buffers)
            if not same:
                wrote = True
                each.__dict__.clear()
                each.__dict__.update(attributes)
                each.__dict__["_modules"].clear()
                each.__dict__["_modules"].update(children)
                each.__dict__["_buffers"].clear()
                each.__dict__["_buffers"].update(buffers)
        for each, training in zip(modules, modes_before, strict=True):
            each.training = training
    if wrote:
        raise Untraceable("its forward sets attributes")
    return graph


def mode_reason(module: nn.Module, called: set[nn.Module]) -> str | None:
    """Why the graph in evaluation mode does not hold in training mode, or None.

    A recording sees one side of an ``if self.training``. That it is the same in all modes shows that there is none that
    matters. Modules that are called may be in another mode than the others, as frozen batch norms are.
    """
    expected = _described(record(module, called))
    for modes in _OTHERS:
        try:
            nodes = _described(record(module, called, modes))
        except Untraceable as error:
            return f"in training mode {error}"
        if nodes != expected:
            different = (ours or theirs for ours, theirs in zip_longest(nodes, expected) if ours != theirs)
            return f"its forward is another one in training mode, from {next(different)[0]} on"
    return None


def _described(graph: fx.Graph) -> list[tuple]:
    """All of the nodes that matters, with their names first."""

    def names(argument):
        return fx.node.map_arg(argument, lambda node: f"%{node.name}")

    return [(node.name, node.op, node.target, names(node.args), names(node.kwargs)) for node in graph.nodes]


def _same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[key] is b[key] for key in b)
