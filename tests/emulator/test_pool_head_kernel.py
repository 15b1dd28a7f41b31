"""The CUDA source of pool_head, run on a CPU: values, sanitizers, and mutants that must be seen."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import build
import pool_head_cases
import pytest
from pool_head_cases import CASES

pytestmark = pytest.mark.skipif(build.unavailable_reason() is not None, reason=str(build.unavailable_reason()))

HERE = Path(__file__).resolve().parent
BINDING = [HERE / "pool_head.cpp"]
DTYPES = ("bfloat16", "float16", "float32")
SANITIZERS = ("address", "thread")

# What is changed in the kernels, how they are run, and on which cases: plainly, in a random order of threads, or under
# a sanitizer.
AVERAGE_BARRIER = ("  __syncthreads();\n  if (threadIdx.x >= Tile::kSums)", "  if (threadIdx.x >= Tile::kSums)")
SOFTMAX_BARRIER = ("  __syncthreads();\n  for (int label", "  for (int label")
MUTANTS = {
    "no_barrier_in_average": (*AVERAGE_BARRIER, "thread", "slices"),
    "no_barrier_in_average_values": (*AVERAGE_BARRIER, "random", "slices"),
    "no_barrier_in_softmax": (*SOFTMAX_BARRIER, "thread", "many_views"),
    "no_barrier_in_softmax_values": (*SOFTMAX_BARRIER, "random", "many_views"),
    "features_are_read_beyond_the_last_pixel": (
        "pixel + (kUnroll - 1) * Tile::kPixels < pixels",
        "pixel < pixels",
        "address",
        "slices",
    ),
    "features_are_read_beyond_the_last_channel": ("if (channel < map.channels) {", "if (true) {", "address", "planes"),
    "averages_are_written_beyond_the_last_window": (
        "position >= p.positions || out_channel",
        "out_channel",
        "address",
        "three_strips",
    ),
    "averages_are_read_beyond_the_last_row": ("if (i >= rows) break;", "", "address", "planes"),
    "weight_is_read_beyond_the_last_class": ("if (first_class + j < p.classes) ", "", "address", "planes"),
    "a_lane_is_left_out": ("distance = Tile::kColumns;", "distance = 2 * Tile::kColumns;", "plain", "different_planes"),
    "windows_at_the_end_are_overcounted": ("min(at + 1, size - at)", "at + 1", "plain", "zoo_sliding"),
    "rows_are_not_carried": ("if (h_ >= height_) h_ -= height_;", "", "plain", "wide_window"),
    "slow_comes_first": ("(is_fast ? 0 : p.fast.channels)", "(is_fast ? p.slow.channels : 0)", "plain", "slices"),
}


def build_mutant(old, new, way):
    csrc = build.mutate({"pool_head.cuh": [(old, new)]})
    sanitizer = way if way in SANITIZERS else None
    return build.build("pool_head", BINDING, sanitizer=sanitizer, defines=("ONLY_BFLOAT16",), csrc=csrc)


@pytest.fixture(scope="module")
def builds():
    """All libraries, compiled side by side: a dictionary of futures."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {}
        for sanitizer in SANITIZERS:
            options = {"sanitizer": sanitizer, "defines": ("ONLY_BFLOAT16",)}
            futures[sanitizer] = pool.submit(build.build, "pool_head", BINDING, **options)
        for name, (old, new, way, _) in MUTANTS.items():
            futures[name] = pool.submit(build_mutant, old, new, way)
        yield futures
        for future in futures.values():
            future.cancel()


@pytest.fixture(scope="module")
def kernel():
    return build.load("pool_head", BINDING)


def run(way, library, cases=""):
    """Run the bfloat16 cases whose names contain `cases` in a process of their own."""
    environment = {"SLOWFAST_EXT_EMULATOR_SEED": "7"} if way == "random" else {}
    sanitizer = way if way in SANITIZERS else None
    return build.run_sanitized(sanitizer, HERE / "pool_head_cases.py", library, cases, environment=environment)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_error_is_what_rounding_explains(kernel, case, dtype):
    assert pool_head_cases.run(kernel, case, dtype) <= 1


@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_weight_has_a_dtype_of_its_own(kernel, weight_dtype):
    assert pool_head_cases.run(kernel, CASES["zoo_sliding"], "float16", weight_dtype) <= 1


@pytest.mark.parametrize("seed", range(4))
def test_order_of_threads_does_not_matter(kernel, monkeypatch, seed):
    monkeypatch.setenv("SLOWFAST_EXT_EMULATOR_SEED", str(seed))
    for name in ("slices", "three_strips_of_windows", "odd_channels_softmax", "many_views"):
        assert pool_head_cases.run(kernel, CASES[name]) <= 1


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
