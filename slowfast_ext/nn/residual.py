"""Residual blocks: normalisation, shortcut and ReLU cost no pass over memory, a downsampling shortcut no launch."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from .. import ops
from .block import compute_dtype
from .conv import FusedConvBNReLU3d, FusedConvolutions
from .training import Part, train_block


class _FusedResidualBlock(FusedConvolutions):
    """``relu(branch(x) + shortcut(x))``; ``convolutions`` are the branch in its order, then ``downsample``."""

    takes_out = True
    takes_lateral = True
    part_twin = FusedConvBNReLU3d

    @classmethod
    def _children_reason(cls, module: nn.Module) -> str | None:
        last = cls.convolutions[-2]
        if getattr(module, last).relu:
            return f"{last} has a ReLU before the addition"
        return super()._children_reason(module)

    @property
    def out_channels(self) -> int:
        return getattr(self, self.convolutions[-2]).conv.out_channels

    def fused_forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Tensor[N, C, T, H, W] -> Tensor[N, K, T, H / stride, W / stride]."""
        first, *between, last, downsample = self.convolutions
        if self.downsample is None:
            shortcut, x = x, self._convolve(first, x)
        else:
            x, shortcut = self._convolve_pair(first, downsample, x)
        for name in between:
            x = self._convolve(name, x)
        return self._convolve(last, x, residual=shortcut, relu=True, out=out)

    def training_forward(self, x: Tensor, lateral: Part | None = None, fast: Tensor | None = None) -> Tensor:
        """As :meth:`fused_forward`; with the lateral connection behind the block, if given, in one tensor."""
        branch = [self._trained_part(name) for name in self.convolutions[:-1]]
        shortcut = None if self.downsample is None else self._trained_part(self.convolutions[-1])
        dtype = compute_dtype(self.conv1.conv.weight)
        return train_block(x, branch, dtype, residual=True, shortcut=shortcut, lateral=lateral, fast=fast)

    def _convolve_pair(self, first: str, shortcut: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """The parts ``first`` and ``shortcut``, which share their input, as one operator call."""
        parts = getattr(self, first), getattr(self, shortcut)
        return ops.conv3d_bn_relu_pair(
            x,
            *self._folded(first),
            *self._folded(shortcut),
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
    """Twin of ``relu(conv3(conv2(conv1(x))) + shortcut(x))``: one operator call where
    :func:`~slowfast_ext.ops.fast_bottleneck` has a kernel for the block, else three.

    Args:
        plain: a block with children ``conv1``, ``conv2``, ``conv3`` and ``downsample`` (or None), each a block with
            ``conv``, ``bn`` and ``relu``.
    """

    convolutions = ("conv1", "conv2", "conv3", "downsample")

    def fused_forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Tensor[N, C, T, H, W] -> Tensor[N, K, T, H / stride, W / stride]."""
        reason = self._kernel_reason()
        self._note_layer_by_layer(reason)
        if reason is not None:
            return super().fused_forward(x, out)
        tensors = [tensor for name, _ in self._parts(self) for tensor in self._folded(name)]
        return ops.fast_bottleneck(x, *tensors, stride=self.conv2.conv.stride[1], out=out)

    def _kernel_reason(self) -> str | None:
        """Why there is no kernel for the whole block, or None."""
        parts = tuple(
            (part.conv.kernel_size, part.conv.stride, part.conv.padding, part.relu, _has_bias(part))
            for _, part in self._parts(self)
        )
        weight = self.conv1.conv.weight
        channels = (self.conv1.conv.in_channels, self.conv1.conv.out_channels)
        return _bottleneck_reason(parts, *channels, compute_dtype(weight), weight.device)


def _has_bias(part: nn.Module) -> bool:
    return part.bn is not None or part.conv.bias is not None


@torch.compiler.assume_constant_result
def _bottleneck_reason(
    parts: tuple, in_channels: int, channels: int, dtype: torch.dtype, device: torch.device
) -> str | None:
    return _cached_bottleneck_reason(parts, in_channels, channels, dtype, device)


@functools.cache  # asked for each block in each forward
def _cached_bottleneck_reason(
    parts: tuple, in_channels: int, channels: int, dtype: torch.dtype, device: torch.device
) -> str | None:
    taps, stride = parts[0][0][0], parts[1][1][1]
    projection = len(parts) == 4
    expected = (
        ((taps, 1, 1), (1, 1, 1), (taps // 2, 0, 0), True, True),
        ((1, 3, 3), (1, stride, stride), (0, 1, 1), True, True),
        ((1, 1, 1), (1, 1, 1), (0, 0, 0), False, True),
        ((1, 1, 1), (1, stride, stride), (0, 0, 0), False, True),
    )
    if parts != expected[: len(parts)]:
        return "the convolutions are not the ReLU'd t x 1 x 1, 1 x 3 x 3 and the 1 x 1 x 1 of the kernels"
    return ops.fast_bottleneck_reason_against(
        in_channels,
        channels,
        stride=stride,
        projection=projection,
        temporal_kernel=taps,
        dtype=dtype,
        device=device,
    )
