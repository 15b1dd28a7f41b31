"""What the passes of batch norm are run on under the emulator, and how results are judged; a script, for harness.py."""

import sys
from dataclasses import dataclass

import harness
import numpy as np

ROUNDOFF = 2.0**-24  # of float32


@dataclass(frozen=True)
class Merge:
    """Partial statistics that some other kernel wrote.

    Attributes:
        groups, channels, rows, rows_per_block (int): see batch_norm_merge.cuh.
        mean (float): of the values, whose standard deviation is 1.
    """

    groups: int
    channels: int
    rows: int
    rows_per_block: int
    mean: float = 0.0


CASES = {
    "merge_one_block": Merge(1, 8, 5, 16),
    "merge_a_short_last_block": Merge(2, 12, 1000, 7),
    "merge_more_blocks_than_threads": Merge(1, 5, 1601, 4, mean=3.0),
    "merge_far_from_zero": Merge(3, 3, 700, 64, mean=1000.0),
    "merge_one_row_each": Merge(1, 64, 130, 1),
    "merge_nothing": Merge(2, 9, 0, 16),
}


def moments(values, axis):
    """Mean and sum of squared deviations, in the dtype of the values."""
    mean = values.mean(axis, keepdims=True)
    return mean.squeeze(axis), ((values - mean) ** 2).sum(axis)


def statistics_bounds(values, axis, steps):
    """Of mean and variance in float32, where no more than ``steps`` updates follow one another.

    Each step rounds the mean, which is no larger than the largest value, four times (a difference, a quotient, a
    product, a sum); of the sum of squares with condition number ``kappa = sqrt(1 + mean^2 / variance)`` the relative
    error is bounded by ``steps * kappa`` roundoffs to first order, times a small constant (Chan, Golub and LeVeque,
    table 1), here 8 for as many operations of a step.
    """
    mean, variance = values.mean(axis), values.var(axis)
    kappa_variance = np.sqrt(variance * (variance + mean**2))  # times variance, which may be zero
    mean_bound = 4 * (steps + 1) * ROUNDOFF * abs(values).max(axis, initial=0)
    return mean_bound, 8 * (steps + 2) * ROUNDOFF * kappa_variance + mean_bound**2 + 2.0**-140


def run_merge(module, case, random):
    values = (case.mean + random.standard_normal((case.groups, case.rows, case.channels))).astype(np.float32)
    blocks = -(-case.rows // case.rows_per_block)
    partials = np.empty((case.groups, blocks, case.channels, 2), np.float32)
    for block in range(blocks):
        rows = values[:, block * case.rows_per_block : (block + 1) * case.rows_per_block].astype(np.float64)
        partials[:, block, :, 0], partials[:, block, :, 1] = moments(rows, 1)
    mean, variance = (np.full((case.groups, case.channels), np.nan, np.float32) for _ in range(2))
    module.merge_statistics(partials, case.rows, case.rows_per_block, mean, variance)
    if case.rows == 0:
        return 0.0 if not mean.any() and not variance.any() else np.inf
    exact = values.astype(np.float64)
    bounds = statistics_bounds(exact, 1, blocks / 64 + 12)
    errors = [abs(mean - exact.mean(1)) / bounds[0], abs(variance - exact.var(1)) / bounds[1]]
    worst = max(float(error.max()) for error in errors)
    return np.inf if np.isnan(worst) else worst


def run(module, case, dtype="bfloat16", seed=0):
    """The largest error of a case in units of what rounding can explain, so that more than 1 is a mistake."""
    return run_merge(module, case, np.random.default_rng(seed))


if __name__ == "__main__":
    sys.exit(harness.main(run, CASES, *sys.argv[1:]))
