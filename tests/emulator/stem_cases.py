"""What stem is run on under the emulator, and how its result is judged; as a script, for harness.py."""

import sys
from dataclasses import dataclass

import harness
import numpy as np
from conv3d_cases import Storage, channels_last, convolve, lay_out

MATHS = ("bfloat16", "float16", "float32")
# Pixels of 8 bits become numbers that float32 holds exactly, so that each is rounded once to the type of the products.
SCALE = np.array([2**-6, 2**-5, 3 * 2**-7], np.float32)
SHIFT = np.array([-2, -4.5, -3], np.float32)


@dataclass(frozen=True)
class Case:
    x: tuple  # N, T, H, W
    channels: int = 8
    kernel_t: int = 1
    layout: str = "bytes"  # bytes, planar_bytes: uint8; contiguous, channels_last, frames: floating point
    frames: tuple | None = None
    index: type = np.int64
    bias: bool = True
    slice: tuple | None = None  # y is channels from slice[0] on of slice[1] more
    chunk: int = 0
    nan: tuple | None = None  # n, c, t, h, w

    @property
    def raw(self):
        return self.layout.endswith("bytes")


CASES = {
    # The stems of SlowFast, at small spatial sizes.
    "slow_bytes": Case((1, 2, 33, 31), 64),
    "slow_strided_frames": Case((1, 9, 19, 17), 64, frames=(0, 8)),
    "slow_linspace_frames": Case((2, 7, 19, 17), 64, frames=(0, 2, 4, 6), index=np.int32),
    "slow_contiguous": Case((1, 2, 19, 17), 64, layout="contiguous"),
    "slow_channels_last_frames": Case((1, 6, 21, 20), 64, layout="channels_last", frames=(5, 1)),
    "slow_into_concat": Case((1, 1, 17, 15), 64, slice=(0, 16)),
    "fast_bytes": Case((1, 6, 33, 31), 8, 5),
    "fast_batch": Case((2, 5, 19, 17), 8, 5),
    "fast_planar_bytes": Case((1, 3, 15, 16), 8, 5, layout="planar_bytes"),
    "fast_contiguous": Case((1, 4, 19, 17), 8, 5, layout="contiguous"),
    "fast_channels_last": Case((1, 3, 16, 13), 8, 5, layout="channels_last"),
    "fast_every_third_frame": Case((1, 3, 13, 11), 8, 5, layout="frames"),
    "fast_in_chunks": Case((1, 7, 15, 13), 8, 5, chunk=3),
    "fast_picks_frames": Case((1, 9, 13, 15), 8, 5, frames=(8, 0, 4, 4)),
    # What a network does not have, but a user may.
    "one_frame": Case((1, 1, 9, 10), 8, 5),
    "one_pixel": Case((1, 1, 1, 1), 8, bias=False),
    "fast_more_frames_than_a_chunk_sees": Case((1, 2, 9, 9), 8, 5, chunk=1),
    "several_tiles": Case((2, 1, 41, 75), 8),
    "several_tiles_exactly_full": Case((1, 1, 64, 64), 8, 5),
    "channels_tail": Case((1, 2, 11, 13), 40, slice=(0, 24)),
    "wide_fast": Case((1, 2, 9, 11), 24, 5),
    "slow_chunks": Case((1, 5, 9, 11), 16, chunk=2),
    "slice_of_unaligned_channels": Case((1, 2, 19, 17), 16, slice=(3, 2)),
    "nan_spreads_over_its_windows_only": Case((1, 5, 25, 27), 8, 5, layout="channels_last", nan=(0, 2, 3, 12, 14)),
    "nan_in_slow": Case((1, 1, 25, 27), 64, layout="contiguous", nan=(0, 0, 0, 11, 14)),
    "frame_outside_is_nan": Case((1, 3, 9, 9), 8, 5, frames=(0, 1, 2, 0, 1, 3), index=np.int32),
    "negative_frame_is_nan": Case((1, 3, 9, 9), 8, frames=(0, -1, 2)),
}


