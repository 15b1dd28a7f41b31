"""What a run tells: lines of text, lines of JSON, TensorBoard, and a progress bar."""

from __future__ import annotations

import datetime
import json
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from .distributed import Processes

_FORMAT = "%(asctime)s - %(name)s - %(levelname)s - %(message)s"


class RunLog:
    """The logs of a run, in ``<timestamp>.log`` and ``<timestamp>.log.json``, kept by the main process alone.

    A log that can no longer be written (a full disk) is said once on stderr and does not end the run.

    Args:
        folder: exists and is writable.
        meta: first line of the JSON lines.
        tensorboard: write event files into ``tf_logs``, too.

    Raises:
        ImportError: TensorBoard is wanted and not installed.
        OSError: the files cannot be made.
    """

    def __init__(self, folder: Path, processes: Processes, meta: Mapping[str, Any], tensorboard: bool = False):
        self.active = processes.is_main
        self._logger = logging.getLogger("slowfast_ext")
        self._handlers: list[logging.Handler] = []
        self._json: TextIO | None = None
        self._writer = None
        self._bar: tqdm | None = None
        if not self.active:
            return
        stamp = time.strftime("%Y%m%d_%H%M%S")
        if tensorboard:
            self._writer = _summary_writer(folder / "tf_logs")
        self._json = (folder / f"{stamp}.log.json").open("a", encoding="utf-8")
        handlers = [_BesideTheBar(), logging.FileHandler(folder / f"{stamp}.log", encoding="utf-8", delay=False)]
        for handler in handlers:
            handler.setFormatter(logging.Formatter(_FORMAT))
            handler.handleError = self._complain
            self._logger.addHandler(handler)
        self._handlers = handlers
        self._logger.setLevel(logging.INFO)
        self._logger.propagate = False
        self._complained = False
        self._write_json(meta)

    def info(self, message: str) -> None:
        if self.active:
            self._logger.info(message)

    def warning(self, message: str) -> None:
        if self.active:
            self._logger.warning(message)

    def train(self, values: Mapping[str, Any], iterations: int, eta_seconds: float, step: int) -> None:
        """One line of training.

        Args:
            values: ``epoch``, ``iter`` (both from 1), ``lr`` and whatever was averaged.
            iterations: in the epoch.
            eta_seconds: to the end of the run.
            step: iterations since the run began.
        """
        if not self.active:
            return
        rest = {name: value for name, value in values.items() if name not in ("epoch", "iter", "lr", "time")}
        eta = datetime.timedelta(seconds=int(eta_seconds))
        parts = [f"lr: {values['lr']:.3e}", f"eta: {eta}", f"time: {values['time']:.3f}"]
        parts += [f"{name}: {value:{'d' if isinstance(value, int) else '.4f'}}" for name, value in rest.items()]
        self._logger.info(f"Epoch [{values['epoch']}][{values['iter']}/{iterations}]\t{', '.join(parts)}")
        self._record("train", values, step)

    def validation(self, values: Mapping[str, Any], step: int) -> None:
        """One line of validation: ``epoch``, ``iter`` (batches of the loader), ``lr`` and the metrics."""
        if not self.active:
            return
        metrics = {name: value for name, value in values.items() if name not in ("epoch", "iter", "lr")}
        shown = ", ".join(f"{name}: {value:.4f}" for name, value in metrics.items())
        self._logger.info(f"Epoch(val) [{values['epoch']}][{values['iter']}]\t{shown}")
        self._record("val", values, step)

    def progress(self, epoch: int, epochs: int, iterations: int, done: int) -> tqdm:
        """A bar over the iterations of an epoch (from 0), with its time to the end; hidden where nobody looks."""
        self._bar = tqdm(
            total=iterations,
            initial=done,
            desc=f"epoch {epoch + 1}/{epochs}",
            unit="batch",
            leave=False,
            dynamic_ncols=True,
            disable=None if self.active else True,
        )
        return self._bar

    def close(self) -> None:
        for handler in self._handlers:
            self._logger.removeHandler(handler)
            handler.close()
        self._handlers = []
        self._logger.propagate = True
        if self._json is not None:
            try:
                self._json.close()
            except OSError as error:
                self._say_once(error)
        if self._writer is not None:
            self._writer.close()

    def _record(self, mode: str, values: Mapping[str, Any], step: int) -> None:
        rounded = {name: round(value, 5) if isinstance(value, float) else value for name, value in values.items()}
        self._write_json({"mode": mode, **rounded})
        if self._writer is not None:
            for name, value in values.items():
                if name not in ("epoch", "iter"):
                    self._writer.add_scalar("learning_rate" if name == "lr" else f"{mode}/{name}", value, step)

    def _write_json(self, values: Mapping[str, Any]) -> None:
        try:
            self._json.write(json.dumps(values) + "\n")
            self._json.flush()
        except OSError as error:
            self._say_once(error)

    def _complain(self, record: logging.LogRecord) -> None:
        self._say_once(sys.exc_info()[1])

    def _say_once(self, error: BaseException | None) -> None:
        if not self._complained:
            self._complained = True
            print(f"slowfast-ext train: warning: the log cannot be written: {error}", file=sys.stderr)


class _BesideTheBar(logging.Handler):
    """Prints above the progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except Exception:
            self.handleError(record)


def _summary_writer(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "log_config: TensorboardLoggerHook must find TensorBoard, got none installed: pip install tensorboard"
        ) from error
    return SummaryWriter(str(folder))


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a ``.log.json``; a last line that a killed run left incomplete is dropped.

    Raises:
        ValueError: a line, not the last, is no JSON; the message has its number.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"log: '{path}' line {number} must be JSON, got an error: {error.msg}") from error
    return entries
