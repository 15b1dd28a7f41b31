"""What worker processes are made to suffer. A module of its own, for they import it."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import torch

from slowfast_ext.data import VideoDataset


def task(request):
    """Do as ``request`` says."""
    kind, *arguments = request if isinstance(request, tuple) else (request,)
    if kind == "double":
        return 2 * arguments[0]
    if kind == "tensor":
        return {
            "zeros": torch.zeros(0, 3),
            "bytes": torch.tensor([1, 2, 3], dtype=torch.uint8),
            "numbers": torch.arange(arguments[0]).reshape(2, -1),
            "pid": os.getpid(),
        }
    if kind == "sleep":
        time.sleep(arguments[0])
    if kind == "hang":
        while True:
            time.sleep(60)
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "exit":
        os._exit(3)
    if kind == "raise":
        raise KeyError("no such thing")
    if kind == "announce":
        Path(arguments[0]).write_text(str(os.getpid()))
        time.sleep(600)
    return os.getpid()


class NoFunction:
    """Does not unpickle, so that no process with it starts."""

    def __reduce__(self):
        return os._exit, (7,)


class FaultyDataset(VideoDataset):
    """Videos whose name says what their decoder does."""

    def _open(self, entry):
        name = Path(entry.path).stem
        if name == "hangs":
            task("hang")
        if name == "dies":
            task("die")
        if name == "raises":
            raise ZeroDivisionError("a mistake in the program")
        if name.startswith("recovers"):
            marker = Path(self.root, f"{name}.tried")
            if not marker.exists():
                marker.touch()
                task("die")
        return _Counting(int(name.split("-")[-1]))


class _Counting:
    """A video of 40 frames of one colour, which says its number and the frame's."""

    fps = 25.0

    def __init__(self, number):
        self.number = number

    def __len__(self):
        return 40

    def read(self, indices):
        return (np.full((20, 24, 3), (self.number, index, 0), np.uint8) for index in indices)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass
