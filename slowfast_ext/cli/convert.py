"""``slowfast-ext convert IN OUT``."""

from __future__ import annotations

import argparse

from ..checkpoints import convert


def add_parser(subparsers) -> argparse.ArgumentParser:
    """Add the command to ``subparsers`` (of :meth:`argparse.ArgumentParser.add_subparsers`)."""
    parser = subparsers.add_parser(
        "convert",
        help="rewrite a SlowFast checkpoint with mmaction2's names",
        description="Rewrite a checkpoint of mmaction2, PySlowFast (.pyth, .pkl) or pytorchvideo to mmaction2's names. "
        "What is needed to rebuild the network is stored beside the weights.",
    )
    parser.add_argument("source", metavar="IN", help="checkpoint; its kind is told by its content")
    parser.add_argument("destination", metavar="OUT", help="file to write, .pth or .safetensors")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Convert, and print what was loaded."""
    report = convert(args.source, args.destination)
    print(report)
    print(f"written: {args.destination}")
    return 0
