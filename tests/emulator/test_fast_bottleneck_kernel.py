"""The CUDA source of fast_bottleneck, run on a CPU: values, sanitizers, and mutants that must be seen."""

import importlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import build
import fast_bottleneck_cases
import pytest
from fast_bottleneck_cases import AMPERE, CASES, DTYPES, HOPPER

pytestmark = pytest.mark.skipif(build.unavailable_reason() is not None, reason=str(build.unavailable_reason()))

HERE = Path(__file__).resolve().parent
BINDING = [HERE / "fast_bottleneck.cpp"]
KERNEL = ("fast_bottleneck_tile.cuh", "fast_bottleneck_block.cuh")
BLOCKS = ("res2_first", "res2", "res3_first", "res3", "res4_first", "res4", "res4_first_small_tile", "res4_small_tile")

# What is changed in the kernel, how it is run, and on which cases: plainly, in a random order of threads, with bank
# conflicts counted, or under a sanitizer.
FRAME_BARRIER = "      __syncthreads();  // frame t has landed"
A_BARRIER = "        __syncthreads();  // a is complete"
MUTANTS = {
    "no_barrier_before_the_biases_are_read": (
        "    fill_weights();\n    __syncthreads();",
        "    fill_weights();",
        "thread",
        "slices",
    ),
    "no_barrier_for_a_frame": (FRAME_BARRIER, "      //", "thread", "slices"),
    "no_barrier_for_a_frame_values": (FRAME_BARRIER, "      //", "random", "slices"),
    "no_barrier_for_a": (A_BARRIER, "        //", "thread", "slices"),
    "no_barrier_for_a_values": (A_BARRIER, "        //", "random", "slices"),
    "no_wait_for_a_frame": ("cp_async_wait<0>", "cp_async_wait<1>", "plain", "slices"),
    "ring_of_two": ("kFrames = 3", "kFrames = 2", "plain", "slices"),
    "the_frame_of_the_shortcut_is_replaced": ("(step + 1) % Tile", "(step + 2) % Tile", "plain", "slices"),
    "the_frame_after_a_chunk_is_forgotten": ("if (t < end_) load", "if (t + 1 < end_) load", "plain", "chunks_of"),
    "the_frame_before_a_chunk_is_forgotten": (
        "if (t >= 0 && t < p_.frames) acc",
        "if (t >= begin_ && t < p_.frames) acc",
        "plain",
        "chunks_of",
    ),
    "time_runs_backwards": ("* 3 + 2 - tile / kInner", "* 3 + tile / kInner", "plain", "slices"),
    "a_is_not_zero_outside_the_image": ("inside ? ptx::pack", "true ? ptx::pack", "plain", "one_tile"),
    "a_is_written_beyond_the_halo": ("if (pixel >= Tile::kHaloPixels) continue;", "", "plain", "chunks_of"),
    "x_is_read_outside_the_image": ("chunk * 8, is_inside(pixel)", "chunk * 8, true", "address", "one_pixel"),
    "y_is_written_outside_the_image": ("if (h >= p_.out_h || w >= p_.out_w) return;", "", "address", "one_pixel"),
    "wide_stores_into_any_slice": ("if (p_.wide)", "if (true)", "address", "odd_slice"),
    "relu_of_the_result_is_forgotten": (
        "pack(relu(sum[n][half * 2] + value.x)",
        "pack((sum[n][half * 2] + value.x)",
        "plain",
        "slices",
    ),
    "the_shortcut_reads_another_pixel": ("tap_offset(1, 1)", "tap_offset(1, 2)", "plain", "slices"),
    "odd_columns_are_misplaced": ("w == 1 ? kWidth + 1 : w / 2", "w == 1 ? kWidth : w / 2", "plain", "slices_stride_2"),
    "bias_of_the_projection_is_forgotten": (
        "p_.bias_c[c] + p_.bias_shortcut[c]",
        "p_.bias_c[c]",
        "plain",
        "slices_stride_2",
    ),
    "an_even_pitch": ("(kInChannels / 8 | 1) * 16", "kInChannels / 8 * 16", "conflicts", "slices"),
}
SANITIZERS = ("address", "thread")


# Mutants are built for the tiles of res2 and of the first block of res3 only, which takes a fraction of the time.
OTHER_TILES = ("8, 8, 1, 8, 16, 4", "64, 16, 1, 8, 16, 4", "64, 32, 2, 8, 8, 8", "64, 32, 2, 4, 8, 4")
OTHER_TILES += ("128, 32, 1, 8, 16, 4", "128, 32, 1, 8, 8, 4")


def build_mutant(old, new, way):
    changes = {"fast_bottleneck.cuh": [(f"serve(FastBottleneckTile<{tile}>{{}})", "false") for tile in OTHER_TILES]}
    changes |= {file: [(old, new)] for file in KERNEL if old in (build.CSRC / file).read_text()}
    csrc = build.mutate(changes)
    sanitizer = way if way in SANITIZERS else None
    return build.build("fast_bottleneck", BINDING, sanitizer=sanitizer, defines=("ONLY_BFLOAT16",), csrc=csrc)


@pytest.fixture(scope="module")
def builds():
    """All libraries, compiled side by side: a dictionary of futures."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {"plain": pool.submit(build.build, "fast_bottleneck", BINDING)}
        for sanitizer in SANITIZERS:
            options = {"sanitizer": sanitizer, "defines": ("ONLY_BFLOAT16",)}
            futures[sanitizer] = pool.submit(build.build, "fast_bottleneck", BINDING, **options)
        for name, (old, new, way, _) in MUTANTS.items():
            futures[name] = pool.submit(build_mutant, old, new, way)
        yield futures
        for future in futures.values():
            future.cancel()


@pytest.fixture(scope="module")
def kernel():
    return build.load("fast_bottleneck", BINDING)


def run(way, library, cases=""):
    """Run the bfloat16 cases whose names contain `cases` in a process of their own."""
    environment = {"SLOWFAST_EXT_EMULATOR_SEED": "7"} if way == "random" else {}
    sanitizer = way if way in SANITIZERS else None
    return build.run_sanitized(sanitizer, HERE / "fast_bottleneck_cases.py", library, cases, environment=environment)


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


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_sanitizer_finds_nothing(builds, sanitizer):
    result = run(sanitizer, builds[sanitizer].result())
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    assert result.stdout.count("\n") == len(CASES)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_seen(builds, name):
    *_, way, cases = MUTANTS[name]
    result = run(way, builds[name].result(), cases)
    assert result.returncode != 0
    # Seen for what it is, not because the process broke down on the way.
    report = {
        "address": ("AddressSanitizer", "runtime error"),
        "thread": ("WARNING: ThreadSanitizer: data race",),
        "conflicts": ("bank conflicts",),
    }.get(way)
    if report is None:
        assert result.stdout or "emulator" in result.stderr
    else:
        assert any(text in result.stderr + result.stdout for text in report)
