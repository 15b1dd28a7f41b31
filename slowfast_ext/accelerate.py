"""Replace the blocks of a model by fused twins, say what was replaced and what was not, and undo it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from ._library import unavailable_reason
from .models import (
    BasicBlock3d,
    Bottleneck3d,
    ConvBNReLU3d,
    Lateral,
    SlowFastBackbone,
    SlowFastHead,
    Stem,
    SubBatchNorm3d,
    SyncBatchNorm3d,
)
from .nn import (
    FusedBasicBlock3d,
    FusedBlock,
    FusedBottleneck3d,
    FusedConvBNReLU3d,
    FusedHead,
    FusedLateral,
    FusedSequential,
    FusedSlowFastBackbone,
    FusedStem,
    FusedTraced,
)
from .nn.block import TWINS
from .nn.conv import convolution_reason
from .nn.program import NOTHING_FOLLOWS
from .nn.statistics import NORMS, sub_batch_state, synchronised_state

TWINS.update(
    {
        BasicBlock3d: FusedBasicBlock3d,
        Bottleneck3d: FusedBottleneck3d,
        ConvBNReLU3d: FusedConvBNReLU3d,
        Lateral: FusedLateral,
        SlowFastBackbone: FusedSlowFastBackbone,
        SlowFastHead: FusedHead,
        Stem: FusedStem,
    }
)
NORMS.update({SubBatchNorm3d: sub_batch_state, SyncBatchNorm3d: synchronised_state})


NOT_ACCELERATED = "not accelerated: where left it out, or accelerate() was not called"


@dataclass(frozen=True)
class Row:
    """A block that has been fused or could be.

    Attributes:
        name: its name in the model, "" for the model itself.
        block: class of the plain block.
        twin: class of the twin in its place, None where the block was kept.
        reason: why the block was kept, or why the twin's last forward was the plain block's; None if neither.
        layer_by_layer: why the twin's last fused forward was not one operator for the whole block, where there is one
            for such blocks, or which of its convolutions trained plain; None otherwise.
        served_by: what runs the operators on the twin's device, "CUDA kernels" or "PyTorch: <reason>"; None if kept.
        called: whether the twin has run; forwards under torch.compile are not counted.
    """

    name: str
    block: str
    twin: str | None = None
    reason: str | None = None
    layer_by_layer: str | None = None
    served_by: str | None = None
    called: bool = False

    @property
    def outcome(self) -> str:
        if self.twin is None:
            return f"kept: {self.reason}"
        if self.reason is not None:
            return f"{self.twin}, last forward plain: {self.reason}"
        if self.layer_by_layer is not None:
            return f"{self.twin}, layer by layer: {self.layer_by_layer}"
        return self.twin if self.called else f"{self.twin}, no forward yet"


@dataclass(frozen=True)
class Report:
    """What :func:`explain` found; ``str()`` of it is a table."""

    rows: tuple[Row, ...]

    @property
    def kept(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.twin is None)

    @property
    def summary(self) -> str:
        """How many candidates are fused, and what runs them."""
        places = {row.served_by: 0 for row in self.rows if row.served_by}
        return "; ".join(
            [
                f"{len(self.rows) - len(self.kept)} of {len(self.rows)} candidates fused",
                *(f"operators run in {place}" for place in places),
            ]
        )

    def __str__(self) -> str:
        if not self.rows:
            return f"no candidates: {_NO_CANDIDATE}"
        table = [(row.name or "(the model)", row.block, row.outcome) for row in self.rows]
        width_name, width_block = (max(len(line[column]) for line in table) for column in (0, 1))
        lines = [f"{name:<{width_name}}  {block:<{width_block}}  {outcome}" for name, block, outcome in table]
        return "\n".join([*lines, self.summary])


_NO_CANDIDATE = "the model has no 3-D convolution, and no block of slowfast_ext.models"


def accelerate(
    model: nn.Module,
    mode: str = "inference",
    where: Callable[[str, nn.Module], bool] | None = None,
    strict: bool = False,
) -> nn.Module:
    """Replace the blocks of ``model`` by fused twins, in place.

    A twin has the block's children under their names, so that state-dict keys, optimisers and checkpoints are not
    concerned. In evaluation mode without gradients of parameters it computes the block's result with the batch norms
    folded. Otherwise it runs the block's own forward, or, in the mode "training", one that keeps one tensor for each
    convolution instead of two; its gradients cannot be differentiated again. Changed weights are noticed, except those
    edited through ``parameter.data``, which torch does not tell. The outermost block that can be fused is replaced;
    inside one that is kept the search goes on, as it does inside the backbone, whose twin joins those of its blocks.
    Accelerating again changes nothing that is fused but the mode.

    Blocks are those of :mod:`slowfast_ext.models`, and modules of any class in whose forward :mod:`torch.fx` finds
    convolutions with a batch norm, an addition or a ReLU after them. A convolution outside of blocks is kept and has
    its reason.

    Args:
        model: any module.
        mode: "inference" or "training". What cannot train fused, such as a block without batch norm, or one whose
            forward asks whether it is training and then does something else, trains by its own forward;
            :func:`explain` says which.
        where: called with name and module of each candidate; where it returns false, the candidate is kept.
        strict: raise, before anything is replaced, if a candidate that ``where`` admits cannot be fused, or if there
            is no candidate at all.

    Returns:
        ``model``, or its twin if it is itself a block.

    Raises:
        RuntimeError: under ``strict``, with all reasons.

    Without ``strict`` the same occasions give one warning a call, with the most common reason.
    """
    _check_module("accelerate", model)
    if mode not in ("inference", "training"):
        raise ValueError(f"accelerate: mode must be 'inference' or 'training', got {mode!r}")
    if where is not None and not callable(where):
        raise TypeError(f"accelerate: where must be a function of name and module, got {type(where).__name__}")
    candidates = list(_find(model, where or (lambda name, module: True)))
    kept = [(name, reason) for name, _, reason, wanted in candidates if wanted and reason is not None]
    if strict and (kept or not candidates):
        reasons = (
            "".join(f"\n  {name or '(the model)'}: {reason}" for name, reason in kept) or f" none: {_NO_CANDIDATE}"
        )
        count = f" {len(kept)} that cannot:" if kept else ""
        raise RuntimeError(f"accelerate: with strict every candidate must be fused, got{count}{reasons}")
    if kept:
        reason, times = Counter(reason for _, reason in kept).most_common(1)[0]
        warnings.warn(
            f"accelerate: {len(kept)} of {len(candidates)} candidates are kept, most often ({times}) because {reason}; "
            "explain(model) has all reasons",
            stacklevel=2,
        )
    elif not candidates:
        warnings.warn(f"accelerate: {_NO_CANDIDATE}", stacklevel=2)
    plain = [
        module
        for _, module, reason, wanted in candidates
        if wanted and reason is None and not isinstance(module, FusedBlock)
    ]
    model = _swap(model, {module: _fuse(module) for module in plain})
    for module in model.modules():
        if isinstance(module, FusedBlock):
            module.trains = mode == "training"
    return model


def explain(model: nn.Module) -> Report:
    """What is fused in ``model`` and what is not, and why: one row for each candidate, ``print()`` shows them."""
    _check_module("explain", model)
    rows, left_out = [], None
    for name, module, reason, _ in _find(model, lambda name, module: False):
        if isinstance(module, FusedBlock):
            rows.append(_fused_row(name, module))
        elif reason is not None:
            rows.append(Row(name, type(module).__name__, reason=reason))
        elif left_out is None or not name.startswith(left_out):  # else the block around it has the row
            if not (twin := _twin_class(module)) or not twin.nested:
                left_out = f"{name}." if name else ""
            rows.append(Row(name, type(module).__name__, reason=NOT_ACCELERATED))
    return Report(tuple(rows))


def restore(model: nn.Module) -> nn.Module:
    """Undo :func:`accelerate`: put the very blocks back, with all that has been done to the twins since.

    Returns:
        ``model``, or the plain block if it is itself a twin.
    """
    _check_module("restore", model)
    return _swap(model, {module: module.restored() for module in model.modules() if isinstance(module, FusedBlock)})


def _check_module(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")


@dataclass(frozen=True)
class _Around:
    """What is known of a convolution from the modules around it.

    Attributes:
        has_row: whether the row of a block stands for it.
        reason: why the module around it is kept, or that nothing follows it.
        reasons: for convolutions by their names in the model, as found by the outermost module that was recorded.
    """

    has_row: bool = False
    reason: str = NOTHING_FOLLOWS
    reasons: Mapping[str, str] = field(default_factory=dict)


def _find(
    module: nn.Module, where: Callable[[str, nn.Module], bool], name: str = "", around: _Around = _Around()
) -> Iterator[tuple[str, nn.Module, str | None, bool]]:
    """Twins and candidates, depth first: name, module, the reason against fusing it, and whether that is wanted.

    Looks into what is fused or will be only where that calls other candidates. A convolution that belongs to no block
    has a row of its own.
    """

    def full(key: str) -> str:
        return f"{name}.{key}" if name else key

    def kept(plain: Mapping[str, str]) -> Iterator[tuple[str, nn.Module, str, bool]]:
        for key, reason in plain.items():
            conv = module.get_submodule(key)
            yield full(key), conv, reason, bool(where(full(key), conv))

    inner = [key for key, _ in module.named_children()]
    if isinstance(module, FusedBlock):
        yield name, module, None, True
        if isinstance(module, FusedTraced):
            yield from kept(module.program.plain)
            inner = module.program.nested
        elif not module.nested:
            return
    elif (twin := _twin_class(module)) is not None:
        reason, wanted = twin.reason_against(module), bool(where(name, module))
        yield name, module, reason, wanted
        if wanted and reason is None and not twin.nested:
            return
        around = _Around(has_row=True)
    elif isinstance(module, nn.Conv3d):
        if not around.has_row:
            reason = around.reasons.get(name) or convolution_reason(module, None, type(module)) or around.reason
            yield name, module, reason, bool(where(name, module))
        return
    elif any(isinstance(child, nn.Conv3d) for child in module.modules()):
        program, reason, plain = FusedTraced.examine(module)
        if program is not None:
            wanted = bool(where(name, module))
            yield name, module, reason, wanted
            if reason is None and not around.has_row:
                yield from kept(plain)
            if reason is None and wanted:
                inner = program.nested
            elif reason is None:
                around = _Around(has_row=True)
        if not around.has_row:
            reasons = {**{full(key): value for key, value in plain.items()}, **around.reasons}
            reason = NOTHING_FOLLOWS if reason is None else f"{type(module).__name__} around it is kept: {reason}"
            around = _Around(reason=reason, reasons=reasons)
    for key in inner:
        yield from _find(module.get_submodule(key), where, full(key), around)


def _fuse(module: nn.Module) -> FusedBlock:
    traced = FusedSequential if isinstance(module, nn.Sequential) else FusedTraced
    return TWINS.get(type(module), traced)(module)


def _twin_class(module: nn.Module) -> type[FusedBlock] | None:
    """The twin of the module's class or, for want of one, of a class it derives from."""
    return next((TWINS[base] for base in type(module).__mro__ if base in TWINS), None)


def _fused_row(name: str, twin: FusedBlock) -> Row:
    device = next(twin.parameters()).device
    unavailable = unavailable_reason(device)
    served_by = "CUDA kernels" if unavailable is None else f"PyTorch: {unavailable}"
    last = twin.last_forward
    reason = None if last in (None, "fused") else last
    layer_by_layer = twin.layer_by_layer if last == "fused" else None
    classes = (type(twin.plain).__name__, type(twin).__name__)
    return Row(name, *classes, reason, layer_by_layer, served_by, last is not None)


def _swap(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> nn.Module:
    """Put each value in the place of its key, wherever it is a child, in the same position."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child in replacements:
                parent._modules[key] = replacements[child]
    return replacements.get(model, model)
