"""A recorded forward as a program, in which the convolutions that can be fused are."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .conv import convolution_reason
from .recording import has_twin, is_torchs, record

_NORMS = (nn.BatchNorm3d, nn.SyncBatchNorm)
_ADDITIONS = {operator.add, torch.add, operator.iadd, "add", "add_"}
_RELUS = {F.relu, torch.relu, torch.relu_, F.relu_, "relu", "relu_"}
_IN_PLACE = {operator.iadd, "add_", torch.relu_, F.relu_, "relu_"}
_PURE = {operator.add, torch.add, "add", operator.getitem, torch.cat, torch.relu, "relu", getattr}
NOTHING_FOLLOWS = "no batch norm, addition or ReLU follows it that could be fused with it"


@dataclass(frozen=True)
class Fused:
    """A convolution and what follows it, by the names of the modules.

    Attributes:
        conv, bn, relu_module: of the modules; "" where there is none, as for a ReLU that is a function.
        x, residual: positions of the values; no residual is -1.
        residual_first: whether the residual is the left operand of the addition.
        in_place: whether the addition changes the convolution's result, hence keeps its dtype.
        relu: whether a ReLU follows.
        stride, padding: of the convolution, as plain integers.
    """

    conv: str
    bn: str
    relu_module: str
    x: int
    residual: int
    residual_first: bool
    in_place: bool
    relu: bool
    stride: tuple[int, ...]
    padding: tuple[int, ...]

    @property
    def used(self) -> set[int]:
        """The positions of the values that go in."""
        return {self.x, self.residual} - {-1}

    def residual_of(self, values: Sequence) -> object:
        return None if self.residual < 0 else values[self.residual]

    def result_shape(self, conv: nn.Conv3d, x_shape: Sequence[int]) -> tuple[int, ...]:
        """Of (N, C, T, H, W)."""
        geometry = zip(x_shape[2:], self.padding, conv.kernel_size, self.stride, strict=True)
        return (
            x_shape[0],
            conv.out_channels,
            *((size + 2 * pad - kernel) // stride + 1 for size, pad, kernel, stride in geometry),
        )

    def run_plain(self, module: nn.Module, x: Tensor, residual: object) -> Tensor:
        """The result, by the children of ``module`` themselves."""
        y, bn = child(module, self.conv)(x), child(module, self.bn)
        return self.finish(y if bn is None else bn(y), residual)

    def finish(self, y: Tensor, residual: object) -> Tensor:
        """The addition and the ReLU, if there are any, of what the batch norm gave."""
        if self.in_place:
            y += residual
        elif self.residual >= 0:
            y = residual + y if self.residual_first else y + residual
        return y.relu() if self.relu else y


@dataclass(frozen=True)
class Value:
    """Stands for the value at a position in the arguments of a :class:`Call`."""

    position: int


@dataclass(frozen=True)
class Call:
    """Something else: ``kind`` is that of the fx node, "call_module", "call_function", "call_method" or "get_attr"."""

    kind: str
    target: object
    args: tuple
    kwargs: dict

    @property
    def used(self) -> set[int]:
        """The positions of the values that go in."""
        return positions((self.args, self.kwargs))


@dataclass(frozen=True)
class Program:
    """A forward as steps over numbered values, the inputs first.

    Attributes:
        inputs: names of the parameters.
        steps: each with the position of its result, and the positions that are not needed after it.
        result: what is returned, with :class:`Value` for values.
        traced: names of the modules whose forward is in the steps, "" first; their hooks would not run.
        nested: names of the modules that are called and have something to fuse inside.
        plain: names of the convolutions that stay what they are, with the reason.
    """

    inputs: tuple[str, ...]
    steps: tuple[tuple[Fused | Call, int, tuple[int, ...]], ...]
    result: object
    traced: tuple[str, ...]
    nested: tuple[str, ...]
    plain: dict[str, str]

    @property
    def fused(self) -> list[Fused]:
        return [step for step, _, _ in self.steps if isinstance(step, Fused)]


@dataclass
class _Chain:
    """Nodes from a convolution on that are one operator."""

    nodes: list[fx.Node]
    bn: str = ""
    relu_module: str = ""
    residual: fx.Node | None = None
    residual_first: bool = False
    in_place: bool = False
    relu: bool = False

    @property
    def owner(self) -> str:
        """The innermost module in whose forward all of it happens."""
        names = [node.meta["scope"].split(".") if node.meta["scope"] else [] for node in self.nodes]
        common = []
        for parts in zip(*names, strict=False):
            if len(set(parts)) > 1:
                break
            common.append(parts[0])
        return ".".join(common)


@dataclass
class _Chains:
    """All chains of a graph of ``module``."""

    module: nn.Module
    graph: fx.Graph
    chains: list[_Chain] = field(default_factory=list)
    plain: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.nodes = list(self.graph.nodes)
        self.order = {node: index for index, node in enumerate(self.nodes)}
        taken: set[fx.Node] = set()
        # From the end, so that of two convolutions that are added the later one takes up the addition.
        for node in reversed(self.graph.nodes):
            conv = self._module(node)
            if not isinstance(conv, nn.Conv3d):
                continue
            chain = self._follow(node, taken)
            reason = self._reason(conv, chain)
            if reason is None:
                self.chains.append(chain)
                taken.update(chain.nodes)
            else:
                self.plain[node.target] = reason

    def kept(self, nested: tuple[str, ...]) -> dict[str, str]:
        """The convolutions outside of the ``nested`` modules that stay plain, with the reason."""
        fused = {chain.nodes[0].target for chain in self.chains}
        kept = {}
        for name, child in self.module.named_modules():
            outside = not any(f"{name}.".startswith(f"{other}.") for other in nested)
            if isinstance(child, nn.Conv3d) and outside and name not in fused:
                kept[name] = self.plain.get(name, "the forward does not call it")
        return kept

    def are_all(self) -> bool:
        """Whether the forward is nothing but several of them, without additions."""
        nodes = {node for node in self.nodes if node.op not in ("placeholder", "output")}
        alone = nodes == {node for chain in self.chains for node in chain.nodes}
        return alone and len(self.chains) > 1 and all(chain.residual is None for chain in self.chains)

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.module.get_submodule(node.target) if node.op == "call_module" else None

    def _reason(self, conv: nn.Module, chain: _Chain) -> str | None:
        if chain.nodes[0].kwargs or len(chain.nodes[0].args) != 1:
            return "it is called with other arguments than one tensor"
        bn = self.module.get_submodule(chain.bn) if chain.bn else None
        if "weight" not in conv._parameters:
            return f"conv is a {type(conv).__name__}, whose weight is no parameter"
        if not computes_conv3d(conv, training=False):
            return f"conv is a {type(conv).__name__}, which computes something else than Conv3d"
        return convolution_reason(conv, bn, type(conv)) or (NOTHING_FOLLOWS if len(chain.nodes) == 1 else None)

    def _follow(self, conv: fx.Node, taken: set[fx.Node]) -> _Chain:
        chain = _Chain([conv])
        following = self._next(chain, taken)
        if following is not None and type(self._module(following)) in _NORMS and self._alone(following, conv):
            chain.nodes.append(following)
            chain.bn = following.target
            following = self._next(chain, taken)
        if following is not None and self._is_addition(following, chain.nodes[-1]):
            left, right = following.args
            chain.residual_first = right is chain.nodes[-1]
            chain.residual = left if chain.residual_first else right
            chain.in_place = following.target in _IN_PLACE
            chain.nodes.append(following)
            following = self._next(chain, taken)
        if following is not None and self._is_relu(following, chain.nodes[-1]):
            chain.relu = True
            chain.relu_module = following.target if following.op == "call_module" else ""
            chain.nodes.append(following)
        return chain

    def _next(self, chain: _Chain, taken: set[fx.Node]) -> fx.Node | None:
        """The only use of the chain's end, if all that happens until then may as well happen before the chain."""
        last = chain.nodes[-1]
        if len(last.users) != 1:
            return None
        (user,) = last.users
        between = self.nodes[self.order[chain.nodes[0]] + 1 : self.order[user]]
        harmless = all(node in chain.nodes or self._keeps_values(node) for node in between)
        return user if user not in taken and harmless else None

    @staticmethod
    def _alone(node: fx.Node, x: fx.Node) -> bool:
        return node.args == (x,) and not node.kwargs

    def _is_addition(self, node: fx.Node, end: fx.Node) -> bool:
        if node.op not in ("call_function", "call_method") or node.target not in _ADDITIONS:
            return False
        operands = node.args
        if node.kwargs or len(operands) != 2 or not all(isinstance(operand, fx.Node) for operand in operands):
            return False
        if operands[0] is operands[1]:
            return False
        return node.target not in _IN_PLACE or operands[0] is end  # else it changes what others may see

    def _is_relu(self, node: fx.Node, end: fx.Node) -> bool:
        if node.op == "call_module":
            return type(self._module(node)) is nn.ReLU and self._alone(node, end)
        known = node.op in ("call_function", "call_method") and node.target in _RELUS
        return known and node.args[:1] == (end,) and len(node.args) + len(node.kwargs) <= 2

    def _keeps_values(self, node: fx.Node) -> bool:
        """Whether a node leaves all values as they are that others than itself see."""
        if node.op in ("placeholder", "get_attr"):
            return True
        module = self._module(node)
        if module is not None:
            if not is_torchs(module) and not isinstance(module, nn.Conv3d):
                return False
            in_place = getattr(module, "inplace", False)
        elif node.target in _PURE | _RELUS | _ADDITIONS and "out" not in node.kwargs:
            flag = node.args[1] if node.target is F.relu and len(node.args) > 1 else node.kwargs.get("inplace", False)
            in_place = flag or node.target in _IN_PLACE
        else:
            return False
        if not in_place:
            return True
        changed = node.args[0] if node.args else None
        fresh = isinstance(changed, fx.Node) and isinstance(self._module(changed), (nn.Conv3d, *_NORMS))
        return fresh and len(changed.users) == 1


