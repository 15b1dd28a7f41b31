"""Options of mmaction2's tools/train.py and tools/test.py: what commands have in common, and what none of them has."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

from ..training import apply_overrides
from ..training.config_file import nearest
from ..training.distributed import LAUNCHERS, under_torchrun

_INSTEAD = {
    "--gpus": "torchrun --nproc-per-node N -m slowfast_ext starts a process on each of N GPUs",
    "--gpu-ids": "CUDA_VISIBLE_DEVICES=ID,... says which GPUs are used",
    "--options": "its name is --eval-options",
    "--onnx": "slowfast-ext export writes an ONNX file and compares its results with PyTorch's; test takes weights",
    "--tensorrt": "the prepared plan, --engine, runs in its place; test takes weights",
}


class _Refuse(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        raise argparse.ArgumentError(self, f"must be left out: {self.const}")


def refuse(parser: argparse.ArgumentParser, *options: str) -> None:
    """An error, with what to use in its place, for options of mmaction2 that stand for something else here."""
    for option in options:
        parser.add_argument(option, nargs="*", action=_Refuse, const=_INSTEAD[option], help=argparse.SUPPRESS)


def add_process_options(parser: argparse.ArgumentParser) -> None:
    """Who started this process, of a command."""
    parser.add_argument(
        "--launcher", choices=LAUNCHERS, help="who started the processes (default: pytorch under torchrun, else none)"
    )
    # Not a default, which would take the place of what the parser of all commands has found.
    add_local_rank(parser, default=argparse.SUPPRESS)


def add_local_rank(parser: argparse.ArgumentParser, **settings: Any) -> None:
    """--local_rank, for `adopt_local_rank`."""
    parser.add_argument(
        "--local_rank",
        "--local-rank",
        type=int,
        metavar="N",
        help="number of this process on its machine, as torch.distributed.launch passes it",
        **settings,
    )


def adopt_local_rank(args: argparse.Namespace) -> None:
    """Put --local_rank where torchrun's processes find it.

    Raises:
        ValueError: it contradicts the launcher or the environment.
    """
    if args.local_rank is None:
        return
    launcher = getattr(args, "launcher", "none") or ("pytorch" if under_torchrun() else "none")
    if launcher != "pytorch":
        raise ValueError(f"--local_rank must come with --launcher pytorch, got {launcher}")
    known = os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    if known != str(args.local_rank):
        raise ValueError(f"--local_rank must be LOCAL_RANK of the environment, {known}, got {args.local_rank}")


def add_metric_options(parser: argparse.ArgumentParser) -> None:
    """--eval-options, for `read_topk`."""
    parser.add_argument(
        "--eval-options",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="of the metrics: topk=1,5 (the default) are the k of top_k_accuracy",
    )


def read_topk(options: Sequence[str], metrics: Sequence[str]) -> tuple[int, ...]:
    """The k of top_k_accuracy.

    Raises:
        ValueError: another option, a value that is no list of whole numbers from 1 on, or none of ``metrics`` has it.
    """
    for text in options:
        name = text.partition("=")[0]
        if name != "topk" or "=" not in text:
            raise ValueError(f"--eval-options must be topk=K,..., got {text!r}{nearest(name, ['topk'])}")
    if not options:
        return (1, 5)
    value = apply_overrides({}, options)["topk"]
    topk = value if isinstance(value, list | tuple) else (value,)
    if not topk or any(type(k) is not int or k < 1 for k in topk) or len(set(topk)) < len(topk):
        raise ValueError(f"--eval-options: topk must be different whole numbers from 1 on, got {value!r}")
    if "top_k_accuracy" not in metrics:
        raise ValueError(f"--eval-options: topk must come with --eval top_k_accuracy, got {list(metrics)}")
    return tuple(topk)
