"""The CUDA source of conv3d_statistics, run on a CPU: values, sanitizers, and mutants that must be seen."""

import conv3d_statistics_cases
import harness
import numpy as np
import pytest
import toolchain
from batch_norm_cases import EPS
from conv3d_cases import MATHS, channels_last
from conv3d_statistics_cases import CASES, Case
from harness import Mutant

MUTANTS = {
    "no_barrier_before_the_merge": Mutant("    __syncthreads();  // all warps have", "    //", "thread", "tile_128x64"),
    "moments_lie_on_the_sums": Mutant("(shared + Tile::kSlabBytes)", "(shared)", "plain", "tile_128x64"),
    "moments_of_channels_that_there_are_not": Mutant(
        "Tile::kChannels || channel >= channels", "Tile::kChannels", "address", "odd_out_channels"
    ),
    "rows_beyond_the_last_pixel_count": Mutant(
        "left < 0 ? 0 : left < kRows ? left : kRows", "kRows", "plain", "one_pixel_beyond_a_tile"
    ),
    "a_warp_without_rows_counts": Mutant("if (rows == 0) break;", "", "plain", "one_output"),
    "sums_that_are_not_rounded": Mutant("to_float(from_float<Element>(sum[", "((sum[", "plain", "tile_128x64"),
    "eps_is_left_out": Mutant("sqrtf(biased + eps)", "sqrtf(biased)", "plain", "tile_128x64"),
    "a_lane_is_left_out": Mutant("lanes = 4; lanes < 32", "lanes = 8; lanes < 32", "plain", "tile_128x64"),
    "a_warp_is_left_out": Mutant("int first = Tile::", "int first = 2 * Tile::", "plain", "tile_128x64"),
}
KERNEL = harness.Kernel(
    "conv3d_statistics",
    conv3d_statistics_cases,
    MUTANTS,
    files=("conv3d_tile.cuh", "conv3d_moments.cuh", "batch_norm_merge.cuh"),
    reduced={"conv3d_statistics.cuh": [("Tile::kPixels == 128", "Tile::kPixels == 128 && Tile::kChannels == 64")]},
)


@pytest.mark.parametrize("math", MATHS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_error_is_what_rounding_explains(kernel, case, math):
    assert conv3d_statistics_cases.run(kernel, case, math) <= 1


@pytest.mark.parametrize("math", MATHS)
def test_outputs_are_those_of_conv3d_bn_relu(kernel, math):
    plain = toolchain.load(toolchain.build("conv3d_bn_relu"))
    for name in ("tile_128x128", "slow_res2_conv1_80_channels", "odd_channels", "fast_res3_1x3x3_stride_2"):
        case = CASES[name]
        x, weight, storage = conv3d_statistics_cases.make_operands(case, math)
        shape = conv3d_statistics_cases.output_shape(case)
        y, other = (channels_last(shape, storage.dtype)[0] for _ in range(2))
        of_channels = np.empty((3, case.out_channels), np.float32)
        geometry = (case.stride, case.padding)
        kernel.conv3d_statistics(math, case.tile, x, weight, y, *of_channels, *geometry, EPS, 4)
        plain.conv3d_bn_relu(math, case.tile, x, weight, None, None, other, *geometry, False, 4, 1)
        assert np.array_equal(y, other)


@pytest.mark.parametrize("seed", range(8))
def test_order_of_threads_does_not_matter(kernel, monkeypatch, seed):
    monkeypatch.setenv("SLOWFAST_EXT_EMULATOR_SEED", str(seed))
    for name in ("tile_128x128", "far_from_zero_128x32", "fast_res3_1x3x3_stride_2", "one_pixel_beyond_a_tile"):
        assert conv3d_statistics_cases.run(kernel, CASES[name], "bfloat16") <= 1


def test_statistics_of_equal_outputs_are_exact(kernel):
    case = Case((1, 8, 1, 13, 27), 16)
    x, weight, y = (
        channels_last(shape, np.float32, fill=1)[0]
        for shape in (case.x, (16, 8, 1, 1, 1), conv3d_statistics_cases.output_shape(case))
    )
    statistics = np.full((3, 16), np.nan, np.float32)
    kernel.conv3d_statistics("float32", "128x16", x, weight, y, *statistics, case.stride, case.padding, 0.25, 4)
    assert (statistics == [[8], [0], [2]]).all()


def test_what_is_not_finite_shows_in_its_channel_alone(kernel):
    case = CASES["tile_128x64"]
    x, weight, storage = conv3d_statistics_cases.make_operands(case, "float16")
    weight[3], weight[70] = np.nan, np.inf
    y, _ = channels_last(conv3d_statistics_cases.output_shape(case), storage.dtype)
    statistics = np.zeros((3, case.out_channels), np.float32)
    kernel.conv3d_statistics("float16", case.tile, x, weight, y, *statistics, case.stride, case.padding, EPS, 4)
    assert [np.flatnonzero(~np.isfinite(each)).tolist() for each in statistics] == [[3, 70]] * 3


@pytest.mark.parametrize(
    ("layer", "tile"),
    [
        ((802816, 8, 8, 3), "128x16"),  # fast res2, 3x1x1, 8 clips of 32 frames of 56 x 56
        ((802816, 8, 32, 1), "128x32"),
        ((100352, 80, 64, 1), "128x64"),  # slow res2, 4 frames
        ((100352, 64, 256, 1), "128x128"),
    ],
)
def test_tiles_suit_the_layer(kernel, layer, tile):
    assert kernel.plan(*layer, 132) == tile


@pytest.mark.parametrize("build", harness.SANITIZERS)
def test_sanitizer_finds_nothing(builds, build):
    builds.check_sanitizer_finds_nothing(build)


@pytest.mark.parametrize("build", MUTANTS)
def test_mutant_is_seen(builds, build):
    builds.check_mutant_is_seen(build)
