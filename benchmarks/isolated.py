"""A way to run a network in a process of its own, so that what it sets for its process does not help the others."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from slowfast_ext.evaluation.measuring import peak_growth

START_SECONDS = 300  # for importing torch and preparing the network


class Isolated:
    """``call()`` runs one forward in the other process and returns when it is done; a message takes 0.1 ms.

    Args:
        build: called there with ``arguments``; returns the callable that runs the network once, and what else is to
            be known of it. Both it and the arguments must be picklable; tensors are shared, not copied.
        without: packages that seem not to be installed there.

    Attributes:
        known: what ``build`` returned second.
    """

    def __init__(self, build: Callable, arguments: tuple, without: tuple[str, ...] = ()):
        context = torch.multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        threads = torch.get_num_threads()
        self._process = context.Process(target=_serve, args=(theirs, build, arguments, without, threads), daemon=True)
        self._process.start()
        theirs.close()
        atexit.register(self.close)
        self.known = self._receive(START_SECONDS)

    def __call__(self) -> Tensor:
        return self._ask("call")

    def peak_growth(self) -> int | None:
        """As `slowfast_ext.evaluation.measuring.peak_growth`, there."""
        return self._ask("peak")

    def close(self) -> None:
        """End the process."""
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def _ask(self, what: str):
        self._connection.send(what)
        return self._receive()

    def _receive(self, seconds: float | None = None):
        if not self._connection.poll(seconds):
            self.close()
            raise TimeoutError(f"the process did not answer within {seconds} s")
        try:
            kind, content = self._connection.recv()
        except EOFError:
            raise RuntimeError(f"the process ended with exit status {self._process.exitcode}") from None
        if kind == "error":
            self.close()
            raise RuntimeError(content)
        return content


def _serve(connection: Connection, build: Callable, arguments: tuple, without: tuple[str, ...], threads: int) -> None:
    for name in without:
        sys.modules[name] = None
    torch.set_num_threads(threads)
    try:
        call, known = build(*arguments)
        connection.send(("done", known))
        while True:
            what = connection.recv()
            connection.send(("done", peak_growth(call) if what == "peak" else call().float()))
    except EOFError:
        return
    except Exception as error:  # goes to the other side, whatever it is
        connection.send(("error", f"{type(error).__name__}: {error}"))
