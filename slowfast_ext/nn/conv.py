"""Convolution, batch norm and ReLU as one operator, and what all twins that are made of such have in common."""

from __future__ import annotations

from torch import Tensor, nn

from .. import ops
from .block import DTYPES, TWINS, FusedBlock, backend_reason, call_reason, compute_dtype, recording_reason
from .folding import FoldedWeights
from .statistics import NORMS
from .training import Part, train_block


def convolution_reason(conv: nn.Module, bn: nn.Module | None, kind: type[nn.Conv3d] = nn.Conv3d) -> str | None:
    """Why ``bn(conv(x))`` in evaluation mode is not what ``conv3d_bn_relu`` computes, or None.

    ``kind`` is the class of the convolution, which is known to compute what Conv3d does.
    """
    if type(conv) is not kind:
        return f"conv is a {type(conv).__name__}, not a Conv3d"
    if conv.groups != 1:
        return f"conv has {conv.groups} groups"
    if conv.dilation != (1, 1, 1):
        return f"conv has dilation {conv.dilation}"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"conv has padding {conv.padding!r} with padding_mode {conv.padding_mode!r}"
    if conv.weight.dtype not in DTYPES:
        return f"conv has weights in {conv.weight.dtype}"
    reason = call_reason(conv)
    if reason is not None:
        return f"conv {reason}"
    if bn is not None:
        if type(bn) not in NORMS:
            return f"bn is a {type(bn).__name__}, not a BatchNorm3d"
        if bn.running_mean is None or bn.running_var is None:
            return "bn has no running statistics"
        reason = call_reason(bn)
        if reason is not None:
            return f"bn {reason}"
    return None


class FusedConvolutions(FusedBlock):
    """Base of the twins whose every parameter belongs to a convolution or its batch norm."""

    own = (*FusedBlock.own, "folded")
    # The children that have ``conv`` and ``bn``, in classes whose twin is ``part_twin``; none: the block itself has.
    convolutions: tuple[str, ...] = ()
    part_twin: type[FusedBlock] | None = None

    def __init__(self, plain: nn.Module):
        super().__init__(plain)
        self.folded = {name: FoldedWeights() for name in self.convolutions or ("",)}

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
                reason = call_reason(part)
                if reason is not None:
                    return f"{name} {reason}"
            reason = convolution_reason(part.conv, part.bn)
            if reason is not None:
                return f"{name}.{reason}" if name else reason
        weight = parts[0][1].conv.weight
        return fused_part or backend_reason(weight.device, weight.dtype)

    def _state_reason(self) -> str | None:
        for name, part in self._parts(self):
            conv, bn = part.conv, part.bn
            if bn is not None and bn.training:
                return f"{name}.bn is in training mode" if name else "bn is in training mode"
            tensors = (conv.weight, conv.bias) if bn is None else (conv.weight, conv.bias, bn.weight, bn.bias)
            reason = recording_reason(*tensors)
            if reason is not None:
                return reason
        return None

    def _folded(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Weight, in the dtype to compute in, and bias of the part ``name``."""
        part = getattr(self, name) if name else self
        return self.folded[name].get(part.conv, part.bn, compute_dtype(part.conv.weight))

    def _convolve(
        self, name: str, x: Tensor, residual: Tensor | None = None, relu: bool | None = None, out: Tensor | None = None
    ) -> Tensor:
        """The part ``name`` as one operator call; ``relu`` in place of its own."""
        part = getattr(self, name) if name else self
        conv, relu = part.conv, part.relu if relu is None else relu
        weight, bias = self._folded(name)
        return ops.conv3d_bn_relu(
            x, weight, bias, residual, stride=conv.stride, padding=conv.padding, relu=relu, out=out
        )

    def _training_reason(self) -> str | None:
        for name, part in self._parts(self):
            if part.bn is None:
                return f"{name} has no batch norm" if name else "it has no batch norm"
        return self._children_reason(self)

    def _trained_part(self, name: str) -> Part:
        """The part ``name``, as training takes it."""
        part = getattr(self, name) if name else self
        return Part(part.conv, part.bn, part.relu)

    def train(self, mode: bool = True) -> FusedConvolutions:
        """As :meth:`torch.nn.Module.train`; frees the folded weights when training begins."""
        if mode:
            for folded in self.folded.values():
                folded.clear()
        return super().train(mode)


class FusedConvBNReLU3d(FusedConvolutions):
    """Twin of a block that is ``relu(bn(conv(x)))``.

    Args:
        plain: a block with children ``conv`` and ``bn`` (or None) and the flag ``relu``.
    """

    def fused_forward(self, x: Tensor) -> Tensor:
        """Tensor[N, C, T, H, W] -> Tensor[N, K, T', H', W']."""
        return self._convolve("", x)

    def training_forward(self, x: Tensor) -> Tensor:
        """As :meth:`fused_forward`."""
        return train_block(x, [self._trained_part("")], compute_dtype(self.conv.weight))
