"""What lateral_fuse is run on under the emulator, and how its result is judged; as a script, for harness.py."""

import sys
from dataclasses import dataclass

import harness
import numpy as np
from conv3d_cases import Storage, channels_last, convolve, lay_out

HOPPER, AMPERE = 227 << 10, 99 << 10  # bytes of shared memory a block may ask for: 9.0, and the least from 8.0 on


@dataclass(frozen=True)
class Case:
    fast: tuple  # N, C, T, H, W
    slow_channels: int | None  # None: slow is not copied
    out_channels: int
    kernel: int
    stride: int
    bias: bool = True
    relu: bool = True
    extra: tuple = (0, 0, 0)  # channels of the result before and behind [slow, lateral], and around those of the inputs
    shared: int = HOPPER
    multiprocessors: int = 2  # few, so that a block has several tiles


CASES = {
    # The laterals of the zoo, at small spatial sizes: 4x16 and 8x8 in mmaction2, and with PySlowFast's norm.
    "res1_5_taps_stride_8": Case((2, 8, 32, 11, 13), 64, 16, 5, 8, bias=False, relu=False),
    "res1_7_taps_stride_4": Case((1, 8, 32, 12, 12), 64, 16, 7, 4, multiprocessors=1),
    "res2_5_taps_stride_8": Case((1, 32, 32, 12, 11), 256, 64, 5, 8, bias=False, relu=False),
    "res2_7_taps_stride_4": Case((2, 32, 16, 7, 7), 256, 64, 7, 4),
    "res3_5_taps_stride_8": Case((2, 64, 16, 5, 5), 512, 128, 5, 8, bias=False, relu=False),
    "res3_7_taps_stride_4": Case((1, 64, 16, 5, 5), 512, 128, 7, 4),
    "res3_7_taps_stride_4_ampere": Case((1, 64, 16, 5, 5), 512, 128, 7, 4, shared=AMPERE),
    "res4_5_taps_stride_8": Case((1, 128, 16, 4, 4), 1024, 256, 5, 8, bias=False, relu=False),
    "res4_7_taps_stride_4_ampere": Case((1, 128, 8, 4, 4), 1024, 256, 7, 4, shared=AMPERE),
    "lateral_alone": Case((2, 32, 16, 7, 7), None, 64, 7, 4, extra=(256, 0, 0)),
    # What a network does not have, but a user may.
    "frames_left_over": Case((1, 16, 11, 12, 12), 24, 32, 5, 4),
    "shorter_than_the_kernel": Case((2, 8, 2, 3, 3), 8, 16, 7, 4),
    "one_tap_stride_1": Case((1, 8, 3, 3, 3), 8, 8, 1, 1),
    "slices_of_wider_tensors": Case((1, 16, 8, 5, 5), 16, 24, 3, 2, extra=(8, 16, 8)),
    "unaligned_slices": Case((1, 16, 8, 5, 5), 16, 20, 3, 2, extra=(3, 2, 3)),
    "odd_channels": Case((2, 5, 6, 3, 3), 7, 3, 3, 2),
    "odd_channels_many": Case((1, 37, 6, 12, 12), 33, 70, 3, 2),
    "a_few_channels_over_the_tile": Case((1, 8, 8, 5, 5), 8, 136, 5, 4),
    "more_blocks_than_tiles": Case((1, 8, 8, 3, 3), 8, 16, 5, 4, multiprocessors=132),
}


def run(module, case, math="bfloat16", seed=0):
    """The largest error of a case in units of what rounding can explain, so that more than 1 is a mistake.

    The bound of conv3d_cases.run. What is copied must be equal, and what lies around the result untouched.
    """
    random = np.random.default_rng(seed)
    storage = Storage(math)
    before, after, around = case.extra
    fast, _ = channels_last(case.fast, storage.dtype, around, around)
    fast[:] = storage.encode(random.standard_normal(case.fast))
    weight = storage.encode(random.standard_normal((case.out_channels, case.fast[1], case.kernel, 1, 1)))
    bias = random.standard_normal(case.out_channels).astype(np.float32) if case.bias else None
    geometry = (case.stride, 1, 1), (case.kernel // 2, 0, 0)
    exact_fast, exact_weight = storage.decode(fast), storage.decode(weight)
    expected = convolve(exact_fast, exact_weight, *geometry)
    scale = convolve(abs(exact_fast), abs(exact_weight), *geometry)
    if case.bias:
        expected += bias.reshape(-1, 1, 1, 1)
        scale += abs(bias.reshape(-1, 1, 1, 1))
    expected = np.maximum(expected, 0) if case.relu else expected

    slow_channels = case.slow_channels or 0
    shape = (expected.shape[0], slow_channels + case.out_channels, *expected.shape[2:])
    y, memory = channels_last(shape, storage.dtype, before, after, fill=77)
    slow = slow_y = None
    if slow_channels:
        slow, _ = channels_last((shape[0], slow_channels, *shape[2:]), storage.dtype, around, around)
        slow[:] = storage.encode(random.standard_normal(slow.shape))
        slow_y = y[:, :slow_channels]
    lateral = y[:, slow_channels:]
    arguments = (slow, fast, lay_out(weight, "channels_last"), bias, slow_y, lateral, case.stride, case.relu)
    module.lateral_fuse(math, *arguments, case.multiprocessors, case.shared)

    if any((part != 77).any() for part in (memory[..., :before], memory[..., before + shape[1] :])):
        return np.inf
    if slow_channels and not np.array_equal(slow, slow_y):
        return np.inf
    terms = exact_weight[0].size + 1
    lost = {"tf32": 2.0**-10, "float32": 2.0**-21}.get(math, 0.0)
    bound = scale * (terms * 2.0**-24 + lost) + abs(expected) * storage.unit_roundoff
    error = abs(storage.decode(lateral) - expected)
    return np.inf if np.isnan(error).any() else float((error / np.maximum(bound, 1e-30)).max())


if __name__ == "__main__":
    sys.exit(harness.main(run, CASES, *sys.argv[1:]))
