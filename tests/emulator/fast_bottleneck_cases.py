"""What fast_bottleneck is run on under the emulator, and how its result is judged; as a script, for harness.py."""

import sys
from dataclasses import dataclass

import harness
import numpy as np
from conv3d_cases import Storage, channels_last, convolve

DTYPES = ("bfloat16", "float16")
HOPPER, AMPERE = 232448, 166912  # bytes of shared memory that a thread block may have, compute capabilities 9.0, 8.0


@dataclass(frozen=True)
class Case:
    x: tuple  # N, C, T, H, W
    channels: int
    stride: int = 1
    x_slice: tuple = (0, 0)  # channels before and after those of x in its memory
    y_slice: tuple = (0, 0)
    frames_per_chunk: int | None = None  # of a thread block; None for all, 0 for what the kernel's host side chooses
    shared_memory: int = HOPPER

    @property
    def projection(self):
        return self.stride > 1 or self.x[1] != 4 * self.channels

    @property
    def y(self):
        n, _, t, h, w = self.x
        return n, 4 * self.channels, t, -(-h // self.stride), -(-w // self.stride)


CASES = {
    # The blocks of the Fast pathway of every row of the zoo, each over one tile and the beginnings of its neighbours.
    "res2_first": Case((1, 8, 5, 9, 18), 8),
    "res2": Case((1, 32, 4, 9, 18), 8),
    "res3_first": Case((1, 32, 3, 17, 18), 16, stride=2),
    "res3": Case((1, 64, 3, 9, 18), 16),
    "res4_first": Case((1, 64, 3, 17, 18), 32, stride=2),
    "res4": Case((1, 128, 3, 9, 18), 32),
    "res4_first_small_tile": Case((1, 64, 3, 9, 17), 32, stride=2, shared_memory=AMPERE),
    "res4_small_tile": Case((1, 128, 3, 9, 10), 32, shared_memory=AMPERE),
    # Time: no neighbour, one neighbour, chunks with frames of others on either side.
    "one_frame_first": Case((1, 8, 1, 5, 6), 8),
    "one_frame": Case((1, 64, 1, 5, 6), 16),
    "two_frames_stride_2": Case((1, 32, 2, 6, 5), 16, stride=2),
    "chunks_of_one_frame": Case((2, 32, 3, 4, 5), 8, frames_per_chunk=1),
    "chunks_of_two_and_one": Case((2, 32, 5, 4, 5), 8, frames_per_chunk=2),
    "chunks_of_what_is_chosen": Case((2, 32, 4, 9, 5), 8, frames_per_chunk=0),
    "chunks_stride_2": Case((2, 32, 5, 7, 8), 16, stride=2, frames_per_chunk=3),
    "three_clips": Case((3, 64, 2, 3, 3), 16),
    # Sizes: smaller than a fragment, one tile exactly, odd and even under stride 2.
    "one_pixel": Case((1, 32, 2, 1, 1), 8),
    "one_pixel_stride_2": Case((1, 32, 2, 1, 1), 16, stride=2),
    "one_column": Case((1, 64, 2, 17, 1), 16),
    "one_tile": Case((1, 32, 2, 8, 16), 8),
    "one_tile_stride_2": Case((1, 32, 2, 16, 16), 16, stride=2),
    "two_pixels_stride_2": Case((1, 64, 2, 2, 3), 32, stride=2),
    # Layouts: slices, where 16 bytes at once can be stored and where not.
    "slices": Case((1, 32, 4, 5, 6), 8, x_slice=(8, 16), y_slice=(16, 8)),
    "slices_stride_2": Case((1, 32, 3, 5, 6), 16, stride=2, x_slice=(8, 0), y_slice=(8, 0)),
    "odd_slice": Case((2, 32, 2, 5, 6), 8, y_slice=(3, 4)),
}


def random_values(case, whole, random):
    """x, and weight and bias of a, b, c and the shortcut.

    With ``whole`` all are small whole numbers and most weights zero, so that every sum is a whole number below 256,
    which no rounding changes: the kernel must find exactly this.
    """
    in_channels, channels = case.x[1], case.channels
    shapes = [(channels, in_channels, 3, 1, 1), (channels, channels, 1, 3, 3), (4 * channels, channels, 1, 1, 1)]
    shapes += [(4 * channels, in_channels, 1, 1, 1)] if case.projection else []
    layers = []
    for shape in shapes:
        terms = np.prod(shape[1:])
        if whole:
            weight = random.integers(-1, 2, shape) * (random.random(shape) < 3 / terms)
            layers.append((weight.astype(np.float64), random.integers(-2, 3, shape[0]).astype(np.float32)))
        else:
            weight = random.standard_normal(shape) / np.sqrt(terms)
            layers.append((weight, random.standard_normal(shape[0]).astype(np.float32) / 2))
    x = random.integers(-3, 4, case.x).astype(np.float64) if whole else random.standard_normal(case.x)
    return x, layers


class Value:
    """A tensor as it is in exact arithmetic, and a bound on the error of the one that was computed.

    A sum of n terms with absolute values that add up to s is off by at most n * 2^-24 * s in float32 (Higham, Accuracy
    and Stability, 3.1); an error of an operand enters s too, and the result through the absolute values of the weights.
    A stored number is off by the unit roundoff times itself.
    """

    def __init__(self, exact, error):
        self.exact, self.error = exact, error

    @classmethod
    def sum(cls, products, added=()):
        """Of convolutions (x, weight, bias, stride, padding) and of exact tensors."""
        exact, magnitude, error, terms = 0, 0, 0, len(added)
        for x, weight, bias, stride, padding in products:
            bias = bias.astype(np.float64).reshape(-1, 1, 1, 1)
            exact = exact + convolve(x.exact, weight, stride, padding) + bias
            error = error + convolve(x.error, abs(weight), stride, padding)
            magnitude = magnitude + convolve(abs(x.exact) + x.error, abs(weight), stride, padding) + abs(bias)
            terms += weight[0].size + 1
        for tensor in added:
            exact, magnitude = exact + tensor.exact, magnitude + abs(tensor.exact)
        return cls(exact, error + terms * 2.0**-24 * magnitude)

    def stored(self, unit_roundoff):
        """After ReLU and rounding."""
        exact = np.maximum(self.exact, 0)
        return Value(exact, self.error + unit_roundoff * (exact + self.error))


def expected(case, x, layers, unit_roundoff):
    unit, stride = (1, 1, 1), (1, case.stride, case.stride)
    a = Value.sum([(x, *layers[0], unit, (1, 0, 0))]).stored(unit_roundoff)
    b = Value.sum([(a, *layers[1], stride, (0, 1, 1))]).stored(unit_roundoff)
    last = [(b, *layers[2], unit, (0, 0, 0))]
    if not case.projection:
        return Value.sum(last, [x]).stored(unit_roundoff)
    return Value.sum([*last, (x, *layers[3], stride, (0, 0, 0))]).stored(unit_roundoff)


def run(module, case, dtype, *, whole=False, seed=0, multiprocessors=4):
    """The largest error of a case in units of the bound of :class:`Value`, or with ``whole`` in units of 1."""
    random = np.random.default_rng(seed)
    storage = Storage(dtype)
    values, layers = random_values(case, whole, random)
    x, _ = channels_last(case.x, storage.dtype, *case.x_slice)
    x[:] = storage.encode(values)
    encoded = []
    for weight, _ in layers:
        view, _ = channels_last(weight.shape, storage.dtype)
        view[:] = storage.encode(weight)
        encoded.append(view)
    exact = [(storage.decode(weight), bias) for weight, (_, bias) in zip(encoded, layers, strict=True)]
    reference = expected(case, Value(storage.decode(x), np.zeros(case.x)), exact, storage.unit_roundoff)
    before, after = case.y_slice
    y, memory = channels_last(case.y, storage.dtype, before, after, fill=77)

    arguments = [array for weight, (_, bias) in zip(encoded, layers, strict=True) for array in (weight, bias)]
    arguments += [] if case.projection else [None, None]
    frames_per_chunk = case.x[2] if case.frames_per_chunk is None else case.frames_per_chunk
    how = (case.stride, frames_per_chunk, multiprocessors, case.shared_memory)
    module.fast_bottleneck(dtype, x, *arguments, y, *how)

    around = [memory[..., :before], memory[..., before + 4 * case.channels :]]
    if any((part != 77).any() for part in around):
        return np.inf
    error = abs(storage.decode(y) - reference.exact)
    if whole:
        assert reference.exact.max() < 256
        assert len(np.unique(reference.exact)) > 3
        return np.inf if np.isnan(error).any() else float(error.max())
    return np.inf if np.isnan(error).any() else float((error / reference.error).max())


def run_both(module, case):
    """The larger error: of random values, or infinity if whole numbers are not exact."""
    exact = run(module, case, "bfloat16", whole=True) == 0
    return run(module, case, "bfloat16") if exact else np.inf


if __name__ == "__main__":
    sys.exit(harness.main(run_both, CASES, *sys.argv[1:]))
