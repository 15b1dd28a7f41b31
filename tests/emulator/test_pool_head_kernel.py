"""The CUDA source of pool_head, run on a CPU: values, sanitizers, and mutants that must be seen."""

import harness
import pool_head_cases
import pytest
from harness import Mutant
from pool_head_cases import CASES, DTYPES

AVERAGE_BARRIER = ("  __syncthreads();\n  if (threadIdx.x >= Tile::kSums)", "  if (threadIdx.x >= Tile::kSums)")
SOFTMAX_BARRIER = ("  __syncthreads();\n  for (int label", "  for (int label")
MUTANTS = {
    "no_barrier_in_average": Mutant(*AVERAGE_BARRIER, "thread", "slices"),
    "no_barrier_in_average_values": Mutant(*AVERAGE_BARRIER, "random", "slices"),
    "no_barrier_in_softmax": Mutant(*SOFTMAX_BARRIER, "thread", "many_views"),
    "no_barrier_in_softmax_values": Mutant(*SOFTMAX_BARRIER, "random", "many_views"),
    "features_are_read_beyond_the_last_pixel": Mutant(
        "pixel + (kUnroll - 1) * Tile::kPixels < pixels",
        "pixel < pixels",
        "address",
        "slices",
    ),
    "features_are_read_beyond_the_last_channel": Mutant(
        "if (channel < map.channels) {", "if (true) {", "address", "planes"
    ),
    "averages_are_written_beyond_the_last_window": Mutant(
        "position >= p.positions || out_channel",
        "out_channel",
        "address",
        "three_strips",
    ),
    "averages_are_read_beyond_the_last_row": Mutant("if (i >= rows) break;", "", "address", "planes"),
    "weight_is_read_beyond_the_last_class": Mutant("if (first_class + j < p.classes) ", "", "address", "planes"),
    "a_lane_is_left_out": Mutant(
        "distance = Tile::kColumns;", "distance = 2 * Tile::kColumns;", "plain", "different_planes"
    ),
    "windows_at_the_end_are_overcounted": Mutant("min(at + 1, size - at)", "at + 1", "plain", "zoo_sliding"),
    "rows_are_not_carried": Mutant("if (h_ >= height_) h_ -= height_;", "", "plain", "wide_window"),
    "slow_comes_first": Mutant("(is_fast ? 0 : p.fast.channels)", "(is_fast ? p.slow.channels : 0)", "plain", "slices"),
}
KERNEL = harness.Kernel("pool_head", pool_head_cases, MUTANTS)


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


@pytest.mark.parametrize("build", harness.SANITIZERS)
def test_sanitizer_finds_nothing(builds, build):
    builds.check_sanitizer_finds_nothing(build)


@pytest.mark.parametrize("build", MUTANTS)
def test_mutant_is_seen(builds, build):
    builds.check_mutant_is_seen(build)
