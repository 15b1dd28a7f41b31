"""What conv3d_bn_relu_pair is run on under the emulator, and how its results are judged.

NumPy only, so that it runs under a sanitizer: ``python conv3d_pair_cases.py LIBRARY [SUBSTRING]`` runs the bfloat16
cases whose names contain SUBSTRING and prints error and bank conflicts of each.
"""

import sys
from dataclasses import dataclass

import harness
import numpy as np
from conv3d_cases import TILES, Storage, channels_last, convolve, lay_out


@dataclass(frozen=True)
class Convolution:
    out_channels: int
    kernel: tuple = (1, 1, 1)
    stride: tuple = (1, 1, 1)
    padding: tuple = (0, 0, 0)
    bias: bool = True
    relu: bool = True
    slice: tuple = (0, 0)  # channels before and behind the result in its memory
    aligned: bool = True  # the weight, to 16 bytes


@dataclass(frozen=True)
class Case:
    x: tuple  # N, C, T, H, W
    first: Convolution
    second: Convolution
    layout: str = "channels_last"  # contiguous; channels, frames: every element of a larger array
    tile: str = "auto"
    splits: tuple = (0, 0)  # as the cost model says


def in_time(out_channels, **settings):
    return Convolution(out_channels, (3, 1, 1), padding=(1, 0, 0), **settings)


def shortcut(out_channels, stride=2, **settings):
    return Convolution(out_channels, stride=(1, stride, stride), **{"relu": False, **settings})


CASES = {
    # The first blocks of SlowFast's stages, at small spatial sizes.
    "slow_res2": Case((2, 80, 2, 9, 7), Convolution(64), shortcut(256, 1)),
    "slow_res3": Case((1, 320, 2, 8, 8), Convolution(128), shortcut(512)),
    "slow_res4": Case((1, 128, 4, 7, 5), in_time(64), shortcut(256)),
    "fast_res2": Case((1, 8, 8, 7, 7), in_time(8), shortcut(32, 1)),
    "fast_res3": Case((2, 32, 5, 9, 10), in_time(16), shortcut(64)),
    "fast_res4": Case((1, 64, 6, 7, 7), in_time(32), shortcut(128)),
    "basic_block": Case((1, 16, 3, 9, 9), Convolution(24, (1, 3, 3), (1, 2, 2), (0, 1, 1)), shortcut(24)),
    # What a network does not have, but a user may.
    "all_ones": Case((1, 1, 1, 1, 1), Convolution(1), Convolution(1)),
    "odd_channels": Case((1, 5, 3, 9, 11), Convolution(7, (3, 3, 3), (2, 2, 1), (1, 1, 1)), shortcut(33)),
    "odd_slices": Case((1, 16, 2, 7, 5), in_time(12, slice=(3, 4)), shortcut(20, slice=(8, 3))),
    "slices": Case((1, 32, 2, 9, 9), in_time(16, slice=(16, 8)), shortcut(64, slice=(0, 32))),
    "second_larger": Case((1, 12, 3, 9, 9), Convolution(4, (2, 2, 4), (1, 3, 2)), Convolution(136)),
    "second_with_padding_alone": Case((1, 8, 2, 3, 3), Convolution(8), Convolution(8, padding=(2, 1, 3))),
    "no_epilogue": Case((1, 32, 2, 6, 6), Convolution(64, bias=False, relu=False), shortcut(64, bias=False)),
    "relu_of_the_second_alone": Case((1, 32, 2, 6, 6), in_time(64, relu=False), shortcut(64, relu=True)),
    "second_weight_unaligned": Case((1, 16, 2, 7, 7), in_time(16), shortcut(32, aligned=False)),
    "first_weight_unaligned": Case((1, 16, 2, 7, 7), in_time(16, aligned=False), shortcut(32)),
    "contiguous": Case((1, 5, 4, 7, 6), in_time(16), shortcut(40), layout="contiguous"),
    "frames": Case((2, 16, 3, 7, 6), in_time(16), shortcut(40), layout="frames"),
    "unaligned_channels_of_a_wider_tensor": Case((1, 16, 2, 7, 7), in_time(16), shortcut(64), layout="channels"),
}
for _splits in ((1, 2), (2, 1), (4, 3), (7, 16)):
    CASES[f"splits_{_splits[0]}_{_splits[1]}"] = Case(
        (1, 136, 3, 9, 7), in_time(44, slice=(4, 12)), shortcut(72), splits=_splits
    )
