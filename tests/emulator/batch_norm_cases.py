"""What the passes of batch norm are run on under the emulator, and how results are judged; a script, for harness.py."""

import sys
from dataclasses import dataclass

import harness
import numpy as np
from conv3d_cases import Storage, channels_last

DTYPES = ("bfloat16", "float16", "float32")
ROUNDOFF = 2.0**-24  # of float32
EPS = 0.25  # as large as no batch norm's, so that it matters
# The most additions that follow one another in the sums of these cases: over the rows of a thread, in 5 rounds over the
# lanes of a warp, over 8 warps; and again over blocks.
DEPTH = 50


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


@dataclass(frozen=True)
class Case:
    """All four passes over a map, the sums of one being what the next is given.

    Attributes:
        x (tuple): N, C, T, H, W.
        splits (int): groups of clips.
        mean (float): of the values, whose standard deviation is about 1.
        relu, residual (bool): whether there are.
        keeps_y (bool): the gradients look at the sign of y; without, they compute it again.
        affine (bool): there are weight and bias.
        frozen (bool): the statistics are constants to the gradients.
        in_place (bool): y takes the place of x.
        slice (tuple): maps have so many channels before and after them.
        thread_rows (int): so many pixels for each thread; 0 for what is planned.
        finite (bool): otherwise x has some NaN and infinities, each in a channel of its own.
    """

    x: tuple
    splits: int = 1
    mean: float = 0.5
    relu: bool = True
    residual: bool = False
    keeps_y: bool = False
    affine: bool = True
    frozen: bool = False
    in_place: bool = False
    slice: tuple = (0, 0)
    thread_rows: int = 0
    finite: bool = True


# Small, for the sanitizers too.
CASES = {
    "several_blocks": Case((1, 8, 2, 37, 33), thread_rows=5),
    "slices_of_two_splits": Case((4, 8, 2, 7, 5), 2, residual=True, keeps_y=True, slice=(16, 8)),
    "unaligned_slices": Case((2, 3, 2, 7, 5), affine=False, residual=True, keeps_y=True, slice=(2, 0)),
    "in_place": Case((1, 8, 1, 12, 11), residual=True, keeps_y=True, in_place=True),
    "not_finite_and_frozen": Case((1, 4, 1, 7, 6), finite=False, frozen=True),
    "empty": Case((0, 4, 2, 3, 3), 2),
    "merge_a_short_last_block": Merge(2, 5, 1000, 7),
    "merge_one_row_each": Merge(1, 4, 130, 1),
    "merge_nothing": Merge(1, 3, 0, 16),
}
LARGER_CASES = {
    # Layers of SlowFast, at small spatial sizes.
    "fast_stem": Case((2, 8, 3, 20, 21)),
    "fast_res2_block": Case((1, 32, 3, 13, 9), residual=True, keeps_y=True),
    "slow_res2": Case((1, 64, 2, 12, 11)),
    "slow_res2_block_in_place": Case((1, 256, 1, 12, 11), residual=True, keeps_y=True, in_place=True),
    "slow_res2_shortcut": Case((1, 256, 1, 5, 7), relu=False),
    "slow_res5": Case((2, 2048, 1, 5, 7), residual=True, keeps_y=True),
    "lateral": Case((1, 16, 2, 9, 8), slice=(64, 0)),
    "frozen_block": Case((1, 64, 1, 6, 6), frozen=True, residual=True, keeps_y=True),
    # What a network does not have, but a user may.
    "three_channels": Case((1, 3, 2, 9, 13)),
    "slices": Case((2, 24, 2, 7, 5), residual=True, keeps_y=True, slice=(16, 8)),
    "two_splits_of_many_rows": Case((4, 16, 2, 20, 19), 2, residual=True, keeps_y=True, thread_rows=23),
    "three_splits_of_one_pixel": Case((9, 80, 1, 1, 1), 3),
    "three_splits_of_one_clip": Case((3, 24, 2, 13, 11), 3, residual=True, keeps_y=True),
    "80_channels": Case((1, 80, 3, 9, 7), residual=True, keeps_y=True),
    "12_channels": Case((1, 12, 1, 9, 7), residual=True, keeps_y=True),
    "20_channels_in_place": Case((2, 20, 2, 9, 7), in_place=True),
    "70_channels": Case((1, 70, 2, 5, 7), residual=True, relu=False),
    "not_finite": Case((1, 4, 1, 7, 6), finite=False),
    "not_finite_block": Case((2, 16, 1, 7, 6), finite=False, residual=True, keeps_y=True),
    "not_finite_without_relu": Case((2, 16, 1, 7, 6), finite=False, relu=False),
    "far_from_zero": Case((1, 64, 2, 12, 11), mean=1000.0),
    "one_row_of_a_thread": Case((1, 16, 2, 20, 19), residual=True, keeps_y=True, thread_rows=1),
    "one_pixel": Case((1, 8, 1, 1, 1)),
    "one_element": Case((1, 1, 1, 1, 1), residual=True, keeps_y=True),
    "one_channel": Case((2, 1, 2, 19, 17), 2),
    "merge_one_block": Merge(1, 8, 5, 16),
    "merge_more_blocks_than_threads": Merge(1, 5, 1601, 4, mean=3.0),
    "merge_far_from_zero": Merge(3, 3, 700, 64, mean=1000.0),
}


