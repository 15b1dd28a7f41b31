"""The CUDA source of conv3d_bn_relu, run on a CPU: values, sanitizers, and mutants that must be seen."""

import conv3d_cases
import harness
import pytest
from conv3d_cases import CASES, MATHS
from harness import Mutant

MUTANTS = {
    "no_barrier": Mutant("    __syncthreads();", "", "thread", "tile_64x64"),
    "no_barrier_values": Mutant("    __syncthreads();", "", "random", "tile_64x64"),
    "no_barrier_before_the_sums": Mutant(
        "__syncthreads();  // all have read", "// all have read", "thread", "tile_64x64"
    ),
    "no_barrier_of_a_warp": Mutant("    __syncwarp();\n#pragma unroll", "#pragma unroll", "thread", "tile_64x64"),
    "splits_overlap": Mutant("const int first_step = ", "const int first_step = 0 * ", "plain", "splits_2"),
    "a_split_is_forgotten": Mutant("split < p.splits; ++split", "split < p.splits - 1; ++split", "plain", "splits_2"),
    "wait_for_one_stage_less": Mutant("kStages - 2>()", "kStages - 1>()", "plain", "tile_64x64"),
    "x_is_read_beyond_the_last_pixel": Mutant("if (pixel >= p.pixels) {", "if (false) {", "address", "odd_slice"),
    "y_is_written_beyond_the_last_pixel": Mutant("pixel >= p.pixels || channel", "channel", "address", "no_epilogue"),
    "weight_is_read_beyond_the_last_channel": Mutant(
        "source, channel < p_.out_channels && w",
        "source, w",
        "address",
        "odd_out_channels",
    ),
    "padding_is_not_zero": Mutant("static_cast<unsigned>(w + at.kernel_w)", "0u", "plain", "fast_res2_1x3x3"),
    "swizzle_differs": Mutant(
        "warp_pixel + i * 16 + lane % 16, chunk",
        "warp_pixel + i * 16 + lane % 16, 2 - chunk",
        "plain",
        "tile",
    ),
    "no_swizzle": Mutant("chunk ^ (row / 2 % Tile::kRowChunks)", "chunk", "conflicts", "tile_64x64"),
    "wrong_lane_of_weight": Mutant("chunk + lane / 8 % 2)", "chunk + lane / 16)", "plain", "tile_64x64"),
    "residual_is_forgotten": Mutant("if (!kBare && p.residual) {", "if (false) {", "plain", "slow_res2_conv3_residual"),
    "relu_of_one_channel_is_forgotten": Mutant(
        "if (!kBare && p.relu) sum", "if (p.relu && i) sum", "plain", "fast_res2_1x3x3"
    ),
}
KERNEL = harness.Kernel("conv3d_bn_relu", conv3d_cases, MUTANTS, files=("conv3d_tile.cuh",))


@pytest.mark.parametrize("math", MATHS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_error_is_what_rounding_explains(kernel, case, math):
    assert conv3d_cases.run(kernel, case, math) <= 1


@pytest.mark.parametrize("seed", range(8))
def test_order_of_threads_does_not_matter(kernel, monkeypatch, seed):
    monkeypatch.setenv("SLOWFAST_EXT_EMULATOR_SEED", str(seed))
    for name in ("tile_128x128", "slow_res4_3x1x1", "fast_stem_5x7x7", "lateral_7x1x1_stride_4_into_concat"):
        assert conv3d_cases.run(kernel, CASES[name], "bfloat16") <= 1


@pytest.mark.parametrize("tile", conv3d_cases.TILES)
@pytest.mark.parametrize("math", MATHS)
def test_ldmatrix_meets_no_bank_conflict(kernel, math, tile):
    conv3d_cases.run(kernel, CASES[f"tile_{tile}"], math)
    ldmatrix, bank_conflicts = kernel.statistics()
    assert ldmatrix > 0
    assert bank_conflicts == 0


@pytest.mark.parametrize(
    ("layer", "clips", "tile", "splits"),
    [
        ((131072, 8, 8, 9), 1, "128x16", 1),  # fast res2, 1x3x3
        ((131072, 8, 32, 1), 30, "128x32", 1),  # fast res2, 1x1x1
        ((16384, 80, 64, 1), 30, "128x64", 1),  # slow res2, 1x1x1
        ((16384, 64, 256, 1), 30, "128x128", 1),
        ((1024, 256, 256, 9), 30, "128x128", 1),  # slow res4, 1x3x3
        ((1024, 256, 256, 9), 1, "128x128", 8),  # 16 tiles for 132 multiprocessors
        ((256, 512, 512, 9), 1, "128x128", 16),
    ],
)
def test_tiles_suit_the_layer_and_splits_fill_the_gpu(kernel, layer, clips, tile, splits):
    pixels, in_channels, out_channels, taps = layer
    assert kernel.plan(pixels * clips, in_channels, out_channels, taps, 132) == (tile, splits)


@pytest.mark.parametrize("build", harness.SANITIZERS)
def test_sanitizer_finds_nothing(builds, build):
    builds.check_sanitizer_finds_nothing(build)


@pytest.mark.parametrize("build", MUTANTS)
def test_mutant_is_seen(builds, build):
    builds.check_mutant_is_seen(build)
