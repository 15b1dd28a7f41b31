"""The CUDA source of lateral_fuse, run on a CPU: values, sanitizers, and mutants that must be seen."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import build
import lateral_cases
import pytest
from conv3d_cases import MATHS
from lateral_cases import CASES

pytestmark = pytest.mark.skipif(build.unavailable_reason() is not None, reason=str(build.unavailable_reason()))

HERE = Path(__file__).resolve().parent
BINDING = [HERE / "lateral_fuse.cpp"]
SANITIZERS = ("address", "thread")

# What is changed in the kernel, how it is run, and on which cases: plainly, in a random order of threads, with bank
# conflicts counted, or under a sanitizer.
MUTANTS = {
    "no_barrier": ("      __syncthreads();", "", "thread", "res2_7"),
    "no_barrier_values": ("      __syncthreads();", "", "random", "res2_7"),
    "no_barrier_of_the_warp": ("    __syncwarp();", "", "thread", "res2_7"),
    "wait_for_one_stage_less": ("kStages - 2>()", "kStages - 1>()", "plain", "res2_7"),
    "fast_is_read_beyond_the_last_pixel": (
        "has_pixel = first_pixel_ + row < p_.area",
        "has_pixel = true",
        "address",
        "odd_channels",
    ),
    "fast_is_read_beyond_the_last_frame": (
        "static_cast<unsigned>(first_frame_ + tap) <",
        "0u <",
        "address",
        "shorter_than_the_kernel",
    ),
    "y_is_written_beyond_the_last_pixel": ("if (pixel >= p.area) break;", "", "address", "lateral_alone"),
    "slow_is_copied_beyond_the_last_pixel": (
        "min(Tile::kPixels, p.area - at.pixel)",
        "Tile::kPixels",
        "address",
        "one_tap",
    ),
    "weight_is_read_beyond_the_last_channel": (
        "source, out_channel < p_.out_channels && k",
        "source, k",
        "address",
        "a_few_channels",
    ),
    "weights_of_the_second_tile": ("|| tile_ == first_tile_", "|| tile_ != first_tile_", "plain", "res1_7"),
    "swizzle_differs": ("lane % 16, chunk + lane / 16", "lane % 16, 2 - chunk + lane / 16", "plain", "res2_7"),
    "frames_in_another_order": ("frame(tile % p.out_frames)", "frame(0)", "plain", "res1_5"),
}


def build_mutant(old, new, way):
    csrc = build.mutate({"lateral_fuse.cuh": [(old, new)]})
    sanitizer = way if way in SANITIZERS else None
    return build.build("lateral_fuse", BINDING, sanitizer=sanitizer, defines=("ONLY_BFLOAT16",), csrc=csrc)


@pytest.fixture(scope="module")
def builds():
    """All libraries, compiled side by side: a dictionary of futures."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {}
        for sanitizer in SANITIZERS:
            options = {"sanitizer": sanitizer, "defines": ("ONLY_BFLOAT16",)}
            futures[sanitizer] = pool.submit(build.build, "lateral_fuse", BINDING, **options)
        for name, (old, new, way, _) in MUTANTS.items():
            futures[name] = pool.submit(build_mutant, old, new, way)
        yield futures
        for future in futures.values():
            future.cancel()


@pytest.fixture(scope="module")
def kernel():
    return build.load("lateral_fuse", BINDING)


def run(way, library, cases=""):
    """Run the bfloat16 cases whose names contain `cases` in a process of their own."""
    environment = {"SLOWFAST_EXT_EMULATOR_SEED": "7"} if way == "random" else {}
    sanitizer = way if way in SANITIZERS else None
    return build.run_sanitized(sanitizer, HERE / "lateral_cases.py", library, cases, environment=environment)


@pytest.mark.parametrize("math", MATHS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_error_is_what_rounding_explains_and_no_bank_is_met_twice(kernel, case, math):
    assert lateral_cases.run(kernel, case, math) <= 1
    ldmatrix, bank_conflicts = kernel.statistics()
    assert ldmatrix > 0
    assert bank_conflicts == 0


@pytest.mark.parametrize("seed", range(4))
def test_order_of_threads_does_not_matter(kernel, monkeypatch, seed):
    monkeypatch.setenv("SLOWFAST_EXT_EMULATOR_SEED", str(seed))
    for name in ("res1_7_taps_stride_4", "res2_7_taps_stride_4", "res4_7_taps_stride_4_ampere", "odd_channels_many"):
        assert lateral_cases.run(kernel, CASES[name], "bfloat16") <= 1


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
    report = {"address": "ERROR: AddressSanitizer", "thread": "WARNING: ThreadSanitizer: data race"}.get(way)
    assert report in result.stderr if report else result.stdout or "emulator" in result.stderr
