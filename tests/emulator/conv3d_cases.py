"""What conv3d_bn_relu is run on under the emulator, and how its result is judged; as a script, for harness.py."""

import itertools
import sys
from dataclasses import dataclass

import harness
import numpy as np

MATHS = ("bfloat16", "float16", "tf32", "float32")
TILES = ("128x128", "128x64", "64x64", "128x32", "128x16")


@dataclass(frozen=True)
class Case:
    x: tuple  # N, C, T, H, W
    out_channels: int
    kernel: tuple = (1, 1, 1)
    stride: tuple = (1, 1, 1)
    padding: tuple | None = None  # half the kernel
    bias: bool = True
    residual: bool = False
    relu: bool = True
    layout: str = "channels_last"  # contiguous; channels, frames: every element of a larger array
    slice: tuple | None = None  # y and residual are channels from slice[0] on of slice[1] more
    tile: str = "auto"
    splits: int = 0  # as the cost model says

    def __post_init__(self):
        if self.padding is None:
            object.__setattr__(self, "padding", tuple(size // 2 for size in self.kernel))


CASES = {
    # The layers of SlowFast, at small spatial sizes.
    "slow_res2_conv1_80_channels": Case((1, 80, 2, 9, 7), 64),
    "slow_res2_conv3_residual": Case((1, 64, 2, 8, 8), 256, residual=True),
    "slow_res2_conv3_into_concat": Case((1, 64, 1, 9, 9), 128, residual=True, slice=(0, 64)),
    "slow_res3_1x3x3_stride_2": Case((1, 64, 2, 11, 13), 128, (1, 3, 3), (1, 2, 2)),
    "slow_res3_shortcut_stride_2": Case((1, 64, 2, 9, 9), 128, stride=(1, 2, 2), relu=False),
    "slow_res4_3x1x1": Case((1, 128, 4, 5, 5), 64, (3, 1, 1)),
    "fast_res2_3x1x1": Case((1, 8, 8, 7, 7), 8, (3, 1, 1)),
    "fast_res2_1x3x3": Case((1, 8, 4, 9, 9), 8, (1, 3, 3)),
    "fast_res2_conv3_residual": Case((1, 8, 4, 9, 9), 32, residual=True),
    "fast_res3_1x3x3_stride_2": Case((2, 16, 3, 9, 9), 16, (1, 3, 3), (1, 2, 2)),
    "fast_res4_3x1x1": Case((1, 64, 6, 5, 5), 32, (3, 1, 1)),
    "slow_stem_1x7x7": Case((1, 3, 2, 21, 19), 64, (1, 7, 7), (1, 2, 2)),
    "slow_stem_strided_frames": Case((1, 3, 2, 17, 15), 64, (1, 7, 7), (1, 2, 2), layout="frames"),
    "fast_stem_5x7x7": Case((1, 3, 5, 13, 15), 8, (5, 7, 7), (1, 2, 2)),
    "fast_stem_contiguous": Case((1, 3, 4, 11, 9), 8, (5, 7, 7), (1, 2, 2), layout="contiguous"),
    "lateral_5x1x1_stride_8_into_concat": Case((1, 8, 32, 5, 4), 16, (5, 1, 1), (8, 1, 1), slice=(64, 64), bias=False),
    "lateral_7x1x1_stride_4_into_concat": Case((1, 32, 16, 3, 5), 64, (7, 1, 1), (4, 1, 1), slice=(256, 256)),
    # What a network does not have, but a user may.
    "one_frame_3x3x3": Case((2, 16, 1, 5, 6), 24, (3, 3, 3)),
    "all_ones": Case((1, 1, 1, 1, 1), 1, residual=True),
    "odd_channels": Case((1, 5, 3, 7, 5), 7, (3, 3, 3), (2, 2, 1), residual=True),
    "odd_out_channels": Case((1, 24, 2, 7, 7), 33, residual=True),
    "odd_slice": Case((1, 16, 2, 5, 5), 12, residual=True, slice=(3, 4)),
    "even_kernel_no_padding": Case((1, 16, 4, 6, 7), 40, (2, 2, 4), (1, 3, 2), (0, 0, 0)),
    "padding_wider_than_kernel": Case((1, 8, 2, 3, 3), 8, padding=(2, 1, 3)),
    "reduction_tail": Case((1, 40, 1, 8, 8), 64),
    "unaligned_channels_of_a_wider_tensor": Case((1, 16, 2, 5, 5), 16, layout="channels"),
    "no_epilogue": Case((1, 32, 2, 6, 6), 64, bias=False, relu=False),
    "several_blocks_each_way": Case((2, 32, 3, 9, 11), 200, residual=True),
}
for _splits in (1, 2, 7):
    CASES[f"splits_{_splits}"] = Case((1, 40, 3, 7, 6), 44, (3, 1, 3), residual=True, slice=(4, 12), splits=_splits)
CASES["more_splits_than_steps"] = Case((1, 8, 1, 5, 5), 16, splits=3)
CASES["splits_of_a_gathered_stem"] = Case((1, 3, 3, 9, 9), 8, (3, 7, 7), (1, 2, 2), splits=4)
for _tile in TILES:
    CASES[f"tile_{_tile}"] = Case((1, 48, 2, 11, 13), 136, (1, 3, 3), residual=True, tile=_tile)


class Storage:
    """How elements are held and rounded; u is the unit roundoff."""

    def __init__(self, math):
        self.dtype = {"bfloat16": np.uint16, "float16": np.float16}.get(math, np.float32)
        self.unit_roundoff = {"bfloat16": 2.0**-8, "float16": 2.0**-11}.get(math, 2.0**-24)
        self.bfloat16 = math == "bfloat16"

    def encode(self, values):
        if not self.bfloat16:
            return values.astype(self.dtype)
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)  # to nearest even

    def decode(self, array):
        if not self.bfloat16:
            return array.astype(np.float64)
        return (np.ascontiguousarray(array).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def channels_last(shape, dtype, before=0, after=0, fill=None):
    """An (N, C, T, H, W) view of memory that is channels-last and has channels before and after the view's."""
    n, c, t, h, w = shape
    memory = np.zeros((n, t, h, w, before + c + after), dtype)
    if fill is not None:
        memory[:] = fill
    return memory.transpose(0, 4, 1, 2, 3)[:, before : before + c], memory


def lay_out(values, layout):
    n, c, t, h, w = values.shape
    if layout == "contiguous":
        return np.ascontiguousarray(values)
    if layout == "frames":
        view, _ = channels_last((n, c, 3 * t, h, w), values.dtype)
        view = view[:, :, ::3]
    else:
        extra = (3, 2) if layout == "channels" else (0, 0)
        view, _ = channels_last(values.shape, values.dtype, *extra)
    view[:] = values
    return view


def convolve(x, weight, stride, padding):
    """conv3d in float64."""
    x = np.pad(x, [(0, 0), (0, 0), *((p, p) for p in padding)])
    out = [
        (size - kernel) // step + 1 for size, kernel, step in zip(x.shape[2:], weight.shape[2:], stride, strict=True)
    ]
    y = np.zeros((x.shape[0], weight.shape[0], *out))
    for tap in itertools.product(*map(range, weight.shape[2:])):
        window = tuple(
            slice(first, first + step * (size - 1) + 1, step)
            for first, step, size in zip(tap, stride, out, strict=True)
        )
        y += np.einsum(
            "ncthw,kc->nkthw", x[(slice(None), slice(None), *window)], weight[(slice(None), slice(None), *tap)]
        )
    return y


def run(module, case, math="bfloat16", seed=0, multiprocessors=4):
    """The largest error of a case in units of what rounding can explain, so that more than 1 is a mistake.

    With s the sum of the absolute values of all terms of an output (Higham, Accuracy and Stability, 3.1): terms * 2^-24
    * s for summing in float32, the roundoff of the result for storing it, and for what the products lose: 2 * 2^-11 * s
    with tf32 operands, 2^-21 * s with split ones. The 16-bit types lose nothing there.
    """
    random = np.random.default_rng(seed)
    storage = Storage(math)
    x = storage.encode(random.standard_normal(case.x))
    weight = storage.encode(random.standard_normal((case.out_channels, case.x[1], *case.kernel)))
    exact_x, exact_weight = storage.decode(x), storage.decode(weight)
    expected = convolve(exact_x, exact_weight, case.stride, case.padding)
    scale = convolve(abs(exact_x), abs(exact_weight), case.stride, case.padding)
    bias = random.standard_normal(case.out_channels).astype(np.float32) if case.bias else None
    if case.bias:
        expected += bias.reshape(-1, 1, 1, 1)
        scale += abs(bias.reshape(-1, 1, 1, 1))
    before, after = (case.slice[0], case.slice[1]) if case.slice else (0, 0)
    residual = None
    if case.residual:
        residual, _ = channels_last(expected.shape, storage.dtype, before, after)
        residual[:] = storage.encode(random.standard_normal(expected.shape))
        expected += storage.decode(residual)
        scale += abs(storage.decode(residual))
    expected = np.maximum(expected, 0) if case.relu else expected
    y, memory = channels_last(expected.shape, storage.dtype, before, after, fill=77)

    kernel_weight = lay_out(weight, "channels_last")
    arguments = (lay_out(x, case.layout), kernel_weight, bias, residual, y, case.stride, case.padding, case.relu)
    module.conv3d_bn_relu(math, case.tile, *arguments, multiprocessors, case.splits)

    around = [memory[..., :before], memory[..., before + case.out_channels :]]
    if any((part != 77).any() for part in around):
        return np.inf
    terms = exact_weight[0].size + 2
    lost = {"tf32": 2.0**-10, "float32": 2.0**-21}.get(math, 0.0)
    bound = scale * (terms * 2.0**-24 + lost) + abs(expected) * storage.unit_roundoff
    error = abs(storage.decode(y) - expected)
    return np.inf if np.isnan(error).any() else float((error / bound).max())


if __name__ == "__main__":
    sys.exit(harness.main(run, CASES, *sys.argv[1:]))
