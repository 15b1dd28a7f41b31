"""What is measured between two lines of the log."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..data import Failure
from .distributed import Processes
from .errors import NotFiniteError

_AVERAGED = ("top1_acc", "top5_acc", "loss_cls", "loss", "grad_norm")


@dataclass
class _Window:
    results: list[dict[str, Tensor]] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    data_seconds: float = 0.0
    began: float = field(default_factory=time.perf_counter)


class Meter:
    """Collects the results of steps, on the device, and averages them over steps and processes when asked.

    Args:
        processes: of the run.
        gradients_may_overflow: as those of a scaled loss do; the update is then left out and the scale lowered.

    Attributes:
        unreadable: how often each video could not be read; complete in all processes.
    """

    def __init__(self, processes: Processes, gradients_may_overflow: bool):
        self.processes = processes
        self.gradients_may_overflow = gradients_may_overflow
        self.unreadable: Counter[str] = Counter()
        self._window = _Window()
        self._seconds = 0.0
        self._steps = 0

    def reset(self) -> None:
        """Begin a window; what was between the last one and now does not count as training."""
        self._window = _Window()

    def add_batch(self, seconds: float, failures: list[Failure]) -> None:
        """The time that was waited for a batch, and its unreadable videos."""
        self._window.data_seconds += seconds
        self._window.failures += failures

    def add_step(self, result: dict[str, Tensor]) -> None:
        """What :class:`TrainingStep` returns."""
        self._window.results.append(result)

    @property
    def seconds_per_step(self) -> float:
        return self._seconds / max(self._steps, 1)

    def close_window(self) -> tuple[dict[str, Any], list[Failure]] | None:
        """Means of the window, over all processes, and the unreadable videos of all; ``None`` if it is empty.

        All processes must call it at the same step.

        Raises:
            NotFiniteError: in all processes alike.
        """
        window, self._window = self._window, _Window()
        if not window.results:
            return None
        count = len(window.results)
        failures = [failure for part in self.processes.gather(window.failures) for failure in part]
        self.unreadable.update(failure.path for failure in failures)
        columns = {name: self._column(window.results, name) for name in _AVERAGED}
        _require_finite("loss", columns["loss"])
        if not self.gradients_may_overflow:
            _require_finite("norm of the gradients", columns["grad_norm"])
        seconds = time.perf_counter() - window.began
        self._seconds += seconds
        self._steps += count
        values: dict[str, Any] = {}
        if self.processes.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.processes.device) // 2**20
            values["memory"] = self.processes.maximum(int(peak))
        values["data_time"] = window.data_seconds / count
        values |= {name: column[column.isfinite()].mean().item() for name, column in columns.items()}
        values["time"] = seconds / count
        return values, failures

    def _column(self, results: list[dict[str, Tensor]], name: str) -> Tensor:
        return self.processes.mean(torch.stack([result[name] for result in results if name in result]))


def _require_finite(what: str, column: Tensor) -> None:
    bad = (~column.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise NotFiniteError(what, column[bad[0]].item(), len(column) - 1 - bad[0])