def child(module: nn.Module, name: str) -> nn.Module | None:
    """As :meth:`torch.nn.Module.get_submodule`, quickly; None for "" and where there is none."""
    if not name:
        return None
    for part in name.split("."):
        module = module._modules.get(part)
        if module is None:
            return None
    return module


def computes_conv3d(conv: nn.Conv3d, training: bool) -> bool:
    """Whether ``conv``, perhaps of a class derived from Conv3d, computes in this mode what Conv3d does; tried where in
    doubt.
    """
    kind = type(conv)
    if kind.__call__ is not nn.Module.__call__:
        return False
    if kind.forward is nn.Conv3d.forward and kind._conv_forward is nn.Conv3d._conv_forward:
        return True
    weight = conv.weight
    if weight.is_meta or isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        return False
    generator = torch.Generator(weight.device).manual_seed(0)
    shape = (2, conv.in_channels, *(int(step) + int(size) * int(gap) for step, size, gap in _geometry(conv)))
    mode = conv.training
    try:
        conv.training = training
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            x = torch.randn(shape, device=weight.device, generator=generator).to(weight.dtype)
            geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
            return torch.equal(kind.forward(conv, x), F.conv3d(x, weight, conv.bias, *geometry))
    except Exception:  # whatever a forward may do
        return False
    finally:
        conv.training = mode


def _geometry(conv: nn.Conv3d):
    return zip(conv.stride, conv.kernel_size, conv.dilation, strict=True)


def find_program(module: nn.Module) -> tuple[Program | None, dict[str, str]]:
    """How the forward of ``module`` runs with convolutions fused, None if nothing is fused that is not so further in.

    And the convolutions in it that stay plain, with the reason. Convolutions in a row are one program, though each is
    further in: they train as one block.

    Raises:
        Untraceable: the forward cannot be recorded.
    """
    found = _Chains(module, record(module, set()))
    owners = {chain.owner for chain in found.chains}
    if "" not in owners and not found.are_all():
        return None, found.plain
    # Modules that have chains of their own, and no part of this module's, are called and get their own twins, unless
    # they are little more than a convolution.
    needed = {node.meta["scope"] for chain in found.chains if chain.owner == "" for node in chain.nodes}
    inner = {
        owner
        for owner in owners - {""}
        if "" in owners
        and type(module.get_submodule(owner)).forward is not nn.Sequential.forward
        and sum(isinstance(child, nn.Conv3d) for child in module.get_submodule(owner).modules()) > 1
        and not any(f"{scope}.".startswith(f"{owner}.") for scope in needed)
    }
    if inner:
        found = _Chains(module, record(module, {module.get_submodule(name) for name in inner}))
    program = _compile(found, inner)
    return program, program.plain


