"""The CUDA source of batch norm's passes, run on a CPU: values, sanitizers, and mutants that must be seen."""

import batch_norm_cases
import harness
import numpy as np
import pytest
from batch_norm_cases import CASES, DTYPES, EPS, LARGER_CASES
from harness import Mutant

MUTANTS = {
    "no_barrier_in_merge": Mutant(
        "  __syncthreads();\n  if (threadIdx.x >= Tile::kChannels",
        "  if (threadIdx.x >= Tile::kChannels",
        "thread",
        "merge_one_row",
    ),
    "no_barrier_in_block": Mutant(
        "  __syncthreads();\n  const int thread", "  const int thread", "thread", "unaligned"
    ),
    "rows_are_read_beyond_the_last": Mutant(
        "min(p.rows_per_block, p.rows - first_row)", "p.rows_per_block", "address", "several"
    ),
    "channels_are_read_beyond_the_last": Mutant(
        "channel < p.channels ? first_row", "true ? first_row", "address", "unaligned"
    ),
    "clips_of_other_groups_are_read": Mutant("(p.groups - 1) + at.group", "(p.groups - 1)", "plain", "slices"),
    "squares_are_not_those_of_deviations": Mutant("delta * (x[i] - moments[i].x)", "delta * delta", "plain", "several"),
    "relu_loses_nan": Mutant("y[i] <= 0.f ? 0.f : y[i]", "fmaxf(y[i], 0.f)", "plain", "not_finite"),
    "eps_is_left_out": Mutant("sqrtf(biased + eps)", "sqrtf(biased)", "plain", "merge_one_row"),
    "sums_are_not_divided": Mutant("mean_grad[i] *= p.inverse_count;", "", "plain", "several"),
    "the_gradient_passes_at_zero": Mutant("sign <= 0.f", "sign < 0.f", "plain", "slices"),
}
FILES = ("batch_norm.cuh", "batch_norm_gradient.cuh", "batch_norm_merge.cuh", "batch_norm_tile.cuh")
ALL_CASES = CASES | LARGER_CASES
KERNEL = harness.Kernel("batch_norm", batch_norm_cases, MUTANTS, FILES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ALL_CASES.values(), ids=ALL_CASES.keys())
def test_error_is_what_rounding_explains(kernel, case, dtype):
    assert batch_norm_cases.run(kernel, case, dtype) <= 1


@pytest.mark.parametrize("seed", range(4))
def test_order_of_threads_does_not_matter(kernel, monkeypatch, seed):
    monkeypatch.setenv("SLOWFAST_EXT_EMULATOR_SEED", str(seed))
    for name in ("slices", "12_channels", "three_splits_of_one_clip", "merge_a_short_last_block"):
        assert batch_norm_cases.run(kernel, ALL_CASES[name]) <= 1


def test_sums_are_the_same_bits_each_time(kernel, monkeypatch):
    random = np.random.default_rng(0)
    x, grad = (random.standard_normal((3, 2, 20, 19, 40), np.float32).transpose(0, 4, 1, 2, 3) for _ in range(2))
    vector = np.ones((3, 40), np.float32)

    def sums():
        results = np.full((5, 3, 40), np.nan, np.float32)
        arguments = (x, None, None, grad, None, None, vector, vector, *[None] * 4)
        kernel.batch_norm("statistics", "float32", 3, 2, False, *arguments, *results[:3], 1.0, EPS)
        kernel.batch_norm("reduce_gradient", "float32", 3, 2, True, *arguments, *results[3:], None, 1.0, EPS)
        return results

    first = sums()
    assert np.isfinite(first).all()
    for seed in "123":
        monkeypatch.setenv("SLOWFAST_EXT_EMULATOR_SEED", seed)
        assert (sums() == first).all()


def test_the_sign_computed_again_is_that_of_the_result(kernel):
    """Where bias all but cancels the rest, so that the sign depends on how the sum was rounded."""
    random = np.random.default_rng(0)
    shape = (1, 64, 1, 9, 7)
    x = (1 + random.random((1, 1, 9, 7, 64), np.float32)).transpose(0, 4, 1, 2, 3)
    mean, inverse_std = random.random((1, 64), np.float32), 1 + random.random((1, 64), np.float32)
    weight = random.standard_normal(64, np.float32)
    bias = -(x[0, :, 0, 0, 0] - mean[0]) * (inverse_std[0] * weight)
    x[:] = x[:, :, :1, :1, :1] * (1 + random.integers(-1, 2, shape) * np.float32(2.0**-23))
    y, grad, grad_residual = (np.ones((1, 1, 9, 7, 64), np.float32).transpose(0, 4, 1, 2, 3) for _ in range(3))
    vectors, sums = (mean, inverse_std, weight, bias, None, None), np.empty((2, 1, 64), np.float32)
    kernel.batch_norm("apply", "float32", 1, 0, True, x, None, y, *[None] * 3, *vectors, *[None] * 3, 1.0, EPS)
    maps = (x, None, None, grad, None, grad_residual)
    kernel.batch_norm("reduce_gradient", "float32", 1, 0, True, *maps, *vectors, *sums, None, 1.0, EPS)
    assert 0.2 < (y > 0).mean() < 0.8
    assert ((y > 0) == (grad_residual > 0)).all()


@pytest.mark.parametrize("build", harness.SANITIZERS)
def test_sanitizer_finds_nothing(builds, build):
    builds.check_sanitizer_finds_nothing(build)


@pytest.mark.parametrize("build", MUTANTS)
def test_mutant_is_seen(builds, build):
    builds.check_mutant_is_seen(build)
