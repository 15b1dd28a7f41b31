"""What pool_head is run on under the emulator, and how its result is judged; as a script, for harness.py."""

import sys
from dataclasses import dataclass

import harness
import numpy as np
from conv3d_cases import Storage, channels_last

DTYPES = ("bfloat16", "float16", "float32")
ROUNDOFF = 2.0**-24  # of float32


@dataclass(frozen=True)
class Case:
    slow: tuple  # N, C, T, H, W
    fast: tuple
    classes: int
    window: tuple | None = None
    softmax_positions: bool = False
    views: int = 0
    bias: bool = True
    slice: tuple = (0, 0)  # the features have so many channels before and after them
    dead_class: bool = False  # one that is never predicted: its logit is -inf


CASES = {
    # The heads of the zoo: 4x16, 8x8 (pixels of a 224 crop), 16x8; PySlowFast's test at 256 pixels. A quarter of the
    # channels, but for the first.
    "zoo_4x16": Case((1, 2048, 4, 7, 7), (1, 256, 32, 7, 7), 400),
    "zoo_8x8_views": Case((6, 512, 8, 2, 2), (6, 64, 32, 2, 2), 400, views=3),
    "zoo_16x8": Case((2, 512, 16, 2, 3), (2, 64, 64, 2, 3), 174),
    "zoo_sliding": Case((2, 512, 4, 8, 8), (2, 64, 16, 8, 8), 400, (7, 7)),
    "zoo_sliding_softmax": Case((2, 512, 4, 8, 8), (2, 64, 16, 8, 8), 400, (7, 7), True),
    "zoo_sliding_softmax_views": Case((6, 512, 2, 8, 8), (6, 64, 8, 8, 8), 400, (7, 7), True, views=3),
    # What a network does not have, but a user may.
    "different_planes": Case((2, 24, 2, 3, 5), (2, 8, 9, 6, 4), 11, bias=False),
    "three_strips_of_windows": Case((3, 40, 3, 5, 4), (3, 8, 5, 5, 4), 13, (3, 2), True),
    "wide_window": Case((2, 16, 2, 3, 9), (2, 16, 12, 3, 9), 9, (2, 7)),
    "one_row": Case((2, 16, 2, 1, 40), (2, 8, 2, 1, 40), 9, (1, 4), True, views=2),
    "odd_channels": Case((3, 5, 3, 4, 6), (3, 3, 5, 4, 6), 7, (2, 3)),
    "odd_channels_softmax": Case((3, 35, 3, 4, 6), (3, 3, 5, 4, 6), 7, (2, 3), True),
    "slices": Case((2, 64, 2, 3, 3), (2, 16, 4, 3, 3), 10, slice=(16, 8)),
    "unaligned_slices": Case((2, 64, 2, 3, 3), (2, 16, 4, 3, 3), 10, slice=(3, 2)),
    "many_views": Case((35, 8, 1, 2, 2), (35, 8, 2, 2, 2), 33, views=35),
    "dead_class": Case((2, 16, 1, 3, 3), (2, 8, 2, 3, 3), 5, (2, 2), True, dead_class=True),
    "one_element": Case((1, 1, 1, 1, 1), (1, 1, 1, 1, 1), 1, softmax_positions=True),
}


def average(x, case):
    """Of float64 features: (N, positions, C), one position for what the kernel averages at once."""
    plane = x.mean(2)
    if case.window is None:
        return plane.mean((2, 3))[:, None]
    windows = np.lib.stride_tricks.sliding_window_view(plane, case.window, axis=(2, 3)).mean((4, 5))
    positions = windows.reshape(*windows.shape[:2], -1).transpose(0, 2, 1)
    return positions if case.softmax_positions else positions.mean(1, keepdims=True)