def _compile(found: _Chains, inner: set[str]) -> Program:
    starts = {node: chain for chain in found.chains for node in chain.nodes[:-1]}
    ends = {chain.nodes[-1]: chain for chain in found.chains}
    places: dict[fx.Node, int] = {}
    inputs, steps, result = [], [], None

    def place(node):
        return places.setdefault(node, len(places))

    def values(argument):
        return fx.node.map_arg(argument, lambda node: Value(places[node]))

    for node in found.graph.nodes:
        if node.op == "placeholder":
            inputs.append(node.target)
            place(node)
        elif node.op == "output":
            result = _plain_containers(values(node.args[0]))
        elif node in ends:
            chain = ends[node]
            conv_node = chain.nodes[0]
            conv = found.module.get_submodule(conv_node.target)
            step = Fused(
                conv_node.target,
                chain.bn,
                chain.relu_module,
                places[conv_node.args[0]],
                -1 if chain.residual is None else places[chain.residual],
                chain.residual_first,
                chain.in_place,
                chain.relu,
                tuple(map(int, conv.stride)),
                tuple(map(int, conv.padding)),
            )
            steps.append((step, place(node)))
        elif node not in starts:
            step = Call(
                node.op, node.target, _plain_containers(values(node.args)), _plain_containers(values(node.kwargs))
            )
            steps.append((step, place(node)))
    called = {step.target for step, _ in steps if isinstance(step, Call) and step.kind == "call_module"}
    nested = tuple(sorted(name for name in called if name in inner or has_twin(found.module.get_submodule(name))))
    return Program(tuple(inputs), with_releases(steps, result), result, _traced(found), nested, found.kept(nested))


def _plain_containers(argument):
    """fx's immutable lists and dicts as plain ones."""
    if isinstance(argument, tuple) and not hasattr(argument, "_fields"):
        return tuple(map(_plain_containers, argument))
    if isinstance(argument, list):
        return list(map(_plain_containers, argument))
    if isinstance(argument, dict):
        return {key: _plain_containers(value) for key, value in argument.items()}
    return argument


def positions(argument) -> set[int]:
    """Of the values in an argument of a call."""
    if isinstance(argument, Value):
        return {argument.position}
    if isinstance(argument, slice):
        argument = (argument.start, argument.stop, argument.step)
    if isinstance(argument, dict):
        argument = argument.values()
    elif not isinstance(argument, (tuple, list)):
        return set()
    return {position for item in argument for position in positions(item)}


def with_releases(steps: Sequence[tuple], result) -> tuple:
    """``steps``, of each the step and its position, with the positions that are used for the last time."""
    later, reversed_steps = positions(result), []
    for step, position in reversed(steps):
        unused = {position} - later
        reversed_steps.append((step, position, tuple(sorted((step.used - later) | unused))))
        later |= step.used
    return tuple(reversed(reversed_steps))


def _traced(found: _Chains) -> tuple[str, ...]:
    """Modules whose forward has been run by the tracer: those around all nodes."""
    names = {""}
    for node in found.graph.nodes:
        parts = node.meta["scope"].split(".") if node.meta["scope"] else []
        names |= {".".join(parts[: length + 1]) for length in range(len(parts))}
    # A container that is only indexed is among them too: what it contains decides what was traced.
    return tuple(sorted(names))
