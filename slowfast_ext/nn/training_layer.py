"""A convolution with its batch norm in training: its passes forwards and backwards, without a graph."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..ops.batch_norm_relu import BatchNormForward, BatchNormSettings, batch_norm_forward, in_dtype_of_sums
from ..ops.common import allows_tf32
from ..ops.paper_times import paper_reason_against


class Step(NamedTuple):
    """A convolution, and the batch norm and ReLU after it.

    Attributes:
        stride, padding: of the convolution.
        norm: None where there is none.
        relu: whether there is a ReLU; only behind a batch norm.
    """

    stride: tuple[int, int, int]
    padding: tuple[int, int, int]
    norm: BatchNormSettings | None
    relu: bool

    TENSORS = 6  # that belong to a step: weight and bias of the convolution, of the batch norm, its statistics


class Moments(NamedTuple):
    mean: Tensor
    inverse_std: Tensor
    count: int | Tensor


class Layer:
    """A step with its tensors."""

    def __init__(self, step: Step, tensors: Sequence[Tensor | None], dtype: torch.dtype):
        self.step, self.on_cpu = step, _on_cpu(tensors[0])
        weight, bias, *norm = tensors
        self.weight, self.bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        gamma, beta, mean, variance = (in_dtype_of_sums(self.weight, tensor) for tensor in norm)
        self.affine = (gamma, beta)
        self.given = None if mean is None else (mean[None], variance[None])

    def convolve(self, x: Tensor) -> Tensor:
        """Tensor[N, C, T, H, W] -> Tensor[N, K, T', H', W'] in channels_last_3d."""
        geometry = {"stride": self.step.stride, "padding": self.step.padding}
        if self.on_cpu:  # F.conv3d has a slow path for small batches
            bias = in_dtype_of_sums(x, self.bias)
            return ops.conv3d_bn_relu(x, self.weight, bias, relu=False, **geometry)
        if self._has_statistics(x):  # the kernel that made the statistics, so that they belong to the same numbers
            return ops.conv3d_bn_relu(x, self.weight, relu=False, **geometry)
        return F.conv3d(x, self.weight, self.bias, **geometry).contiguous(memory_format=torch.channels_last_3d)

    def convolve_for_statistics(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """The convolution, and mean, variance and inverse_std of its result where one kernel makes all."""
        if not self._has_statistics(x):
            return self.convolve(x), None
        step = self.step
        y, *statistics = ops.conv3d_statistics(
            x, self.weight, stride=step.stride, padding=step.padding, eps=step.norm.eps
        )
        return y, tuple(statistics)

    def _has_statistics(self, x: Tensor) -> bool:
        norm = self.step.norm
        if norm is None or not norm.batch or norm.splits > 1 or self.bias is not None:
            return False
        geometry = (tuple(self.weight.shape), tuple(self.step.stride), tuple(self.step.padding))
        return _statistics_reason(tuple(x.shape), *geometry, x.dtype, allows_tf32(x), x.device) is None

    def normalize(
        self,
        y: Tensor,
        statistics: tuple[Tensor, ...] | None = None,
        residual: Tensor | None = None,
        *,
        relu: bool,
        out: Tensor | None = None,
    ) -> BatchNormForward:
        given = self.given if statistics is None else statistics
        return batch_norm_forward(y, self.step.norm, *self.affine, given, residual, relu=relu, out=out)

    def normalize_again(self, y: Tensor, moments: Moments) -> Tensor:
        return ops.batch_norm_apply(y, moments.mean, moments.inverse_std, *self.affine, relu=self.step.relu)

    def gradients(
        self, grad: Tensor, x: Tensor, needs: Sequence[bool], onto: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        """Of x, weight and bias of the convolution; ``onto``, which may be overwritten, is added to the first."""
        if onto is None or not needs[0]:
            return self._gradients(grad, x, needs)
        if self._adds_gradient(grad, x):
            grad_x = self._turned_convolution(grad, onto)
            needs = (False, *needs[1:])
            return (grad_x, *self._gradients(grad, x, needs)[1:]) if any(needs) else (grad_x, None, None)
        grad_x, *others = self._gradients(grad, x, needs)
        return grad_x.add_(onto), *others

    def _adds_gradient(self, grad: Tensor, x: Tensor) -> bool:
        """Whether the gradient of x is computed and added in one pass."""
        kernel, padding = self.weight.shape[2:], self.step.padding
        if self.on_cpu or tuple(self.step.stride) != (1, 1, 1):
            return False
        if any(pad >= size for pad, size in zip(padding, kernel, strict=True)):
            return False
        geometry = (tuple(grad.shape), (x.shape[1], grad.shape[1], *kernel), self._turned_padding())
        return _addition_reason(*geometry, grad.dtype, allows_tf32(grad), grad.device) is None

    def _turned_padding(self) -> tuple[int, ...]:
        return tuple(size - 1 - pad for size, pad in zip(self.weight.shape[2:], self.step.padding, strict=True))

    def _turned_convolution(self, grad: Tensor, onto: Tensor) -> Tensor:
        """``onto`` and the gradient of the input, which is a convolution with the weight turned round, in one pass."""
        weight = self.weight.transpose(0, 1).flip(2, 3, 4).contiguous(memory_format=torch.channels_last_3d)
        return ops.conv3d_bn_relu(grad, weight, None, onto, padding=self._turned_padding(), relu=False)

    def _gradients(self, grad: Tensor, x: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
        weight, stride, padding = self.weight, list(self.step.stride), list(self.step.padding)
        frames, padded = x.shape[2], padding[0]
        if self.on_cpu and padded and 1 < frames < weight.shape[2] and x.element_size() == 2:
            # oneDNN's gradient of the weight reads memory that nobody wrote where the kernel is longer than the clip.
            x = F.pad(x, (0, 0, 0, 0, padded, padded)).contiguous(memory_format=torch.channels_last_3d)
            grad_x, *others = self._backward(grad, x, stride, [0, *padding[1:]], needs)
            grad_x = grad_x[:, :, padded:-padded] if needs[0] else None
            return grad_x, *others
        return self._backward(grad, x, stride, padding, needs)

    def _backward(self, grad, x, stride, padding, needs) -> tuple[Tensor | None, ...]:
        weight = self.weight
        biases = None if self.bias is None else [weight.shape[0]]
        if self.on_cpu and _is_flat(weight, stride, padding):
            # In three dimensions torch does without oneDNN here, and takes up to ten times as long.
            by_frame = weight.shape[2] == 1
            grad, flat = _in_two_dimensions(grad, by_frame), _in_two_dimensions(x, by_frame)
            stride, padding = (stride[1:], padding[1:]) if by_frame else ([stride[0], stride[2]], [padding[0], 0])
            geometry = (stride, padding, [1, 1], False, [0, 0], 1)
            grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
                grad, flat, weight.flatten(3), biases, *geometry, list(needs)
            )
            grad_x = _in_three_dimensions(grad_x, x, by_frame) if needs[0] else None
            return grad_x, grad_weight.view_as(weight) if needs[1] else None, grad_bias
        geometry = (stride, padding, [1, 1, 1], False, [0, 0, 0], 1)
        return torch.ops.aten.convolution_backward(grad, x, weight, biases, *geometry, list(needs))


@torch.compiler.assume_constant_result
def _addition_reason(*arguments) -> str | None:
    return _cached_addition_reason(*arguments)


@functools.cache
def _cached_addition_reason(grad, weight, padding, dtype, allow_tf32, device) -> str | None:
    # cuDNN writes its result; the addition reads that, reads the other and writes the sum.
    return paper_reason_against(grad, weight, (1, 1, 1), padding, dtype, allow_tf32, device, maps=1, library_maps=3)


@torch.compiler.assume_constant_result
def _statistics_reason(*arguments) -> str | None:
    return _cached_statistics_reason(*arguments)


@functools.cache  # asked for each convolution in each step
def _cached_statistics_reason(x, weight, stride, padding, dtype, allow_tf32, device) -> str | None:
    geometry = {"stride": stride, "padding": padding}
    return ops.conv3d_statistics_reason_against(
        x, weight, **geometry, dtype=dtype, allow_tf32=allow_tf32, device=device
    )


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _is_flat(weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether the kernel is 1 x 1 x 1 or t x 1 x 1, and strides are in space or in time, where it is."""
    taps, *spatial = weight.shape[2:]
    if spatial != [1, 1]:
        return False
    if taps == 1:
        return stride[0] == 1 and padding[0] == 0
    return list(stride[1:]) == [1, 1] and list(padding[1:]) == [0, 0]


def _in_two_dimensions(x: Tensor, by_frame: bool) -> Tensor:
    """A view of a channels_last_3d tensor: Tensor[N * T, C, H, W], or else Tensor[N, C, T, H * W]."""
    return x.transpose(1, 2).flatten(0, 1) if by_frame else x.flatten(3)


def _in_three_dimensions(flat: Tensor, like: Tensor, by_frame: bool) -> Tensor:
    """The inverse, of the shape of ``like``."""
    if by_frame:
        return flat.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)
    return flat.unflatten(3, tuple(like.shape[3:]))
