"""The CUDA source of fast_bottleneck, run on a CPU: values, sanitizers, and mutants that must be seen."""

import importlib

import fast_bottleneck_cases
import harness
import pytest
from fast_bottleneck_cases import AMPERE, CASES, DTYPES, HOPPER
from harness import Mutant

BLOCKS = ("res2_first", "res2", "res3_first", "res3", "res4_first", "res4", "res4_first_small_tile", "res4_small_tile")

FRAME_BARRIER = "      __syncthreads();  // frame t has landed"
A_BARRIER = "        __syncthreads();  // a is complete"
MUTANTS = {
    "no_barrier_before_the_biases_are_read": Mutant(
        "    fill_weights();\n    __syncthreads();",
        "    fill_weights();",
        "thread",
        "slices",
    ),
    "no_barrier_for_a_frame": Mutant(FRAME_BARRIER, "      //", "thread", "slices"),
    "no_barrier_for_a_frame_values": Mutant(FRAME_BARRIER, "      //", "random", "slices"),
    "no_barrier_for_a": Mutant(A_BARRIER, "        //", "thread", "slices"),
    "no_barrier_for_a_values": Mutant(A_BARRIER, "        //", "random", "slices"),
    "no_wait_for_a_frame": Mutant("cp_async_wait<0>", "cp_async_wait<1>", "plain", "slices"),
    "ring_of_two": Mutant("kFrames = 3", "kFrames = 2", "plain", "slices"),
    "the_frame_of_the_shortcut_is_replaced": Mutant("(step + 1) % Tile", "(step + 2) % Tile", "plain", "slices"),
    "the_frame_after_a_chunk_is_forgotten": Mutant(
        "if (t < end_) load", "if (t + 1 < end_) load", "plain", "chunks_of"
    ),
    "the_frame_before_a_chunk_is_forgotten": Mutant(
        "if (t >= 0 && t < p_.frames) acc",
        "if (t >= begin_ && t < p_.frames) acc",
        "plain",
        "chunks_of",
    ),
    "time_runs_backwards": Mutant("* 3 + 2 - tile / kInner", "* 3 + tile / kInner", "plain", "slices"),
    "a_is_not_zero_outside_the_image": Mutant("inside ? ptx::pack", "true ? ptx::pack", "plain", "one_tile"),
    "a_is_written_beyond_the_halo": Mutant(
        "if (pixel >= Tile::kHaloPixels) continue;\n        const bool", "const bool", "plain", "chunks_of"
    ),
    "x_is_read_outside_the_image": Mutant("chunk * 8, is_inside(pixel)", "chunk * 8, true", "address", "one_pixel"),
    "y_is_written_outside_the_image": Mutant("if (h >= p_.out_h || w >= p_.out_w) return;", "", "address", "one_pixel"),
    "wide_stores_into_any_slice": Mutant("if (p_.wide)", "if (true)", "address", "odd_slice"),
    "relu_of_the_result_is_forgotten": Mutant(
        "pack(relu(sum[n][half * 2] + value.x)",
        "pack((sum[n][half * 2] + value.x)",
        "plain",
        "slices",
    ),
    "the_shortcut_reads_another_pixel": Mutant("tap_offset(1, 1)", "tap_offset(1, 2)", "plain", "slices"),
    "odd_columns_are_misplaced": Mutant(
        "w == 1 ? kWidth + 1 : w / 2", "w == 1 ? kWidth : w / 2", "plain", "slices_stride_2"
    ),
    "bias_of_the_projection_is_forgotten": Mutant(
        "p_.bias_c[c] + p_.bias_shortcut[c]",
        "p_.bias_c[c]",
        "plain",
        "slices_stride_2",
    ),
    "an_even_pitch": Mutant("(kInChannels / 8 | 1) * 16", "kInChannels / 8 * 16", "conflicts", "slices"),
}
# Mutants are built for the tiles of res2 and of the first block of res3 only, which takes a fraction of the time.
OTHER_TILES = ("8, 8, 1, 8, 16, 4", "64, 16, 1, 8, 16, 4", "64, 32, 2, 8, 8, 8", "64, 32, 2, 4, 8, 4")
OTHER_TILES += ("128, 32, 1, 8, 16, 4", "128, 32, 1, 8, 8, 4")
KERNEL = harness.Kernel(
    "fast_bottleneck",
    fast_bottleneck_cases,
    MUTANTS,
    files=("fast_bottleneck_tile.cuh", "fast_bottleneck_block.cuh"),
    reduced={"fast_bottleneck.cuh": [(f"serve(FastBottleneckTile<{tile}>{{}})", "false") for tile in OTHER_TILES]},
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_error_is_what_rounding_explains(kernel, case, dtype):
    assert fast_bottleneck_cases.run(kernel, case, dtype) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_whole_numbers_are_exact(kernel, case, dtype):
    assert fast_bottleneck_cases.run(kernel, case, dtype, whole=True) == 0


@pytest.mark.parametrize("seed", range(4))
def test_order_of_threads_does_not_matter(kernel, monkeypatch, seed):
    monkeypatch.setenv("SLOWFAST_EXT_EMULATOR_SEED", str(seed))
    for name in ("res2", "one_tile_stride_2", "chunks_stride_2", "three_clips"):
        assert fast_bottleneck_cases.run(kernel, CASES[name], "bfloat16", whole=True) == 0


@pytest.mark.parametrize("name", BLOCKS)
def test_ldmatrix_meets_no_bank_conflict(kernel, name):
    fast_bottleneck_cases.run(kernel, CASES[name], "bfloat16")
    ldmatrix, bank_conflicts = kernel.statistics()
    assert ldmatrix > 0
    assert bank_conflicts == 0


def test_the_table_of_kernels_is_that_of_the_source(kernel):
    table = importlib.import_module("slowfast_ext.ops.fast_bottleneck").SHARED_BYTES
    for block, shared_bytes in table.items():
        assert kernel.shared_bytes(*block, shared_bytes) == shared_bytes
        assert kernel.shared_bytes(*block, shared_bytes - 1) == 0
    assert {(case.x[1], case.channels, case.stride) for case in (CASES[name] for name in BLOCKS)} == set(table)
    assert kernel.shared_bytes(256, 64, 1, HOPPER) == kernel.shared_bytes(32, 8, 2, HOPPER) == 0


def test_more_shared_memory_allows_larger_tiles(kernel):
    assert kernel.shared_bytes(128, 32, 1, AMPERE) < AMPERE < kernel.shared_bytes(128, 32, 1, HOPPER) < HOPPER


@pytest.mark.parametrize(
    ("frames", "tiles", "expected"),
    [
        (32, 480, 32),  # many tiles: nothing is read twice
        (32, 16, 2),  # a single clip: all multiprocessors work
        (1, 1, 1),
        (7, 10**6, 7),
    ],
)
def test_chunks_of_time_keep_the_multiprocessors_busy(kernel, frames, tiles, expected):
    assert kernel.choose_frames_per_chunk(frames, tiles, 132, 2) == expected


@pytest.mark.parametrize("build", harness.SANITIZERS)
def test_sanitizer_finds_nothing(builds, build):
    builds.check_sanitizer_finds_nothing(build)


@pytest.mark.parametrize("build", MUTANTS)
def test_mutant_is_seen(builds, build):
    builds.check_mutant_is_seen(build)
