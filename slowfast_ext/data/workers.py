"""Processes that work on one task after the other, are ended where they take too long, and are replaced where they die.

A decoder that hangs inside C code answers no exception and no signal handler, and one that crashes takes its process
along. So each task runs in a process that can be killed, and its result comes back in memory of its own.
"""

import contextlib
import io
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from multiprocessing import connection, reduction
from typing import Any, BinaryIO

import cv2
import torch

_ALIGNMENT = 64  # of the tensors of a result in its memory


@dataclass(frozen=True)
class TaskFailure:
    """A task that has no result, and why: it took too long, or its process died."""

    reason: str


class WorkerPool:
    """Processes that apply a function to tasks.

    Each process works on its tasks in order. A task that takes longer than ``timeout`` is ended with its process;
    the tasks behind it go to the others. An exception in the function ends the pool, with the traceback in the error.

    Args:
        function: applied to each task in a process of its own; it, tasks and results must pickle. Tensors of results
            are not pickled but shared.
        workers: processes.
        timeout: seconds for one task, None for no limit.
    """

    def __init__(self, function: Callable[[Any], Any], workers: int, timeout: float | None):
        if workers < 1:
            raise ValueError(f"WorkerPool: workers must be at least 1, got {workers}")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"WorkerPool: timeout must be positive or None, got {timeout}")
        self._context = _context()
        self.workers, self._function, self._timeout = workers, function, timeout
        self._workers = [_Worker(self._context, function) for _ in range(workers)]

    def __len__(self) -> int:
        """Tasks that were submitted and have not come back."""
        return sum(len(worker.tasks) for worker in self._workers)

    def submit(self, key: Hashable, task: Any) -> None:
        """Give a task to the process with the fewest. ``key`` comes back with its result."""
        if not self._workers:
            raise RuntimeError("WorkerPool: the pool must be open, got a closed one")
        worker = min(self._workers, key=lambda worker: len(worker.tasks))
        if not worker.tasks:
            worker.began = time.monotonic()
        worker.tasks.append((key, task))
        with contextlib.suppress(OSError):  # it has died, which `wait` sees
            worker.connection.send(task)

    def wait(self) -> list[tuple[Any, Any]]:
        """Wait until tasks are done.

        Returns:
            keys with results, or with `TaskFailure`; at least one where a task is under way.

        Raises:
            RuntimeError: the function raised an exception, or its process could not start.
        """
        done = []
        while not done and len(self):
            busy = {worker.connection: worker for worker in self._workers if worker.tasks}
            now = time.monotonic()
            limit = None
            if self._timeout is not None:
                deadlines = [worker.began + self._timeout for worker in busy.values() if worker.ready]
                limit = max(min(deadlines) - now, 0) if deadlines else None
            answering = connection.wait(list(busy), limit)
            for end in answering:
                done += self._receive(busy[end])
            if not answering and limit is not None:
                done += self._end_overdue()
        return done

    def _receive(self, worker: "_Worker") -> list[tuple[Any, Any]]:
        try:
            kind, worker.began, content = worker.receive()
        except (EOFError, OSError):
            return [self._replace(worker, worker.cause_of_death())]
        if kind == "ready":
            worker.ready = True
            return []
        key, _ = worker.tasks.popleft()
        if kind == "exception":
            raise RuntimeError(f"a worker process failed:\n{content}")
        return [(key, content)]

    def _end_overdue(self):
        failures = []
        for worker in self._workers:
            if worker.tasks and worker.ready and time.monotonic() >= worker.began + self._timeout:
                if worker.connection.poll():  # it has just finished
                    continue
                failures.append(self._replace(worker, f"it took longer than {self._timeout:g} s"))
        return failures

    def _replace(self, worker: "_Worker", reason: str) -> tuple[Any, TaskFailure]:
        """End a process, start another in its place, and hand on the tasks behind the one that failed."""
        worker.end()
        if not worker.ready:
            raise RuntimeError(f"a worker process could not start: {reason}")
        self._workers[self._workers.index(worker)] = _Worker(self._context, self._function)
        (key, _), *others = worker.tasks
        for other in others:
            self.submit(*other)
        return key, TaskFailure(reason)

    def cancel(self) -> None:
        """Forget all tasks; processes that work on one are replaced."""
        for place, worker in enumerate(self._workers):
            if worker.tasks:
                worker.end()
                self._workers[place] = _Worker(self._context, self._function)

    def close(self) -> None:
        """End all processes."""
        for worker in self._workers:
            worker.end()
        self._workers = []


