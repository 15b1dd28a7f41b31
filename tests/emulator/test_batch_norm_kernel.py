"""The CUDA source of batch norm's passes, run on a CPU: values, sanitizers, and mutants that must be seen."""

import batch_norm_cases
import harness
import numpy as np
import pytest
from batch_norm_cases import CASES
from harness import Mutant

MERGE_BARRIER = ("  __syncthreads();\n  if (threadIdx.x >= Tile::kChannels", "  if (threadIdx.x >= Tile::kChannels")
MUTANTS = {
    "no_barrier_in_merge": Mutant(*MERGE_BARRIER, "thread", "merge_more"),
    "merge_reads_beyond_the_last_channel": Mutant(
        "if (channel < p.channels) {", "if (true) {", "address", "merge_more"
    ),
    "the_last_block_counts_in_full": Mutant(
        "min(p.rows_per_block, p.rows - block * p.rows_per_block)", "p.rows_per_block", "plain", "merge_a_short"
    ),
    "a_lane_is_left_out_of_merge": Mutant(
        "distance = Tile::kChannels;", "distance = 2 * Tile::kChannels;", "plain", "merge_one_row"
    ),
    "means_that_differ_do_not_add_to_the_variance": Mutant(
        "other.y + delta * delta * (count * share)", "other.y", "plain", "merge_one_row"
    ),
}
KERNEL = harness.Kernel("batch_norm", batch_norm_cases, MUTANTS, ("batch_norm_merge.cuh",))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_error_is_what_rounding_explains(kernel, case):
    assert batch_norm_cases.run(kernel, case) <= 1


def test_nan_among_partials_is_kept_in_its_channel(kernel):
    partials = np.ones((1, 9, 6, 2), np.float32)
    partials[0, 4, 2] = np.nan
    mean, variance = np.empty((1, 6), np.float32), np.empty((1, 6), np.float32)
    kernel.merge_statistics(partials, 80, 9, mean, variance)
    assert np.isnan(mean).tolist() == np.isnan(variance).tolist() == [[False, False, True, False, False, False]]


@pytest.mark.parametrize("build", harness.SANITIZERS)
def test_sanitizer_finds_nothing(builds, build):
    builds.check_sanitizer_finds_nothing(build)


@pytest.mark.parametrize("build", MUTANTS)
def test_mutant_is_seen(builds, build):
    builds.check_mutant_is_seen(build)
