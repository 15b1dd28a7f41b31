"""The CUDA source of stem, run on a CPU: values, sanitizers, and mutants that must be seen."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import build
import pytest
import stem_cases
from stem_cases import CASES, MATHS

pytestmark = pytest.mark.skipif(build.unavailable_reason() is not None, reason=str(build.unavailable_reason()))

HERE = Path(__file__).resolve().parent
BINDING = [HERE / "stem.cpp"]

# What is changed in the kernel, how it is run, and on which cases. "random" is a random order of threads.
MUTANTS = {
    "no_barrier_before_the_products": ("__syncthreads();  // the patch is", "// the patch is", "thread", "slow_bytes"),
    "no_barrier_before_the_pooling": ("__syncthreads();  // the stage is", "// the stage is", "random", "slow_bytes"),
    "padding_is_black": ("float value = 0.f;", "float value = shift;", "plain", "slow_bytes"),
    "image_is_read_beyond_its_edge": ("< unsigned(p.in_w)", "< unsigned(p.in_w + 9)", "address", "one_pixel"),
    "frame_outside_is_read": ("index < p_.in_t", "index <= p_.in_t", "address", "frame_outside_is_nan"),
    "weight_is_read_beyond_the_last_channel": (
        "if (channel < p.channels && row",
        "if (row",
        "address",
        "channels_tail",
    ),
    "y_is_written_beyond_the_last_channel": (" || channel >= p.channels)", ")", "plain", "channels_tail"),
    "y_is_written_beyond_the_last_row": ("if (y >= p.out_h || ", "if (", "address", "several_tiles"),
    "unaligned_y_is_written_16_bytes_at_a_time": ("if (p.vector)", "if (true)", "address", "unaligned"),
    "halo_of_the_pooling_is_no_padding": ("first < 0.f || !(inside_ >> row & 1)", "first < 0.f", "plain", "fast_bytes"),
    "right_neighbour_of_the_window_is_seen": ("? last_half_ : ~0u", "? ~0u : ~0u", "plain", "nan_spreads"),
    "taps_in_reverse": ("Tile::kTaps - 1 - column / Tile::kOctets", "column / Tile::kOctets", "plain", "fast_bytes"),
    "sums_stay": ("    warp.advance();", "", "plain", "slow_chunks"),
    "frames_after_a_chunk_are_forgotten": (
        "end_frame + kReach, p.out_t) - 1",
        "end_frame, p.out_t) - 1",
        "plain",
        "chunks",
    ),
}
SANITIZERS = ("address", "thread")


def build_mutant(old, new, way):
    csrc = build.mutate({"stem.cuh": [(old, new)]})
    sanitizer = way if way in SANITIZERS else None
    return build.build("stem", BINDING, sanitizer=sanitizer, defines=("ONLY_BFLOAT16",), csrc=csrc)


@pytest.fixture(scope="module")
def builds():
    """All libraries, compiled side by side: a dictionary of futures."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {"plain": pool.submit(build.build, "stem", BINDING)}
        for sanitizer in SANITIZERS:
            options = {"sanitizer": sanitizer, "defines": ("ONLY_BFLOAT16",)}
            futures[sanitizer] = pool.submit(build.build, "stem", BINDING, **options)
        for name, (old, new, way, _) in MUTANTS.items():
            futures[name] = pool.submit(build_mutant, old, new, way)
        yield futures
        for future in futures.values():
            future.cancel()


@pytest.fixture(scope="module")
def kernel(builds):
    builds["plain"].result()  # else load would compile it a second time
    return build.load("stem", BINDING)


def run(way, library, cases=""):
    """Run the bfloat16 cases whose names contain `cases` in a process of their own."""
    environment = {"SLOWFAST_EXT_EMULATOR_SEED": "7"} if way == "random" else {}
    sanitizer = way if way in SANITIZERS else None
    return build.run_sanitized(sanitizer, HERE / "stem_cases.py", library, cases, environment=environment)


@pytest.mark.parametrize("math", MATHS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_error_is_what_rounding_explains(kernel, case, math):
    assert stem_cases.run(kernel, case, math) <= 1


@pytest.mark.parametrize("seed", range(4))
def test_order_of_threads_does_not_matter(kernel, monkeypatch, seed):
    monkeypatch.setenv("SLOWFAST_EXT_EMULATOR_SEED", str(seed))
    for name in ("slow_bytes", "fast_in_chunks", "several_tiles"):
        assert stem_cases.run(kernel, CASES[name], "bfloat16") <= 1


@pytest.mark.parametrize(
    ("tiles", "frames", "kernel_t", "chunk"),
    [
        (32, 32, 5, 8),  # one clip of 256 x 256, Fast
        (960, 32, 5, 32),  # 30 of them: whole, nothing is read twice
        (64, 8, 1, 4),  # Slow
        (1920, 8, 1, 8),
        (1, 1, 5, 1),
    ],
)
def test_clips_are_cut_only_as_far_as_it_fills_the_gpu(kernel, tiles, frames, kernel_t, chunk):
    assert kernel.choose_chunk(tiles, frames, kernel_t, 132) == chunk


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
    reports = {
        "address": ("ERROR: AddressSanitizer", "runtime error: "),  # the second for misaligned accesses
        "thread": ("WARNING: ThreadSanitizer: data race",),
    }
    if way in reports:
        assert any(report in result.stderr for report in reports[way])
    else:
        assert result.stdout or "emulator" in result.stderr
