"""Residual blocks, one operator a convolution: normalisation, shortcut and ReLU cost no pass over memory."""

from __future__ import annotations

from torch import Tensor, nn

from .block import FusedBlock
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
        *first, last, downsample = self.convolutions
        shortcut = x if self.downsample is None else self._convolve(downsample, x)
        for name in first:
            x = self._convolve(name, x)
        return self._convolve(last, x, residual=shortcut, relu=True)


class FusedBasicBlock3d(_FusedResidualBlock):
    """Twin of ``relu(conv2(conv1(x)) + shortcut(x))``: two operator calls, three with a downsampling shortcut.

    Args:
        plain: a block with children ``conv1``, ``conv2`` and ``downsample`` (or None), each a block with ``conv``,
            ``bn`` and ``relu``.
    """

    convolutions = ("conv1", "conv2", "downsample")


class FusedBottleneck3d(_FusedResidualBlock):
    """Twin of ``relu(conv3(conv2(conv1(x))) + shortcut(x))``: three operator calls, four with a downsampling shortcut.

    Args:
        plain: a block with children ``conv1``, ``conv2``, ``conv3`` and ``downsample`` (or None), each a block with
            ``conv``, ``bn`` and ``relu``.
    """

    convolutions = ("conv1", "conv2", "conv3", "downsample")