CASES["splits_gathered"] = Case((1, 21, 3, 7, 7), in_time(20), shortcut(24), splits=(2, 3))
for _tile in TILES:
    CASES[f"tile_{_tile}"] = Case((1, 48, 2, 13, 11), in_time(136), shortcut(200), tile=_tile)


class Problem:
    """One convolution of a case: what it is given, and what is expected of it."""

    def __init__(self, convolution, x, storage, random):
        self.convolution, self.storage = convolution, storage
        weight = storage.encode(random.standard_normal((convolution.out_channels, x.shape[1], *convolution.kernel)))
        self.bias = random.standard_normal(convolution.out_channels).astype(np.float32) if convolution.bias else None
        exact_x, exact_weight = storage.decode(x), storage.decode(weight)
        geometry = convolution.stride, convolution.padding
        self.expected = convolve(exact_x, exact_weight, *geometry)
        self.scale = convolve(abs(exact_x), abs(exact_weight), *geometry)
        if convolution.bias:
            self.expected += self.bias.reshape(-1, 1, 1, 1)
            self.scale += abs(self.bias.reshape(-1, 1, 1, 1))
        self.expected = np.maximum(self.expected, 0) if convolution.relu else self.expected
        self.terms = exact_weight[0].size + 1
        self.y, self.memory = channels_last(self.expected.shape, storage.dtype, *convolution.slice, fill=77)
        self.weight = lay_out(weight, "channels_last")
        if not convolution.aligned:
            moved = np.zeros(weight.size + 1, storage.dtype)[1:].reshape(weight.transpose(0, 2, 3, 4, 1).shape)
            moved[:] = weight.transpose(0, 2, 3, 4, 1)
            self.weight = moved.transpose(0, 4, 1, 2, 3)

    @property
    def arguments(self):
        convolution = self.convolution
        return self.weight, self.bias, self.y, convolution.stride, convolution.padding, convolution.relu

    def error(self, lost):
        before = self.convolution.slice[0]
        around = self.memory[..., :before], self.memory[..., before + self.convolution.out_channels :]
        if any((part != 77).any() for part in around):
            return np.inf
        bound = self.scale * (self.terms * 2.0**-24 + lost) + abs(self.expected) * self.storage.unit_roundoff
        error = abs(self.storage.decode(self.y) - self.expected)
        # Where only padding is seen and there is no bias, the bound is 0.
        return np.inf if np.isnan(error).any() else float((error / np.maximum(bound, 1e-30)).max())


def run(module, case, math="bfloat16", seed=0, multiprocessors=4):
    """The largest error of both results in units of what rounding can explain: the bound of conv3d_cases.run."""
    random = np.random.default_rng(seed)
    storage = Storage(math)
    x = storage.encode(random.standard_normal(case.x))
    first, second = (Problem(convolution, x, storage, random) for convolution in (case.first, case.second))
    problems = first.arguments, second.arguments
    module.conv3d_bn_relu_pair(
        math, case.tile, lay_out(x, case.layout), *problems[0], *problems[1], multiprocessors, case.splits
    )
    lost = {"tf32": 2.0**-10, "float32": 2.0**-21}.get(math, 0.0)
    return max(first.error(lost), second.error(lost))


if __name__ == "__main__":
    sys.exit(harness.main(run, CASES, *sys.argv[1:]))
