"""What conv3d_statistics is run on under the emulator, and how its results are judged; as a script, for harness.py."""

import sys
from dataclasses import dataclass

import conv3d_cases
import harness
import numpy as np
from batch_norm_cases import EPS, Errors, add_statistics_errors

TILES = ("128x128", "128x64", "128x32", "128x16")


@dataclass(frozen=True)
class Case(conv3d_cases.Case):
    """Of a convolution without bias, residual and ReLU.

    Attributes:
        mean (float): of the outputs, in their standard deviations.
    """

    bias: bool = False
    relu: bool = False
    mean: float = 0.0


CASES = {
    # The layers of SlowFast, at small spatial sizes.
    "slow_res2_conv1_80_channels": Case((1, 80, 2, 9, 7), 64),
    "slow_res2_conv3": Case((1, 64, 2, 9, 8), 256),
    "slow_res3_1x3x3_stride_2": Case((1, 64, 2, 11, 13), 128, (1, 3, 3), (1, 2, 2)),
    "slow_res3_shortcut_stride_2": Case((1, 64, 2, 9, 9), 128, stride=(1, 2, 2)),
    "fast_res2_3x1x1": Case((2, 8, 8, 7, 7), 8, (3, 1, 1)),
    "fast_res2_conv3": Case((2, 8, 4, 9, 9), 32),
    "fast_res3_1x3x3_stride_2": Case((2, 16, 3, 9, 9), 16, (1, 3, 3), (1, 2, 2)),
    "fast_stem_5x7x7": Case((1, 3, 5, 13, 15), 8, (5, 7, 7), (1, 2, 2)),
    "slow_stem_strided_frames": Case((1, 3, 2, 17, 15), 64, (1, 7, 7), (1, 2, 2), layout="frames"),
    # What a network does not have, but a user may.
    "one_frame_3x3x3": Case((2, 16, 1, 5, 6), 24, (3, 3, 3)),
    "one_output": Case((1, 1, 1, 1, 1), 1),
    "one_pixel_beyond_a_tile": Case((1, 8, 1, 3, 43), 12),
    "odd_channels": Case((1, 5, 3, 7, 5), 7, (3, 3, 3), (2, 2, 1)),
    "odd_out_channels": Case((1, 24, 2, 7, 7), 33),
    "even_kernel_no_padding": Case((1, 16, 4, 6, 7), 40, (2, 2, 4), (1, 3, 2), (0, 0, 0)),
    "several_blocks_each_way": Case((2, 32, 3, 9, 11), 200),
}
for _tile in TILES:
    CASES[f"tile_{_tile}"] = Case((1, 48, 1, 11, 21), 72, (1, 3, 3), tile=_tile)
    CASES[f"far_from_zero_{_tile}"] = Case((1, 16, 1, 11, 21), 24, mean=1000.0, tile=_tile)


def make_operands(case, math, seed=0):
    """x and weight as the kernel takes them, and the storage of ``math``."""
    random = np.random.default_rng(seed)
    storage = conv3d_cases.Storage(math)
    x = random.standard_normal(case.x)
    weight = random.standard_normal((case.out_channels, case.x[1], *case.kernel))
    if case.mean:
        x[:, 0] = 1
        weight[:, 0] = case.mean * np.sqrt(weight[0].size)
    x, weight = conv3d_cases.lay_out(storage.encode(x), case.layout), storage.encode(weight)
    return x, conv3d_cases.lay_out(weight, "channels_last"), storage


def output_shape(case):
    sizes = zip(case.x[2:], case.kernel, case.stride, case.padding, strict=True)
    return case.x[0], case.out_channels, *((n + 2 * pad - kernel) // step + 1 for n, kernel, step, pad in sizes)


def run(module, case, math="bfloat16", seed=0, multiprocessors=4):
    """The largest error of a case in units of what rounding can explain, so that more than 1 is a mistake.

    That of y is bounded as in conv3d_cases.run. The statistics are compared with those of y as it was stored; that 8
    rows are added one after the other, then those of lanes and warps in at most 6 steps, is within the depth of
    batch_norm_cases.
    """
    x, weight, storage = make_operands(case, math, seed)
    exact_x, exact_weight = storage.decode(x), storage.decode(weight)
    expected = conv3d_cases.convolve(exact_x, exact_weight, case.stride, case.padding)
    scale = conv3d_cases.convolve(abs(exact_x), abs(exact_weight), case.stride, case.padding)
    y, _ = conv3d_cases.channels_last(output_shape(case), storage.dtype, fill=77)
    statistics = np.full((3, 1, case.out_channels), np.nan, np.float32)
    geometry = (case.stride, case.padding)
    module.conv3d_statistics(math, case.tile, x, weight, y, *statistics, *geometry, EPS, multiprocessors)

    lost = {"tf32": 2.0**-10, "float32": 2.0**-21}.get(math, 0.0)
    bound = scale * (exact_weight[0].size * 2.0**-24 + lost) + abs(expected) * storage.unit_roundoff
    outputs = storage.decode(y)
    errors = Errors()
    errors.add(outputs, expected, bound)
    rows = outputs.transpose(0, 2, 3, 4, 1).reshape(1, -1, case.out_channels)
    add_statistics_errors(errors, *statistics, rows)
    return errors.worst


if __name__ == "__main__":
    sys.exit(harness.main(run, CASES, *sys.argv[1:]))
