"""A convolution and the statistics that batch norm in training needs of its result, in one pass over memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import Tensor

from .._library import lib, unavailable_reason
from .batch_norm import batch_norm_statistics_reference
from .common import accumulator_dtype, allows_tf32, check, register_autocast
from .conv3d_bn_relu import conv3d_bn_relu_reference, convolution_shape

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


@dataclass(frozen=True)
class _Balance:
    """What a GPU does while one byte moves between it and its memory.

    Attributes:
        library: 16-bit multiply-adds of cuDNN's best kernels.
        own: those of mma.sync, which is all that the kernels of this package use.
        cache: bytes from L2 to the multiprocessors.
    """

    library: float
    own: float
    cache: float


# By compute capability, of the GPU whose memory is the fastest for its operations, so that y is read again soonest:
# A100 80 GB, RTX 3090, RTX 4090, H200, B200, RTX 5090. H200: 788 TFLOP/s and 4.3 TB/s as measured, mma.sync at 62 % of
# wgmma, 24 bytes a clock and multiprocessor from L2. The others: 85 % of the data sheet's dense operations with sums in
# float32 and 90 % of its bandwidth, and the same 24 bytes. Only 9.0 and 10.0 have more than mma.sync; on 10.0 it is
# taken for a quarter of tcgen05.
_BALANCES = {
    (8, 0): _Balance(library=72, own=72, cache=2.0),
    (8, 6): _Balance(library=36, own=36, cache=4.0),
    (8, 9): _Balance(library=77, own=77, cache=8.5),
    (9, 0): _Balance(library=91.6, own=56.8, cache=1.29),
    (10, 0): _Balance(library=133, own=33, cache=0.91),
    (12, 0): _Balance(library=55, own=55, cache=6.1),
}


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

    Decided on paper, in favour of cuDNN. With P output pixels, K output channels, R terms of a sum, e bytes an element,
    and times counted in bytes that move to or from memory meanwhile:

    - cuDNN and the pass take ``max(P K R / library, x + weight + y) + y``: at its best in everything, then y once more,
      from memory.
    - The kernel takes ``max(P K' R / own, e R (P K' / w + K P / 128) / cache, x + weight + y)``. Its tiles have 128
      pixels and w = 16, 32, 64 or 128 channels, K' is K rounded up to them. The second term is what all tiles read
      through L2: x once for each tap and tile of channels. The first two grow where tiles do not divide among the
      multiprocessors. What tiles write and read of statistics is less than y and changes no decision.

    The rates, library, own and cache, are those of the compute capability; in TF32 half as many multiply-adds, and a
    third of these where float32 is made of three TF32 products.

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
    reason = unavailable_reason(device)
    if reason is not None:
        return reason
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"there are kernels for torch.float32, torch.float16 and torch.bfloat16, not for {dtype}"
    size = dtype.itemsize
    if x[1] * size % 16:
        return f"{x[1]} channels of {dtype} do not fill 16 bytes, the kernel would gather them one by one"
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    balance = _BALANCES[max(known for known in _BALANCES if known <= capability)]
    own, library = _paper_times(x, weight, stride, padding, size, allow_tf32, balance, properties.multi_processor_count)
    if own < library:
        return None
    return f"on paper the kernel takes {own / max(library, 1):.2f} times as long as cuDNN and a pass over its result"


def _paper_times(x, weight, stride, padding, size, allow_tf32, balance, multiprocessors) -> tuple[float, float]:
    """Of the kernel and of cuDNN with a pass, as conv3d_statistics_reason_against counts them."""
    axes = list(zip(x[2:], weight[2:], stride, padding, strict=True))
    pixels = x[0] * prod((extent + 2 * pad - kernel) // step + 1 for extent, kernel, step, pad in axes)
    channels, terms = weight[0], prod(weight[1:])
    # A stride longer than the kernel leaves input out.
    read = prod(x) * prod(min(1.0, kernel / step) for _, kernel, step, _ in axes)
    result = size * pixels * channels
    memory = size * (read + channels * terms) + result
    factor = 1 if size == 2 else 2
    library = max(pixels * channels * terms / balance.library * factor, memory) + result

    tiles = ceil(pixels / 128)
    width = next((width for width in (16, 32, 64) if channels <= width), 128)
    columns = ceil(channels / width)
    blocks = tiles * columns
    uneven = ceil(blocks / multiprocessors) * multiprocessors / max(blocks, 1)
    multiply = pixels * columns * width * terms / balance.own * (factor if size == 2 or allow_tf32 else 3 * factor)
    cache = size * terms * (pixels * columns + channels * tiles) / balance.cache
    return max(max(multiply, cache) * uneven, memory), library


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
