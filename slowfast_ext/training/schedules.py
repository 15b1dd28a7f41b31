"""The learning rate of every iteration."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .multigrid import Phase, phase_of
from .settings import OptimizerSettings, ScheduleSettings


def regular_rate(lr: float, schedule: ScheduleSettings, epoch: int, epochs: int) -> float:
    """The rate of epoch ``epoch`` (from 0) of ``epochs`` without warm-up, constant within the epoch.

    ``cosine``: ``min_lr + (lr - min_lr) * (1 + cos(pi * epoch / epochs)) / 2`` (Loshchilov and Hutter, arXiv
    1608.03983, without restarts). ``step``: ``lr * gamma`` to the number of steps reached, at least ``min_lr``.
    """
    if schedule.policy == "cosine":
        return schedule.min_lr + (lr - schedule.min_lr) * (1 + math.cos(math.pi * epoch / epochs)) / 2
    return max(lr * schedule.gamma ** sum(step <= epoch for step in schedule.steps), schedule.min_lr)


@dataclass(frozen=True)
class LearningRate:
    """The rate as a function of epoch and iteration.

    Args:
        optimizer, schedule: see there.
        epochs: of the schedule.
        phases: of the multigrid long cycle, empty without multigrid.
    """

    optimizer: OptimizerSettings
    schedule: ScheduleSettings
    epochs: int
    phases: tuple[Phase, ...] = ()

    def __call__(self, epoch: int, iteration: int, iterations_per_epoch: int) -> float:
        """The rate of an iteration.

        Args:
            epoch: from 0.
            iteration: from 0, counted over the whole run.
            iterations_per_epoch: of this epoch; turns a warm-up in epochs into iterations.

        The warm-up multiplies the regular rate by ``1 - (1 - i / W) * (1 - ratio)`` in iteration i of W.
        """
        if self.phases:
            return self._multigrid(epoch)
        rate = regular_rate(self.optimizer.lr, self.schedule, epoch, self.epochs)
        warmup = self.schedule.warmup * (iterations_per_epoch if self.schedule.warmup_by_epoch else 1)
        if iteration < warmup:
            rate *= 1 - (1 - iteration / warmup) * (1 - self.schedule.warmup_ratio)
        return rate

    def _multigrid(self, epoch: int) -> float:
        """One rate a phase; the warm-up is linear in epochs, from ``lr * warmup_ratio`` to the first phase's."""
        rate = self.optimizer.lr * phase_of(self.phases, epoch).rate
        if epoch >= self.schedule.warmup:
            return rate
        start = self.optimizer.lr * self.schedule.warmup_ratio
        end = self.optimizer.lr * phase_of(self.phases, self.schedule.warmup).rate
        return start + epoch * (end - start) / self.schedule.warmup