class Errors:
    """The largest error in units of its bound. What should not be finite must not be: infinite or NaN."""

    def __init__(self):
        self.worst = 0.0

    def add(self, found, expected, bound):
        finite = np.isfinite(expected)
        if (np.isfinite(found) != finite).any():
            self.worst = np.inf
        error, bound = abs(found[finite] - expected[finite]), np.broadcast_to(bound, expected.shape)[finite]
        error = error[error > 0] / np.maximum(bound[error > 0], 2.0**-200)
        self.worst = max(self.worst, float(error.max(initial=0)))


def add_statistics_errors(errors, mean, variance, inverse_std, rows):
    """Of float32 statistics of the second dimension of ``rows`` (groups, rows, channels), with EPS.

    With as many updates one after the other as DEPTH. Each rounds the mean, which is no larger than the largest value,
    four times (difference, quotient, product, sum). To first order the relative error of the sum of squares is bounded
    by ``DEPTH * kappa`` roundoffs with the condition number ``kappa = sqrt(1 + mean^2 / variance)``, times a small
    constant (Chan, Golub and LeVeque, table 1), here 8 for as many operations of an update. Summing squares without a
    shift would lose ``kappa^2``. The inverse deviation is that of the variance found, a sum, a root and a quotient
    later.
    """
    if rows.shape[1] == 0:
        rows = np.zeros((rows.shape[0], 1, rows.shape[2]))
    exact_mean, exact_variance = rows.mean(1), rows.var(1)
    kappa_variance = np.sqrt(exact_variance * (exact_variance + exact_mean**2))
    mean_bound = 4 * DEPTH * ROUNDOFF * abs(rows).max(1)
    errors.add(mean, exact_mean, mean_bound)
    errors.add(variance, exact_variance, 8 * DEPTH * ROUNDOFF * kappa_variance + mean_bound**2)
    exact_inverse = 1 / np.sqrt(variance.astype(np.float64) + EPS)
    errors.add(inverse_std, exact_inverse, 3 * ROUNDOFF * exact_inverse)