class _Worker:
    """One process, seen from outside.

    Attributes:
        tasks: keys and tasks it was given, the one it works on first.
        ready: it has started and can be given a time limit.
        began: when it began with its first task, on the clock of time.monotonic.
    """

    def __init__(self, context, function):
        self.connection, other_end = context.Pipe()
        self.process = context.Process(target=_work, args=(other_end, function), daemon=True)
        self.process.start()
        other_end.close()
        self.tasks = deque()
        self.ready = False
        self.began = time.monotonic()

    def receive(self) -> tuple[str, float, Any]:
        kind, stamp, sizes, content = self.connection.recv()
        if sizes is None:
            return kind, stamp, content
        descriptor = reduction.recv_handle(self.connection)
        try:
            memory = memoryview(mmap.mmap(descriptor, 0))
        finally:
            os.close(descriptor)
        buffers, start = [], 0
        for size in sizes:
            buffers.append(memory[start : start + size])
            start += _aligned(size)
        return kind, stamp, pickle.loads(content, buffers=buffers)

    def cause_of_death(self) -> str:
        self.process.join(5)
        code = self.process.exitcode
        if code is None or code >= 0:
            return f"its process ended (exit status {code})"
        name = signal.Signals(-code).name
        hint = ", which the system does when memory runs out" if name == "SIGKILL" else ""
        return f"its process died ({name}{hint})"

    def end(self) -> None:
        self.connection.close()
        if self.tasks or not self.ready:
            self.process.kill()
        self.process.join(1)  # one that waits for a dead disk cannot be killed: leave it behind


def _context():
    """Processes that inherit no thread, no lock and no device from this one, and start fast."""
    if sys.platform == "win32":
        raise RuntimeError("WorkerPool: the system must be a POSIX one, got Windows")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])
    return context


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


# Below: what runs in the process.


def _work(end: connection.Connection, function: Callable[[Any], Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one decides
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    try:
        end.send(("ready", time.monotonic(), None, None))
        while True:
            task = end.recv()
            try:
                result = function(task)
            except Exception:
                end.send(("exception", time.monotonic(), None, traceback.format_exc()))
            else:
                _send(end, result)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the pool is closed


def _exit_with_parent() -> None:
    """A task that hangs must not outlive a parent that was killed."""
    multiprocessing.parent_process().join()
    os._exit(1)


class _Pickler(pickle.Pickler):
    """Pickles tensors as arrays, whose memory can be taken out of the stream."""

    def reducer_override(self, value):
        if type(value) is torch.Tensor:
            return torch.from_numpy, (value.contiguous().numpy(),)
        return NotImplemented


def _send(end: connection.Connection, result: Any) -> None:
    """Send a result, its tensors in a nameless shared file, which outlives this process and needs no /dev/shm."""
    stream, buffers = io.BytesIO(), []
    _Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(result)
    views = [buffer.raw() for buffer in buffers]
    sizes = [view.nbytes for view in views]
    if not any(sizes):
        end.send(("result", time.monotonic(), None, result))
        return
    with _shared_file() as file:
        file.truncate(sum(map(_aligned, sizes)))
        with mmap.mmap(file.fileno(), 0) as memory:
            start = 0
            for view in views:
                memory[start : start + view.nbytes] = view
                start += _aligned(view.nbytes)
        end.send(("result", time.monotonic(), sizes, stream.getvalue()))
        reduction.send_handle(end, file.fileno(), os.getppid())


def _shared_file() -> BinaryIO:
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("slowfast_ext"), "r+b")
    return tempfile.TemporaryFile()
