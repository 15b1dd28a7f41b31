"""Residual blocks: normalisation, shortcut and ReLU cost no pass over memory, a downsampling shortcut no launch."""

from __future__ import annotations

from torch import Tensor, nn

from .. import ops
from .block import FusedBlock, compute_dtype
from .conv import FusedConvBNReLU3d


class _FusedResidualBlock(FusedBlock):
    """``relu(branch(x) + shortcut(x))``; ``convolutions`` are the branch in its order, then ``downsample``."""

    part_twin = FusedConvBNReLU3d

    @classmethod
    def _children_reason(cls, module: nn.Module) -> str | None:
        last = cls.convolutions[-2]
        if getattr(module, last).relu:
            return f"{last} has a ReLU before the addition"
        return super()._children_reason(module)

    def fused_forward(self, x: Tensor) -> Tensor:
        """Tensor[N, C, T, H, W] -> Tensor[N, K, T, H / stride, W / stride]."""
        first, *between, last, downsample = self.convolutions
        if self.downsample is None:
            shortcut, x = x, self._convolve(first, x)
        else:
            x, shortcut = self._convolve_pair(first, downsample, x)
        for name in between:
            x = self._convolve(name, x)
        return self._convolve(last, x, residual=shortcut, relu=True)

    def _convolve_pair(self, first: str, shortcut: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """The parts ``first`` and ``shortcut``, which share their input, as one operator call."""
        parts = getattr(self, first), getattr(self, shortcut)
        folded = [
            self.folded[name].get(part.conv, part.bn, compute_dtype(part.conv.weight))
            for name, part in zip((first, shortcut), parts, strict=True)
        ]
        return ops.conv3d_bn_relu_pair(
            x,
            *folded[0],
            *folded[1],
            stride=parts[0].conv.stride,
            padding=parts[0].conv.padding,
            stride_shortcut=parts[1].conv.stride,
            padding_shortcut=parts[1].conv.padding,
            relu=parts[0].relu,
            relu_shortcut=parts[1].relu,
        )


class FusedBasicBlock3d(_FusedResidualBlock):
    """Twin of ``relu(conv2(conv1(x)) + shortcut(x))``: two operator calls.

    Args:
        plain: a block with children ``conv1``, ``conv2`` and ``downsample`` (or None), each a block with ``conv``,
            ``bn`` and ``relu``.
    """

    convolutions = ("conv1", "conv2", "downsample")


class FusedBottleneck3d(_FusedResidualBlock):
    """Twin of ``relu(conv3(conv2(conv1(x))) + shortcut(x))``: three operator calls.

    Args:
        plain: a block with children ``conv1``, ``conv2``, ``conv3`` and ``downsample`` (or None), each a block with
            ``conv``, ``bn`` and ``relu``.
    """

    convolutions = ("conv1", "conv2", "conv3", "downsample")
