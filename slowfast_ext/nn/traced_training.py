"""How a recorded forward trains: its convolutions in groups, each of which is one function of autograd."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .block import call_reason, compute_dtype
from .program import Call, Fused, Program, Value, child, computes_conv3d, positions, with_releases
from .recording import mode_reason
from .training import Part, train_block


@dataclass(frozen=True)
class Group:
    """Convolutions with batch norms that train as one block; or one without batch norm, which trains plain.

    Attributes:
        branch: one after the other; each result is used by the next one only.
        joins: whether the addition of the last is part of the block, being that of the branch's input or ``shortcut``.
        shortcut: computes from the branch's input what nothing else uses.
        pool: name of the maximum pooling that follows, if one does, and there is no addition.
    """

    branch: tuple[Fused, ...]
    joins: bool = False
    shortcut: Fused | None = None
    pool: str = ""

    @property
    def used(self) -> set[int]:
        """The positions of the values that go in."""
        residual = -1 if self.shortcut is not None else self.branch[-1].residual
        return {self.branch[0].x, residual} - {-1}


@dataclass(frozen=True)
class Plan:
    """A program for training.

    Attributes:
        steps: of the program, in groups; with the positions of the results and of what is not needed any more.
        reason: why the forward must not be fused in training, or None.
        layer_by_layer: why some of the convolutions train plain, or None.
    """

    steps: tuple[tuple[Group | Call, int, tuple[int, ...]], ...]
    reason: str | None
    layer_by_layer: str | None


def make_plan(module: nn.Module, program: Program) -> Plan:
    """How ``module`` trains, of which ``program`` is the forward in evaluation mode."""
    without_norm = [step.conv for step in program.fused if not step.bn]
    if len(without_norm) == len(program.fused):
        return Plan((), "none of its convolutions has a batch norm", None)
    layer_by_layer = f"no batch norm follows {', '.join(without_norm)}" if without_norm else None
    return Plan(_in_groups(module, program), _reason(module, program), layer_by_layer)


def _reason(module: nn.Module, program: Program) -> str | None:
    """Why ``program`` is not what ``module`` computes in training, or None."""
    for step in program.fused:
        if not computes_conv3d(module.get_submodule(step.conv), training=True):
            return f"{step.conv} computes something else than Conv3d in training mode"
    return mode_reason(module, {module.get_submodule(name) for name in program.nested})


def _in_groups(module: nn.Module, program: Program) -> tuple:
    """The steps with neighbouring convolutions in groups.

    A group is computed where its last member stood. Between its members there are only other convolutions, so nothing
    is changed in place meanwhile; and a batch norm that is used twice is in no group, so it sees its inputs in order.
    """
    uses = Counter(position for step, _, _ in program.steps for position in step.used)
    uses.update(positions(program.result))
    norms = Counter(step.bn for step in program.fused)
    steps: dict[int, Group | Call] = {}  # by the position of the result
    ending: dict[int, Group] = {}  # the groups since the last call whose result only one step uses

    def take(position: int) -> Group:
        del steps[position]
        return ending.pop(position)

    for step, position, _ in program.steps:
        if isinstance(step, Call):
            before = _pooled(module, step)
            steps[position] = replace(take(before), pool=step.target) if before in ending else step
            ending.clear()
        else:
            alone = not step.bn or norms[step.bn] > 1
            before = () if alone or step.x not in ending or step.x == step.residual else take(step.x).branch
            group = Group((*before, step))
            steps[position] = group if alone else _joined(group, ending, take)
            if step.residual < 0 and uses[position] == 1 and not alone:
                ending[position] = group
    return with_releases([(step, position) for position, step in steps.items()], program.result)


def _joined(group: Group, ending: dict[int, Group], take: Callable[[int], Group]) -> Group:
    """``group`` with the addition at its end, if that is one of a residual block."""
    x, last = group.branch[0].x, group.branch[-1]
    if not last.relu or last.residual < 0:
        return group
    if last.residual == x:
        return replace(group, joins=True)
    beside = ending.get(last.residual)
    if beside is None or beside.branch[0].x != x:
        return group
    if len(beside.branch) == 1:
        return replace(group, joins=True, shortcut=take(last.residual).branch[0])
    *before, end = beside.branch
    if len(group.branch) > 1 or last.in_place or end.relu:
        return group
    take(last.residual)  # the shortcut came later and has the addition, which may as well be the branch's
    end = replace(end, residual=last.residual, residual_first=not last.residual_first, relu=True)
    return Group((*before, end), joins=True, shortcut=replace(last, residual=-1, relu=False))


def _pooled(module: nn.Module, step: Call) -> int | None:
    """The position of what a maximum is taken of."""
    if step.kind != "call_module" or step.kwargs or len(step.args) != 1 or not isinstance(step.args[0], Value):
        return None
    return step.args[0].position if _is_max_pool(module.get_submodule(step.target)) else None


def _is_max_pool(module: nn.Module | None) -> bool:
    return type(module) is nn.MaxPool3d and not module.return_indices


def train_group(group: Group, module: nn.Module, values: list) -> Tensor:
    """The result of ``group``, with children of ``module``, from the values of a program."""
    x, last = values[group.branch[0].x], group.branch[-1]
    if not last.bn:
        return last.run_plain(module, x, last.residual_of(values))
    if x.dim() != 5:
        raise ValueError(f"{group.branch[0].conv}: x must be (N, C, T, H, W), got {tuple(x.shape)}")
    if group.joins and _fits(group, module, x):
        shortcut = None if group.shortcut is None else _part(group.shortcut, module)
        return _train(group.branch, module, x, residual=True, shortcut=shortcut)
    if group.pool:
        pool = child(module, group.pool)
        inside = _is_max_pool(pool) and call_reason(pool) is None and not _pools_in_float32(x)
        return _train(group.branch, module, x, pool=pool) if inside else pool(_train(group.branch, module, x))
    y = _train(group.branch, module, x)
    if last.residual < 0:
        return y
    return last.finish(y, values[last.residual] if group.shortcut is None else _train([group.shortcut], module, x))


def _train(steps: Sequence[Fused], module: nn.Module, x: Tensor, **options) -> Tensor:
    dtype = compute_dtype(child(module, steps[0].conv).weight)
    return train_block(x, [_part(step, module) for step in steps], dtype, **options)


def _part(step: Fused, module: nn.Module) -> Part:
    return Part(child(module, step.conv), child(module, step.bn), step.relu and step.residual < 0)


def _fits(group: Group, module: nn.Module, x: Tensor) -> bool:
    """Whether the sum has neither broadcasting nor another dtype."""
    dtype = compute_dtype(child(module, group.branch[-1].conv).weight)
    shape = x.shape
    for step in group.branch:
        shape = step.result_shape(child(module, step.conv), shape)
    if group.shortcut is None:
        return x.dtype == dtype and x.shape == shape
    beside = child(module, group.shortcut.conv)
    return compute_dtype(beside.weight) == dtype and group.shortcut.result_shape(beside, x.shape) == shape


def _pools_in_float32(x: Tensor) -> bool:
    """As autocast does on a CPU."""
    return x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
