import contextlib
import errno
import os
from pathlib import Path

import pytest


class _FullDisk:
    """A file that takes half of what it is given."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()

    def write(self, data):
        self.file.write(bytes(data)[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def full_disk(monkeypatch):
    """A context in which the disk is full for files that are opened to write bytes."""
    real = Path.open

    def opened(path, mode="r", *args, **kwargs):
        file = real(path, mode, *args, **kwargs)
        return _FullDisk(file) if mode == "wb" else file

    @contextlib.contextmanager
    def full():
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", opened)
            yield

    return full
