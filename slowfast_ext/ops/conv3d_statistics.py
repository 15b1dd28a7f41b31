"""A convolution and the statistics that batch norm in training needs of its result, in one pass over memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._library import lib
from .batch_norm import batch_norm_statistics_reference
from .common import accumulator_dtype, allows_tf32, check, register_autocast
from .conv3d_bn_relu import conv3d_bn_relu_reference, convolution_shape
from .paper_times import paper_reason_against

_ARGUMENTS = "Tensor x, Tensor weight, int[3] stride, int[3] padding, float eps, bool allow_tf32"
lib.define(
    f"conv3d_statistics({_ARGUMENTS}) -> (Tensor y, Tensor mean, Tensor variance, Tensor inverse_std)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_operator = torch.ops.slowfast_ext.conv3d_statistics.default


def conv3d_statistics(
    x: Tensor,
    weight: Tensor,
    *,
    stride: int | tuple[int, int, int] = 1,
    padding: int | tuple[int, int, int] = 0,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """3-D convolution, and of each channel of its result mean, biased variance and ``1 / sqrt(variance + eps)``.

    Equivalent to::

        y = F.conv3d(x, weight, None, stride, padding)
        mean, variance, inverse_std = batch_norm_statistics(y, eps=eps)

    but on a GPU the kernel that computes y has the statistics from the same registers. They are those of y as it is
    stored, rounded; sums have the same order each time. Products as in :func:`conv3d_bn_relu`.

    It has no gradients: what trains puts it together with the other passes of batch norm. Whether it is faster than
    two passes, :func:`conv3d_statistics_reason_against` says.

    Args:
        x (Tensor[N, C, T, H, W]): float32, float16, bfloat16, on a CPU also float64; any strides, fastest in
            channels_last_3d with a C that fills 16 bytes.
        weight (Tensor[K, C, kernel_t, kernel_h, kernel_w]): dtype of ``x``; fastest in channels_last_3d.
        stride, padding: elements along (T, H, W), or one number for all three.
        eps: at least 0.

    Returns:
        y (Tensor[N, K, T', H', W']) in channels_last_3d; mean, variance and inverse_std (Tensor[1, K]) in float32
        (float64 if ``x`` is), of no elements mean 0 and variance 0.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype or device, the kernel does not fit into the padded input, or
            ``eps`` is negative.

    Under autocast x and weight are cast.
    """
    stride = (stride,) * 3 if isinstance(stride, int) else stride
    padding = (padding,) * 3 if isinstance(padding, int) else padding
    return _operator(x, weight, stride, padding, eps, allows_tf32(x))


def conv3d_statistics_reason_against(
    x: Sequence[int],
    weight: Sequence[int],
    *,
    stride: tuple[int, int, int] = (1, 1, 1),
    padding: tuple[int, int, int] = (0, 0, 0),
    dtype: torch.dtype = torch.bfloat16,
    allow_tf32: bool = True,
    device: torch.device | str | None = None,
) -> str | None:
    """Why :func:`conv3d_statistics` is slower than cuDNN and a pass over its result, or None if it should be faster.

    Decided on paper, in favour of cuDNN, by :func:`~slowfast_ext.ops.paper_times.paper_reason_against`: the pass reads
    the result once more, from memory. What the kernel's tiles write and read of statistics is less than the result and
    changes no decision.

    For R50 4x16 with 8 clips of 224 x 224 in bfloat16 on an H200 that is the kernel for 33 of the 106 convolutions
    before a batch norm, nearly all of them 1x1x1: those that widen, but for the slow pathway's last two stages, and
    those of the slow pathway's first stage. It saves 0.17 of the 1.23 ms that cuDNN and the passes take on paper.

    Args:
        x: shape (N, C, T, H, W).
        weight: shape (K, C, kernel_t, kernel_h, kernel_w).
        stride, padding: elements along (T, H, W).
        dtype: of x.
        allow_tf32: whether float32 products may be TF32's.
        device: where it is to run; the current CUDA device if None.
    """
    return paper_reason_against(x, weight, stride, padding, dtype, allow_tf32, device, maps=0, library_maps=1)


def _check(x, weight, stride, padding, eps) -> list[int]:
    """The shape of y."""
    shape = convolution_shape("conv3d_statistics", x, weight, None, stride, padding)
    check("conv3d_statistics", eps >= 0, "eps", "at least 0", eps)
    return shape


def conv3d_statistics_reference(x, weight, stride, padding, eps=1e-5, allow_tf32=False) -> tuple[Tensor, ...]:
    """The operator in plain PyTorch; runs where there is no kernel. Arguments as in the schema."""
    _check(x, weight, stride, padding, eps)
    y = conv3d_bn_relu_reference(x, weight, None, None, stride, padding, False)
    return y, *batch_norm_statistics_reference(y, 1, eps)


def _cpu(x, weight, stride, padding, eps, allow_tf32) -> tuple[Tensor, ...]:
    _check(x, weight, stride, padding, eps)
    y = torch.ops.slowfast_ext.conv3d_bn_relu(x, weight, None, None, stride, padding, False, allow_tf32)
    return y, *torch.ops.slowfast_ext.batch_norm_statistics(y, 1, eps)


lib.impl("conv3d_statistics", conv3d_statistics_reference, "CompositeExplicitAutograd")
lib.impl("conv3d_statistics", _cpu, "CPU")


@torch.library.register_fake("slowfast_ext::conv3d_statistics", lib=lib)
def _fake(x, weight, stride, padding, eps, allow_tf32):
    shape = _check(x, weight, stride, padding, eps)
    statistics = (x.new_empty((1, shape[1]), dtype=accumulator_dtype(x)) for _ in range(3))
    return x.new_empty(shape).to(memory_format=torch.channels_last_3d), *statistics


register_autocast(_operator, cast=("x", "weight"))