def run_merge(module, case, random):
    values = (case.mean + random.standard_normal((case.groups, case.rows, case.channels))).astype(np.float32)
    blocks = -(-case.rows // case.rows_per_block)
    partials = np.empty((case.groups, blocks, case.channels, 2), np.float32)
    for block in range(blocks):
        rows = values[:, block * case.rows_per_block : (block + 1) * case.rows_per_block].astype(np.float64)
        partials[:, block, :, 0] = rows.mean(1)
        partials[:, block, :, 1] = rows.var(1) * rows.shape[1]
    statistics = np.full((3, case.groups, case.channels), np.nan, np.float32)
    module.merge_statistics(partials, case.rows, case.rows_per_block, *statistics, EPS)
    errors = Errors()
    add_statistics_errors(errors, *statistics, values.astype(np.float64))
    return errors.worst


@np.errstate(invalid="ignore")
def run_passes(module, case, dtype, random):
    """Bounds are to first order in the roundoffs: one of float32 for each operation, of what it is given.

    Where the sign that the ReLU decides by is within its bound, the gradient is zero.
    """
    storage = Storage(dtype)
    stored = storage.unit_roundoff
    smallest = {"float16": 2.0**-25}.get(dtype, 2.0**-134)  # half of what a subnormal result is a multiple of
    n, channels, *_ = case.x
    shape, of_groups = case.x, (case.splits, channels)
    count = 7.0  # of the elements that sums are of, whatever the map is
    around = []  # what no kernel may write

    def empty_map():
        view, memory = channels_last(shape, storage.dtype, *case.slice, fill=77)
        around.append((memory[..., : case.slice[0]], memory[..., case.slice[0] + channels :]))
        return view

    def random_map(mean=0.0):
        view = empty_map()
        view[:] = storage.encode(mean + random.standard_normal(shape))
        return view

    def rows_of(values):  # (groups, rows, channels)
        groups = values.reshape(n // case.splits, case.splits, channels, int(np.prod(shape[2:])))
        return groups.transpose(1, 0, 3, 2).reshape(case.splits, -1, channels)

    def spread(vector):  # of groups or of all, over the map
        vector = np.broadcast_to(vector, of_groups).astype(np.float64)
        return np.tile(vector, (n // case.splits, 1)).reshape(n, channels, 1, 1, 1)

    def call(name, relu=False, results=(), count=1.0, **given):
        names = ("x", "residual", "y", "grad", "grad_x", "grad_residual", "mean", "inverse_std", "weight", "bias")
        names += ("sum_grad", "sum_grad_normalized")
        arguments = [given.get(each) for each in names] + [*results, None, None, None][:3]
        module.batch_norm(name, dtype, case.splits, case.thread_rows, relu, *arguments, count, EPS)

    errors = Errors()
    x = random_map(case.mean)
    if not case.finite:
        for channel, value in enumerate((np.nan, np.inf, -np.inf)):
            x[-1, channel, -1, -1, channel : channel + 1] = storage.encode(np.full(1, value))
    exact_x = storage.decode(x)
    statistics = np.full((3, *of_groups), np.nan, np.float32)
    call("statistics", x=x, results=statistics)
    add_statistics_errors(errors, *statistics, rows_of(exact_x))

    # Statistics near those of x, but nobody's result, so that passes are judged one by one.
    mean = np.float32(case.mean) + random.standard_normal(of_groups).astype(np.float32) / 4
    inverse_std = (0.5 + random.random(of_groups)).astype(np.float32)
    weight = random.standard_normal(channels).astype(np.float32) if case.affine else None
    bias = random.standard_normal(channels).astype(np.float32) if case.affine else None
    vectors = {"mean": mean, "inverse_std": inverse_std, "weight": weight, "bias": bias}
    scale = spread(inverse_std) * spread(1.0 if weight is None else weight)
    shift = spread(0.0 if bias is None else bias)
    centered = exact_x - spread(mean)
    residual = random_map() if case.residual else None
    exact_residual = storage.decode(residual) if case.residual else np.zeros(shape)
    before = centered * scale + shift + exact_residual
    before_bound = ROUNDOFF * (4 * abs(centered * scale) + 2 * abs(shift) + 2 * abs(exact_residual))
    expected = np.maximum(before, 0) if case.relu else before
    kept_x = x.copy() if case.in_place else x
    y = x if case.in_place else empty_map()
    call("apply", case.relu, x=x, residual=residual, y=y, **vectors)
    y_bound = before_bound + stored * abs(expected) + smallest
    errors.add(storage.decode(y), expected, y_bound)

    x = empty_map()
    x[:] = kept_x
    grad = random_map()
    exact_grad = storage.decode(grad)
    if case.relu and not case.keeps_y:
        exact_grad[abs(before) <= before_bound] = 0
        grad[:] = storage.encode(exact_grad)
    sign = storage.decode(y) if case.keeps_y else before
    g = np.where(sign <= 0, 0, exact_grad) if case.relu else exact_grad
    normalized = centered * spread(inverse_std)
    gradient = {"x": x, "grad": grad, "y": y if case.keeps_y and case.relu else None, **vectors}
    first, second = np.full((2, *of_groups), np.nan, np.float32)
    grad_residual = empty_map() if case.residual else None
    call("reduce_gradient", case.relu, results=(first, second), grad_residual=grad_residual, **gradient)
    if case.residual:
        errors.add(storage.decode(grad_residual), g, np.zeros(shape))
    errors.add(first, rows_of(g).sum(1), DEPTH * ROUNDOFF * rows_of(abs(g)).sum(1))
    errors.add(second, rows_of(g * normalized).sum(1), (DEPTH + 4) * ROUNDOFF * rows_of(abs(g * normalized)).sum(1))

    sums, centered_g, terms = {}, g, abs(g)
    if not case.frozen:
        sum_grad, sum_grad_normalized = count * random.standard_normal((2, *of_groups), np.float32)
        sums = {"sum_grad": sum_grad, "sum_grad_normalized": sum_grad_normalized, "count": count}
        part = normalized * spread(sum_grad_normalized) / count
        centered_g = g - spread(sum_grad) / count - part
        terms = terms + abs(spread(sum_grad)) / count + abs(part)
    elif gradient["y"] is not None:
        gradient["x"] = None  # of which nothing is needed
    grad_x = empty_map()
    call("apply_gradient", case.relu, grad_x=grad_x, **gradient, **sums)
    expected = scale * centered_g
    bound = 8 * ROUNDOFF * abs(scale) * terms + stored * abs(expected) + smallest
    errors.add(storage.decode(grad_x), expected, bound)
    if any((part != 77).any() for parts in around for part in parts):
        return np.inf
    return errors.worst


def run(module, case, dtype="bfloat16", seed=0):
    """The largest error of a case in units of what rounding can explain, so that more than 1 is a mistake."""
    random = np.random.default_rng(seed)
    return run_merge(module, case, random) if isinstance(case, Merge) else run_passes(module, case, dtype, random)


if __name__ == "__main__":
    sys.exit(harness.main(run, CASES, *sys.argv[1:]))
