"""How long calls take, side by side, how much memory they need, and how far their results are off."""

from __future__ import annotations

import ctypes
import gc
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor

FEWEST_ROUNDS = 3  # also where the time budget is spent: a median of fewer samples is none
MOST_ROUNDS = 2000  # where a round takes microseconds, the time budget would fill the memory with samples
# Largest ||output - reference|| / ||reference|| of a network's logits, the reference being plain float32 without TF32.
# Rounding gives 3e-6, 3e-2 and 3e-3 in R50 (eager and fused alike), a missing residual branch 6e-2 and more.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
TF32_TOLERANCE = TOLERANCE[torch.float16]  # its mantissa is as long


@dataclass(frozen=True)
class Summary:
    """Median, 10th and 90th percentile (linear interpolation between samples), in the unit of the samples."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, samples: list[float]) -> Summary:
        if not samples:
            raise ValueError("Summary.of: samples must not be empty, got []")
        p10, median, p90 = numpy.percentile(samples, (10, 50, 90))
        return cls(float(median), float(p10), float(p90))


def time_once(call: Callable[[], object], device: torch.device, before: Callable[[], object] | None = None) -> float:
    """Milliseconds of one call: CUDA events where there are any, else the host's clock.

    Args:
        before: runs first and is not timed. The device is idle before it, and without it before the call; with it, the
            host launches ``call`` while the device is still busy, so that no launch is timed.
    """
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        if before is not None:
            before()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    if before is not None:
        before()
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def shuffled_rounds(
    calls: dict[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int | None,
    seconds: float,
    seed: int = 0,
    before: Callable[[], object] | None = None,
) -> Iterator[dict[str, float]]:
    """Time every callable once a round, in the rounds of :func:`shuffled_orders`.

    Args:
        calls: callables by name, already warm.
        before: runs before each call, see :func:`time_once`.

    Yields:
        milliseconds by name, once a round.
    """
    for order in shuffled_orders(calls, rounds=rounds, seconds=seconds, seed=seed):
        yield {name: time_once(calls[name], device, before) for name in order}


def shuffled_orders(names: Iterable[str], *, rounds: int | None, seconds: float, seed: int = 0) -> Iterator[list[str]]:
    """The names in another random order each round, so that drift of the machine (clocks, heat, other users) and the
    state of its caches fall on all of them alike.

    Args:
        rounds: this many rounds; None for as many as begin within ``seconds`` (at least FEWEST_ROUNDS, at most
            MOST_ROUNDS).
    """
    order, shuffle = list(names), random.Random(seed).shuffle
    deadline = time.perf_counter() + seconds
    for done in range(MOST_ROUNDS if rounds is None else rounds):
        if rounds is None and done >= FEWEST_ROUNDS and time.perf_counter() > deadline:
            return
        shuffle(order)
        yield order


def peak_memory(call: Callable[[], object], device: torch.device, held: int = 0) -> int | None:
    """Bytes that one call needs: of a GPU what torch had allocated at most, less ``held``; else :func:`peak_growth`."""
    if device.type != "cuda":
        return peak_growth(call)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) - held


def peak_growth(call: Callable[[], object]) -> int | None:
    """Bytes by which the resident memory of this process rises above its present value during one call.

    The kernel's own high-water mark, reset before the call (Linux, ``/proc/self/clear_refs``); None elsewhere.
    """
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory that the allocator keeps would hide growth
        Path("/proc/self/clear_refs").write_text("5")
        before = _process_memory("VmRSS")
        call()
        return max(0, _process_memory("VmHWM") - before)
    except (OSError, AttributeError):
        return None


def _process_memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def relative_error(output: Tensor, reference: Tensor) -> float:
    """``||output - reference|| / ||reference||``, of tensors of one shape, dtype and device."""
    return float(torch.linalg.vector_norm(output - reference) / torch.linalg.vector_norm(reference))


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    """The largest :func:`relative_error` of logits that were computed in ``dtype``."""
    if dtype == torch.float32 and device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        return TF32_TOLERANCE
    return TOLERANCE[dtype]