def pool(values):
    """Maxima of 3 x 3 with stride 2 and padding 1."""
    padded = np.pad(values, [(0, 0)] * 3 + [(1, 1)] * 2, constant_values=-np.inf)
    height, width = ((size - 1) // 2 + 1 for size in values.shape[3:])
    largest = np.full((*values.shape[:3], height, width), -np.inf)
    for i in range(9):
        y, x = divmod(i, 3)
        largest = np.maximum(largest, padded[..., y : y + 2 * height - 1 : 2, x : x + 2 * width - 1 : 2])
    return largest


def make_pixels(case, storage, random):
    """The array for the kernel, and what it should make of it: (N, 3, T, H, W) in float64."""
    n, t, h, w = case.x
    if case.raw:
        memory = random.integers(
            0, 256, (n, 3, t, h, w) if case.layout == "planar_bytes" else (n, t, h, w, 3), np.uint8
        )
        x = memory.transpose(0, 2, 3, 4, 1) if case.layout == "planar_bytes" else memory
        return x, storage.decode(
            storage.encode(x.transpose(0, 4, 1, 2, 3) * SCALE.reshape(3, 1, 1, 1) + SHIFT.reshape(3, 1, 1, 1))
        )
    values = storage.encode(random.standard_normal((n, 3, t, h, w)))
    if case.nan:
        values[case.nan] = storage.encode(np.full(1, np.nan))[0]
    return lay_out(values, case.layout), storage.decode(values)


def run(module, case, math="bfloat16", seed=0, multiprocessors=4):
    """The largest error of a case in units of what rounding can explain, so that more than 1 is a mistake.

    Before the pooling as conv3d_cases.run() has it; a maximum is off by no more than the largest error in its window.
    """
    random = np.random.default_rng(seed)
    storage = Storage(math)
    x, pixels = make_pixels(case, storage, random)
    if case.frames is not None:
        inside = [0 <= frame < case.x[1] for frame in case.frames]
        pixels = np.stack(
            [
                pixels[:, :, i] if ok else np.full_like(pixels[:, :, 0], np.nan)
                for i, ok in zip(case.frames, inside, strict=True)
            ],
            2,
        )
    weight = storage.encode(random.standard_normal((case.channels, 3, case.kernel_t, 7, 7)))
    exact = storage.decode(weight)
    layer = ((1, 2, 2), (case.kernel_t // 2, 3, 3))
    expected, scale = convolve(pixels, exact, *layer), convolve(abs(pixels), abs(exact), *layer)
    bias = random.standard_normal(case.channels).astype(np.float32) if case.bias else None
    if case.bias:
        expected += bias.reshape(-1, 1, 1, 1)
        scale += abs(bias.reshape(-1, 1, 1, 1))
    expected = np.maximum(expected, 0)
    lost = 2.0**-21 if math == "float32" else 0.0
    bound = pool(scale * ((exact[0].size + 1) * 2.0**-24 + lost) + expected * storage.unit_roundoff)
    expected = pool(expected)

    before, after = case.slice or (0, 0)
    y, memory = channels_last(expected.shape, storage.dtype, before, after, fill=77)
    frames = None if case.frames is None else np.array(case.frames, case.index)
    normalisation = (SCALE, SHIFT) if case.raw else (None, None)
    module.stem(math, x, lay_out(weight, "channels_last"), bias, frames, *normalisation, y, case.chunk, multiprocessors)

    around = [memory[..., :before], memory[..., before + case.channels :]]
    y = storage.decode(y)
    if any((part != 77).any() for part in around) or (np.isnan(y) != np.isnan(expected)).any():
        return np.inf
    valid = ~np.isnan(expected)
    return float((abs(y - expected)[valid] / bound[valid]).max(initial=0))


if __name__ == "__main__":
    sys.exit(harness.main(run, CASES, *sys.argv[1:]))
