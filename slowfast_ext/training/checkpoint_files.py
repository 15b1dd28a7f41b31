"""Checkpoints in a folder: written whole or not at all, found again, and thinned out."""

from __future__ import annotations

import contextlib
import io
import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_NAME = re.compile(r"epoch_(\d+)(?:_iter_(\d+))?\.pth")
# The newest checkpoints, which are kept in any case: one to resume from, and one should that be damaged.
_RECENT = 2


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write beside the target, flush to the disk, rename: a reader sees the old file or the new one, never a part.

    Raises:
        OSError: as the system reports it; the target is then as it was, and nothing is left beside it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """The new name must survive a loss of power, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems cannot
        pass
    finally:
        os.close(descriptor)


def read_sound(path: Path) -> dict[str, Any]:
    """The content of a checkpoint whose every byte is as it was written.

    Raises:
        ValueError: truncated, damaged (the checksums of the archive do not fit), or not of a training run.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} does not fit")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, torch and pickle each have their own for damaged bytes
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"train: checkpoint '{path}' must be sound, got a truncated or damaged file ({reason})"
        ) from error
    if not isinstance(content, dict) or not {"state_dict", "optimizer", "training"} <= content.keys():
        raise ValueError(
            f"train: checkpoint '{path}' must be of a training run of slowfast-ext, got another file; "
            "--load-from takes the weights of any SlowFast checkpoint"
        )
    return content


@dataclass(frozen=True)
class Candidate:
    """A checkpoint by its name: ``epochs`` finished, ``iterations`` into the next one."""

    epochs: int
    iterations: int
    path: Path


class CheckpointFolder:
    """The checkpoints of a run: ``epoch_{N}.pth`` after N epochs, ``epoch_{N}_iter_{M}.pth`` M iterations later.

    ``latest.pth`` is a link to the newest; ``best_{metric}_epoch_{N}.pth`` the best of the validated ones.

    Args:
        folder: exists.
        interval: of the ``epoch_{N}.pth`` those with N a multiple stay, and the two newest.
        keep: of those that stay only this many, the newest, do; -1 for all. ``epoch_{N}_iter_{M}.pth`` stay, at most
            two of them, until an ``epoch_{N}.pth`` is newer.
    """

    def __init__(self, folder: Path, interval: int = 1, keep: int = -1):
        self.folder = folder
        self.interval = interval
        self.keep = keep

    def save(self, content: dict[str, Any], epochs: int, iterations: int = 0) -> Path:
        """Write a checkpoint, point ``latest.pth`` at it, and delete what is not to be kept.

        Raises:
            OSError: the file could not be written; all others are as they were.
        """
        name = f"epoch_{epochs}_iter_{iterations}.pth" if iterations else f"epoch_{epochs}.pth"
        path = self.folder / name
        write_file(path, _serialised(content))
        self._link(name)
        self._thin_out()
        return path

    def save_best(self, content: dict[str, Any], metric: str, epochs: int) -> Path:
        """Write ``best_{metric}_epoch_{N}.pth`` and delete the one that was the best before."""
        path = self.folder / f"best_{metric}_epoch_{epochs}.pth"
        write_file(path, _serialised(content))
        for other in self.folder.glob(f"best_{metric}_epoch_*.pth"):
            if other != path:
                other.unlink(missing_ok=True)
        return path

    def remove_leftovers(self) -> None:
        """Delete what killed runs left half written. No other run may be writing to the folder."""
        for path in self.folder.glob(".*.tmp"):
            with contextlib.suppress(OSError):
                path.unlink()

    def candidates(self) -> list[Candidate]:
        """All checkpoints to resume from, newest first."""
        found = []
        for path in self.folder.iterdir():
            if (match := _NAME.fullmatch(path.name)) and path.is_file():
                found.append(Candidate(int(match[1]), int(match[2] or 0), path))
        return sorted(found, key=lambda candidate: (candidate.epochs, candidate.iterations), reverse=True)

    def newest_sound(self) -> tuple[Path | None, dict[str, Any] | None, list[str]]:
        """The newest checkpoint that is whole, its content, and a remark on each newer one that is not."""
        remarks = []
        for candidate in self.candidates():
            try:
                return candidate.path, read_sound(candidate.path), remarks
            except ValueError as error:
                remarks.append(str(error))
        return None, None, remarks

    def _link(self, name: str) -> None:
        link, temporary = self.folder / "latest.pth", self.folder / f".latest.{os.getpid()}.tmp"
        with contextlib.suppress(OSError):  # file systems without links do without latest.pth
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(name)
            os.replace(temporary, link)

    def _thin_out(self) -> None:
        candidates = self.candidates()
        regular = [candidate for candidate in candidates if not candidate.iterations]
        rolling = [candidate for candidate in candidates if candidate.iterations]
        newest_epoch = regular[0].epochs if regular else 0
        periodic = [candidate for candidate in regular if candidate.epochs % self.interval == 0]
        kept = regular[: 1 if self.keep == 1 else _RECENT] + periodic[: None if self.keep < 0 else self.keep]
        kept += [candidate for candidate in rolling[:_RECENT] if candidate.epochs >= newest_epoch]
        superfluous = [candidate for candidate in candidates if candidate not in kept]
        for candidate in superfluous:
            with contextlib.suppress(OSError):
                candidate.path.unlink()


def _serialised(content: dict[str, Any]) -> memoryview:
    """In memory first: torch's own writer to a file answers a full disk in ways that depend on its version."""
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getbuffer()