def classify(pooled, weight):
    """A product of matrices without BLAS, in whose threads ThreadSanitizer sees races."""
    return np.einsum("npc,ck->npk", pooled, weight)


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def run(module, case, dtype="bfloat16", weight_dtype=None, seed=0):
    """The largest error of a case in units of what rounding can explain, so that more than 1 is a mistake.

    First-order bounds with u = 2^-24 (Higham, Accuracy and Stability, 3.1), of the averages, then of the logits from
    them, then of log-probabilities and result; exp and log are taken to be right to 2 units in the last place.
    """
    random = np.random.default_rng(seed)
    weight_dtype = weight_dtype or dtype
    storage, weight_storage = Storage(dtype), Storage(weight_dtype)
    features = []
    for shape in (case.slow, case.fast):
        view, _ = channels_last(shape, storage.dtype, *case.slice)
        view[:] = storage.encode(random.standard_normal(shape) + 0.5)
        features.append(view)
    channels = case.fast[1] + case.slow[1]
    weight = weight_storage.encode(random.standard_normal((case.classes, channels)) / np.sqrt(channels))
    bias = random.standard_normal(case.classes).astype(np.float32) if case.bias else None
    if case.dead_class:
        bias[0] = -np.inf

    slow, fast = (storage.decode(x) for x in features)
    pooled = np.concatenate([average(fast, case), average(slow, case)], 2)
    terms = max(np.prod(case.slow[2:]), np.prod(case.fast[2:])) + 6
    pooled_bound = terms * ROUNDOFF * np.concatenate([average(abs(fast), case), average(abs(slow), case)], 2)
    exact_weight = weight_storage.decode(weight).T
    exact_bias = np.zeros(case.classes) if bias is None else np.where(np.isinf(bias), 0, bias).astype(np.float64)
    logits = classify(pooled, exact_weight) + exact_bias
    sizes = classify(abs(pooled) + pooled_bound, abs(exact_weight)) + abs(exact_bias)
    bound = classify(pooled_bound, abs(exact_weight)) + (channels + 2) * ROUNDOFF * sizes
    if case.dead_class:
        logits[..., 0] = -np.inf

    softmax = case.softmax_positions or case.views > 0
    group = logits.shape[1] * max(case.views, 1)
    expected = logits[:, 0]
    if softmax:
        logs = log_softmax(logits)
        spread = np.where(np.isinf(logits), 0, logits.max(-1, keepdims=True) - logits)
        rounding = case.classes + 8 + 2 * np.log(case.classes) + 2 * spread
        log_bound = 2 * bound.max(-1, keepdims=True) + rounding * ROUNDOFF
        logs, log_bound = (part.reshape(-1, group, case.classes) for part in (logs, log_bound))
        expected = np.exp(logs).mean(1)
        bound = (np.exp(logs) * (np.expm1(log_bound) + (group + 6) * ROUNDOFF)).mean(1) + 2.0**-126
        if not case.views:
            with np.errstate(divide="ignore"):
                expected = np.log(expected)
            sizes = abs(np.where(np.isinf(logs), 0, logs)).max(1)
            bound = log_bound.max(1) + (group + 8 + 3 * sizes) * ROUNDOFF
    else:
        bound = bound[:, 0]

    averages = np.full((pooled.shape[0] * pooled.shape[1], channels), np.nan, np.float32)
    workspace = np.full((averages.shape[0], case.classes), np.nan, np.float32)
    y = np.full(expected.shape, np.nan, np.float32)
    arguments = (averages, workspace, y) if softmax else (averages, y, np.empty(0, np.float32))
    group = group if softmax else 0
    module.pool_head(
        dtype, weight_dtype, *features, weight, bias, case.window or (0, 0), group, not case.views, *arguments
    )

    differ = y != expected  # equal infinities have no difference
    errors = [
        abs(averages.reshape(pooled.shape) - pooled) / pooled_bound,
        abs(y[differ] - expected[differ]) / bound[differ],
    ]
    worst = max(float(error.max(initial=0)) for error in errors)
    return np.inf if np.isnan(y).any() or np.isnan(averages).any() or np.isnan(worst) else worst


if __name__ == "__main__":
    sys.exit(harness.main(run, CASES, *sys.argv[1:]))
