"""How long a convolution takes on paper: in a kernel of this package, and in cuDNN with passes over its result."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

import torch

from .._library import unavailable_reason


@dataclass(frozen=True)
class Balance:
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
    (8, 0): Balance(library=72, own=72, cache=2.0),
    (8, 6): Balance(library=36, own=36, cache=4.0),
    (8, 9): Balance(library=77, own=77, cache=8.5),
    (9, 0): Balance(library=91.6, own=56.8, cache=1.29),
    (10, 0): Balance(library=133, own=33, cache=0.91),
    (12, 0): Balance(library=55, own=55, cache=6.1),
}


def paper_reason_against(
    x: Sequence[int],
    weight: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dtype: torch.dtype,
    allow_tf32: bool,
    device: torch.device | str | None,
    *,
    maps: int,
    library_maps: int,
) -> str | None:
    """Why a kernel of this package takes longer than cuDNN and passes over the result, or None if it should be faster.

    With P output pixels, K output channels, R terms of a sum, e bytes an element, and times counted in bytes that move
    to or from memory meanwhile:

    - cuDNN and the passes take ``max(P K R / library, x + weight + y) + library_maps y``: at its best in everything,
      then what the passes read and write.
    - The kernel takes ``max(P K' R / own, e R (P K' / w + K P / 128) / cache, x + weight + (1 + maps) y)``. Its tiles
      have 128 pixels and w = 16, 32, 64 or 128 channels, K' is K rounded up to them. The second term is what all tiles
      read through L2: x once for each tap and tile of channels. The first two grow where tiles do not divide among the
      multiprocessors.

    The rates, library, own and cache, are those of the compute capability; in TF32 half as many multiply-adds, and a
    third of these where float32 is made of three TF32 products.

    Args:
        x, weight, stride, padding, dtype, allow_tf32, device: of
            :func:`~slowfast_ext.ops.conv3d_statistics_reason_against`.
        maps: of the size of the result that the kernel reads besides.
        library_maps: that passes after cuDNN read and write.
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

    axes = list(zip(x[2:], weight[2:], stride, padding, strict=True))
    pixels = x[0] * prod((extent + 2 * pad - kernel) // step + 1 for extent, kernel, step, pad in axes)
    channels, terms = weight[0], prod(weight[1:])
    # A stride longer than the kernel leaves input out.
    read = prod(x) * prod(min(1.0, kernel / step) for _, kernel, step, _ in axes)
    result = size * pixels * channels
    memory = size * (read + channels * terms) + result
    factor = 1 if size == 2 else 2
    library = max(pixels * channels * terms / balance.library * factor, memory) + library_maps * result

    tiles = ceil(pixels / 128)
    width = next((width for width in (16, 32, 64) if channels <= width), 128)
    columns = ceil(channels / width)
    blocks = tiles * columns
    multiprocessors = properties.multi_processor_count
    uneven = ceil(blocks / multiprocessors) * multiprocessors / max(blocks, 1)
    multiply = pixels * columns * width * terms / balance.own * (factor if size == 2 or allow_tf32 else 3 * factor)
    cache = size * terms * (pixels * columns + channels * tiles) / balance.cache
    own = max(max(multiply, cache) * uneven, memory + maps * result)
    if own < library:
        return None
    return f"on paper the kernel takes {own / max(library, 1):.2f} times as long as cuDNN and a pass over its result"
