"""The training loop: epochs of steps, and what happens between them."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from .batch_norm import sub_batch_norms
from .batches import TrainingBatches
from .checkpoint_files import CheckpointFolder
from .distributed import Processes
from .errors import NotFiniteError, TrainingError
from .logs import RunLog
from .meter import Meter
from .multigrid import phase_of
from .precise_bn import update_statistics
from .randomness import random_states, set_random_states
from .schedules import LearningRate
from .settings import TrainingSettings
from .step import TrainingStep
from .validation import Validation


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        epoch: finished epochs.
        position: finished batches of the next one.
        iteration: batches since the beginning of the run.
        validated: finished epochs whose validation is done, where one was due.
        best_score, best_checkpoint: of the validations so far.
    """

    epoch: int = 0
    position: int = 0
    iteration: int = 0
    validated: int = 0
    best_score: float | None = None
    best_checkpoint: str | None = None


class Trainer:
    """Trains a network from where ``progress`` stands to the last epoch.

    Args:
        model: the network itself, not its :class:`DistributedDataParallel`.
        step, batches, learning_rate, log, checkpoints: see there.
        settings: the configuration.
        epochs: of the run.
        processes: of the run.
        meta: what every checkpoint says of the run.
        accumulate: batches an update.
        precise_batches: for precise BN.
        validation: or ``None``.
        metrics: scores and labels to named values, larger is better.
    """

    def __init__(
        self,
        model: nn.Module,
        step: TrainingStep,
        batches: TrainingBatches,
        learning_rate: LearningRate,
        log: RunLog,
        checkpoints: CheckpointFolder,
        settings: TrainingSettings,
        epochs: int,
        processes: Processes,
        meta: dict[str, Any],
        *,
        accumulate: int = 1,
        precise_batches: TrainingBatches | None = None,
        validation: Validation | None = None,
        metrics: Callable[[Tensor, Tensor], dict[str, float]] | None = None,
    ):
        self.model, self.step, self.batches, self.learning_rate = model, step, batches, learning_rate
        self.log, self.checkpoints, self.settings, self.epochs = log, checkpoints, settings, epochs
        self.processes, self.meta, self.accumulate = processes, meta, accumulate
        self.precise_batches, self.validation, self.metrics = precise_batches, validation, metrics
        self.progress = Progress()
        self.stop_signal: signal.Signals | None = None
        self._unsaved: str | None = None
        self._lr = 0.0
        self._norms = sub_batch_norms(model)
        self._meter = Meter(processes, gradients_may_overflow=step.scaler.is_enabled())

    def run(self) -> signal.Signals | None:
        """Train.

        Returns:
            ``None`` at the end; the signal, SIGTERM or SIGINT, that stopped the run after a checkpoint.

        Raises:
            TrainingError: the loss is not finite, the data are lost, or the last checkpoint could not be written.
        """
        with self._stopping_on_signals():
            self._validate_if_due()
            while self.progress.epoch < self.epochs:
                if self._stopping():
                    return self._stop()
                if not self._epoch():
                    return self._stop()
                self._validate_if_due()
            self._require_saved()
        if unreadable := self._meter.unreadable:
            names = ", ".join(f"'{path}' ({times})" for path, times in unreadable.most_common(5))
            self.log.warning(f"{len(unreadable)} training videos could not be read, most often: {names}")
        return None

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs, readable with ``weights_only=True``; complete in the main process."""
        for norm in self._norms.values():
            norm.aggregate()
        return {
            "meta": {
                **self.meta,
                "epoch": self.progress.epoch,
                "iter": self.progress.iteration,
                "time": time.asctime(),
                "hook_msgs": {
                    "best_score": self.progress.best_score,
                    "best_ckpt": self.progress.best_checkpoint,
                },
            },
            "state_dict": {name: value.cpu() for name, value in self.model.state_dict().items()},
            "optimizer": self.step.optimizer.state_dict(),
            "training": {
                "progress": asdict(self.progress),
                "random_states": self.processes.gather(random_states(self.processes.device)),
                "scaler": self.step.scaler.state_dict(),
                "split_statistics": {
                    name: (norm.split_mean.cpu(), norm.split_var.cpu()) for name, norm in self._norms.items()
                },
            },
        }

    def load_state(self, content: dict[str, Any]) -> list[str]:
        """The inverse of :meth:`state`.

        Returns:
            remarks on what differs from the run that wrote it.

        Raises:
            ValueError: the checkpoint is of another network.
        """
        own = self.model.state_dict()
        if {name: tuple(value.shape) for name, value in own.items()} != {
            name: tuple(value.shape) for name, value in content["state_dict"].items()
        }:
            raise ValueError(
                "train: the checkpoint to resume from must be of the configuration's network, got another one; "
                "--load-from takes the weights that fit"
            )
        remarks = []
        self.model.load_state_dict(content["state_dict"])
        self._load_optimizer(content["optimizer"])
        training = content["training"]
        if training["scaler"] and self.step.scaler.is_enabled():
            self.step.scaler.load_state_dict(training["scaler"])
        self.progress = Progress(**training["progress"])
        for name, norm in self._norms.items():
            if name in training["split_statistics"]:
                mean, variance = training["split_statistics"][name]
                norm.splits = mean.numel() // norm.num_features
                norm.split_mean, norm.split_var = mean.to(norm.weight.device), variance.to(norm.weight.device)
        states = training["random_states"]
        if len(states) == self.processes.world_size:
            set_random_states(states[self.processes.rank], self.processes.device)
        else:
            ratio = len(states) / self.processes.world_size
            self.progress.iteration = round(self.progress.iteration * ratio)
            self.progress.position = int(self.progress.position * ratio)
            remarks.append(
                f"the checkpoint is of {len(states)} processes, this run has {self.processes.world_size}: iterations "
                "are converted, random numbers begin anew"
            )
        position = self.progress.position
        if position and position != self.batches.count(self.progress.epoch):  # begin where an update does
            begun = position % self.accumulate
            self.progress.position -= begun
            self.progress.iteration -= begun
        return remarks

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """The momenta; what the configuration says of momentum and weight decay counts, not the checkpoint."""
        groups = self.step.optimizer.param_groups
        own = [{name: value for name, value in group.items() if name not in ("params", "lr")} for group in groups]
        self.step.optimizer.load_state_dict(state)
        for group, values in zip(self.step.optimizer.param_groups, own, strict=True):
            group.update(values)

    def _epoch(self) -> bool:
        """Finish an epoch; False if the run was asked to stop, which it did at a checkpoint."""
        epoch = self.progress.epoch
        self._set_splits(epoch)
        self.model.train()
        iterations = self.batches.count(epoch)
        bar = self.log.progress(epoch, self.epochs, iterations, self.progress.position)
        batches = self.batches.epoch(epoch, self.progress.position)
        self._meter.reset()
        try:
            while self.progress.position < iterations:
                self._iteration(self._next(batches), epoch, iterations)
                bar.update()
                if self._at_update(iterations) and not self._after_update(iterations):
                    return False
        finally:
            bar.close()
            batches.close()
        self._flush(iterations)
        for norm in self._norms.values():
            norm.aggregate()
        if not self._precise_bn(epoch):
            return False
        self.progress.epoch, self.progress.position = epoch + 1, 0
        self._save()
        return True

    def _next(self, batches: Iterator[dict]) -> dict:
        began = time.perf_counter()
        try:
            batch = next(batches)
        except (RuntimeError, StopIteration) as error:
            raise TrainingError(f"the loader must give a batch, got an error: {error}") from error
        self._meter.add_batch(time.perf_counter() - began, batch["errors"])
        return batch

    def _iteration(self, batch: dict, epoch: int, iterations: int) -> None:
        progress = self.progress
        group = progress.position // self.accumulate
        parts = min(self.accumulate, iterations - group * self.accumulate)
        lr = self.learning_rate(epoch, progress.iteration, iterations)
        progress.position += 1
        progress.iteration += 1
        self._lr = lr
        self._meter.add_step(self.step(batch, lr, parts=parts, update=self._at_update(iterations)))

    def _at_update(self, iterations: int) -> bool:
        """Whether the weights have been updated by all gradients so far."""
        return self.progress.position % self.accumulate == 0 or self.progress.position == iterations

    def _after_update(self, iterations: int) -> bool:
        """Log and save what is due; False to stop."""
        position = self.progress.position
        # An update that crosses a multiple counts for it: updates come every `accumulate` iterations.
        due = position // self.settings.log_interval != (position - self.accumulate) // self.settings.log_interval
        if due:
            self._flush(iterations)
        every = self.settings.checkpoint.iterations
        total = self.progress.iteration
        if every and total // every != (total - self.accumulate) // every and position < iterations:
            self._flush(iterations)
            self._save()
        if self._stopping():
            self._flush(iterations)
            return False
        return True

    def _flush(self, iterations: int) -> None:
        """Log the means since the last line, over all processes, and see that all of it is finite."""
        progress = self.progress
        try:
            measured = self._meter.close_window()
        except NotFiniteError as error:
            iteration = progress.position - error.back * (1 if error.what == "loss" else self.accumulate)
            raise TrainingError(
                f"{error} in epoch {progress.epoch + 1}, iteration {max(iteration, 1)} (learning rate {self._lr:.3g}); "
                "the newest checkpoint is from before"
            ) from error
        if measured is None:
            return
        values, failures = measured
        for failure in failures:
            self.log.warning(f"cannot read '{failure.path}': {failure.reason}; another video takes its place")
        values = {"epoch": progress.epoch + 1, "iter": progress.position, "lr": self._lr, **values}
        # As if all epochs to come were as long as this one.
        left = (self.epochs - progress.epoch) * iterations - progress.position
        self.log.train(values, iterations, left * self._meter.seconds_per_step, progress.iteration)

    def _set_splits(self, epoch: int) -> None:
        """Sub-batch norm keeps the statistics of full-size batches."""
        if self._norms and self.batches.phases:
            splits = phase_of(self.batches.phases, epoch).shape.multiplier
            for norm in self._norms.values():
                if norm.splits != splits:
                    norm.set_splits(splits)

    def _precise_bn(self, epoch: int) -> bool:
        """Recompute the batch statistics if that is due; False if the run was asked to stop meanwhile."""
        precise = self.settings.precise_bn
        if precise is None or (epoch + 1) % precise.interval:
            return True
        self.log.info(f"recomputing batch statistics over {precise.num_iters} batches")
        batches = self.precise_batches.epoch(epoch)

        def clips() -> Iterator[Tensor]:
            for batch in batches:
                if self._stopping():
                    return
                yield self.step.clip(batch)

        try:
            with self.step.autocast():
                update_statistics(self.model.backbone, clips(), precise.num_iters)
        except ValueError:  # too few batches: the statistics are as before
            if self.stop_signal is None:
                raise
            return False
        finally:
            batches.close()
        return True

    def _save(self) -> None:
        """Write a checkpoint. If that fails, say so and go on: the work is in memory, the disk may have room later."""
        content = self.state()
        reason = None
        if self.processes.is_main:
            try:
                path = self.checkpoints.save(content, self.progress.epoch, self.progress.position)
            except OSError as error:
                reason = f"{error.strerror or error}"
            else:
                self.log.info(f"checkpoint: {path}")
        self._unsaved = self.processes.from_main(reason)
        if self._unsaved:
            self.log.warning(
                f"the checkpoint after {self.progress.epoch} epochs and {self.progress.position} iterations cannot be "
                f"written: {self._unsaved}; the ones before are untouched, the run goes on and tries again"
            )

    def _require_saved(self) -> None:
        if self._unsaved:
            self._save()
        if self._unsaved:
            raise TrainingError(f"the last checkpoint must be written, got: {self._unsaved}")

    def _validate_if_due(self) -> None:
        """Validate after a finished epoch, also where a run was stopped between its checkpoint and its validation."""
        epoch, evaluation = self.progress.epoch, self.settings.evaluation
        if self.validation is None or self.progress.position or epoch == 0 or self.progress.validated >= epoch:
            return
        if not validation_due(epoch, evaluation.interval, evaluation.start):
            return
        result = self.validation.scores(self.model, self.step.autocast, lambda: self.stop_signal is not None)
        if result is None:
            return
        if result.failures:
            paths = ", ".join(f"'{failure.path}'" for failure in result.failures[:5])
            self.log.warning(f"validation: {len(result.failures)} videos cannot be read and are left out: {paths}")
        values = self.metrics(result.scores, result.labels)
        lr = self.step.optimizer.param_groups[0]["lr"]
        self.log.validation({"epoch": epoch, "iter": result.batches, "lr": lr, **values}, self.progress.iteration)
        self.progress.validated = epoch
        self._keep_best(values)

    def _keep_best(self, values: dict[str, float]) -> None:
        wanted = self.settings.evaluation.save_best
        if wanted is None:
            return
        metric = next(iter(values)) if wanted == "auto" else wanted
        if self.progress.best_score is not None and values[metric] <= self.progress.best_score:
            return
        self.progress.best_score = values[metric]
        self.progress.best_checkpoint = f"best_{metric}_epoch_{self.progress.epoch}.pth"
        content = self.state()
        if self.processes.is_main:
            try:
                self.checkpoints.save_best(content, metric, self.progress.epoch)
            except OSError as error:
                self.log.warning(f"the best checkpoint cannot be written: {error.strerror or error}")
            else:
                self.log.info(f"best {metric}: {values[metric]:.4f} in epoch {self.progress.epoch}")

    @contextlib.contextmanager
    def _stopping_on_signals(self):
        """The first SIGTERM or SIGINT asks for a stop; a second SIGINT interrupts as ever."""

        def ask(number, frame):
            self.stop_signal = signal.Signals(number)
            signal.signal(number, before[number])

        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stopping(self) -> bool:
        """Whether any process was asked to stop; all of them learn it."""
        number = self.processes.maximum(int(self.stop_signal or 0))
        self.stop_signal = signal.Signals(number) if number else None
        return bool(number)

    def _stop(self) -> signal.Signals:
        self._save()
        self._require_saved()
        self.log.info(f"stopped by {self.stop_signal.name}; --resume-from auto goes on from here")
        return self.stop_signal


def validation_due(epoch: int, interval: int, start: int | None) -> bool:
    """Whether the set is validated after ``epoch`` epochs: every ``interval``, counted from ``start`` where given."""
    if start is None:
        return epoch % interval == 0
    return epoch >= start and (epoch - start) % interval == 0


def epochs_of(settings: TrainingSettings) -> int:
    """Epochs of the run; multigrid stretches those of its schedule."""
    factor = settings.multigrid.epoch_factor if settings.multigrid else 1
    return math.floor(settings.epochs * factor)
