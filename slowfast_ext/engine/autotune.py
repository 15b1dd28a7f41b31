"""Which of several ways to compute a layer is fastest here: measured once, checked once, remembered in a file."""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

FORMAT = 1  # of the cache file
# Largest ||output - reference|| / ||reference|| of a candidate, the reference being float32: rounding of the operands
# gives up to 1e-6, 6e-3 and 7e-4 in SlowFast's layers, TF32 what float16 does.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3, "tf32": 2e-3}
ROUNDS = 5  # the least of so many times counts: what disturbs a measurement makes it longer


@dataclass(frozen=True)
class Candidate:
    """One way to compute something.

    Attributes:
        name: in the plan and in the cache.
        run: without arguments; its result is checked and then dropped.
    """

    name: str
    run: Callable[[], Tensor]


def cache_path() -> Path:
    """``$SLOWFAST_EXT_CACHE/autotune.json``, else ``slowfast_ext/autotune.json`` in the user's cache folder."""
    folder = os.environ.get("SLOWFAST_EXT_CACHE")
    if folder:
        return Path(folder, "autotune.json")
    base = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "slowfast_ext", "autotune.json")


class Tuner:
    """Chooses candidates, from the cache where it knows them.

    Args:
        device: on which the candidates run.
        versions: of everything else that the times depend on; results under another device or version do not count.
        enabled: if not, the first candidate is taken everywhere and no file is touched.
        path: of the cache file.
    """

    def __init__(self, device: torch.device, versions: str, enabled: bool = True, path: Path | None = None):
        self.device, self.enabled = device, enabled
        self._path = cache_path() if path is None else path
        self._machine = f"{device_name(device)}, {versions}"
        self._known = self._read().get(self._machine, {}) if enabled else {}
        self._new: dict[str, dict] = {}

    def choose(
        self, key: str, candidates: Sequence[Candidate], reference: Callable[[], Tensor], limit: float
    ) -> tuple[str, str]:
        """The name of the fastest candidate whose result is right, and why it was chosen.

        Args:
            key: what is computed, with all that its time depends on: shapes, strides, type.
            candidates: at least one; the first is taken without tuning, and where no other is right.
            reference: gives the result in float32.
            limit: largest ``||result - reference|| / ||reference||`` of a right one.
        """
        if len(candidates) == 1:
            return candidates[0].name, "the only one"
        if not self.enabled:
            return candidates[0].name, "not tuned"
        names = [candidate.name for candidate in candidates]
        entry = self._known.get(key)
        if isinstance(entry, dict) and entry.get("candidates") == names and entry.get("kernel") in names:
            return entry["kernel"], f"tuned before: {_times(entry.get('milliseconds'))}"
        expected = reference()
        runners = [candidate for candidate in candidates if self._is_right(key, candidate, expected, limit)]
        del expected
        if not runners:
            raise RuntimeError(f"InferenceEngine: no kernel computes {key} right; please report this")
        times = dict.fromkeys((candidate.name for candidate in runners), math.inf)
        for _ in range(ROUNDS):  # in turns, so that a change of the clock falls on all of them
            for candidate in runners:
                times[candidate.name] = min(times[candidate.name], 1e3 * self._seconds(candidate))
        best = min(times, key=times.get)
        entry = {"kernel": best, "candidates": names, "milliseconds": {name: round(t, 5) for name, t in times.items()}}
        self._known[key] = self._new[key] = entry
        return best, f"tuned: {_times(entry['milliseconds'])}"

    def save(self) -> None:
        """Add what was measured to the file. What other processes wrote meanwhile is kept; readers see whole files."""
        if not self._new:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self._path.with_suffix(".lock")):
                entries = self._read()
                entries.setdefault(self._machine, {}).update(self._new)
                _write(self._path, {"format": FORMAT, "entries": entries})
        except OSError as error:
            warnings.warn(f"autotune: results cannot be kept in '{self._path}': {error}", stacklevel=2)
        self._new = {}

    def _is_right(self, key: str, candidate: Candidate, expected: Tensor, limit: float) -> bool:
        try:
            output = candidate.run().float()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # libraries refuse shapes that they have no kernel for
            logger.info("autotune: %s cannot compute %s: %s", candidate.name, key, error)
            return False
        error = torch.linalg.vector_norm(output - expected) / torch.linalg.vector_norm(expected).clamp_min(1e-30)
        if float(error) <= limit:  # NaN is wrong
            return True
        warnings.warn(
            f"autotune: {candidate.name} is off by {float(error):.1e} in {key}, allowed {limit:.0e}; it is not used",
            stacklevel=3,
        )
        return False

    def _seconds(self, candidate: Candidate) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            candidate.run()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        candidate.run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def _read(self) -> dict[str, dict]:
        """The entries of the file by machine; empty if there is none, or, with a warning, if it is not one of ours."""
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            warnings.warn(f"autotune: '{self._path}' is ignored: {error}", stacklevel=3)
            return {}
        entries = content.get("entries") if isinstance(content, dict) and content.get("format") == FORMAT else None
        if not isinstance(entries, dict) or not all(isinstance(known, dict) for known in entries.values()):
            warnings.warn(f"autotune: '{self._path}' is ignored: not in the format of this version", stacklevel=3)
            return {}
        return entries


def _times(milliseconds: object) -> str:
    if not isinstance(milliseconds, dict):  # of a file that somebody edited
        return "no times"
    return ", ".join(f"{name} {value:.3g} ms" for name, value in sorted(milliseconds.items(), key=lambda item: item[1]))


def device_name(device: torch.device) -> str:
    """The GPU, or the processor with the instructions and threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = ""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or 'CPU'} ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"


@contextmanager
def _locked(path: Path):
    """Only one process at a time; where the system has no such locks, the last one's results stay."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(path: Path, content: dict) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
