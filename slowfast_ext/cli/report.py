"""``slowfast-ext report``: what result files are worth, one by one or fused."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data import read_annotations
from ..evaluation import METRICS, evaluate
from ..evaluation.confusion import confusion_matrix, most_confused, plot_confusion, recalls
from ..evaluation.extras import require_packages
from ..evaluation.result_files import SUFFIXES, read_results
from .arguments import read_labels
from .files import check_writable, positive, write_json
from .mmaction2_options import add_metric_options, read_topk

_DESCRIPTION = """\
Print the accuracies of a result file of slowfast-ext test (or mmaction2's tools/test.py), the classes that are most
often taken for others, and those that are recognised least. The scores of several files are added, times their weights:
  slowfast-ext report slowfast.json flow.pkl --weights 1 0.5 --list val.txt --labels classes.txt
"""
_EPILOG = """\
The file of --json:
  {"results": [str, ...], "weights": [float, ...], "videos": int, of the list,
   "left_out": [str, ...], paths of the videos that a result has no scores of,
   "metrics": {"top1_acc": float, ...},
   "classes": [{"index": int, "label": str or null, "videos": int, "recall": float, null without videos}, ...],
   "confused": [{"right": int, "predicted": int, "videos": int}, ...], all pairs, most frequent first}

Exit status: 0; 2 if the arguments or a file are wrong.
"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "report",
        help="accuracies and confusions of result files",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="+", metavar="RESULT", help=f"{', '.join(SUFFIXES)}, with one entry a video")
    parser.add_argument("--list", required=True, metavar="LIST", help="annotation file of the test")
    parser.add_argument("--rawframes", action="store_true", help="the list names folders of pictures")
    parser.add_argument("--with-offset", action="store_true", help="its lines give an offset (with --rawframes)")
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help="one a result (default: 1 each)")
    parser.add_argument(
        "--softmax", action="store_true", help="make probabilities of the scores first, as of --average-clips score"
    )
    parser.add_argument("--eval", nargs="+", default=METRICS, choices=METRICS, metavar="METRIC", help="default: all")
    add_metric_options(parser)
    parser.add_argument("--labels", metavar="FILE", help="class names, one a line, in the order of the classes")
    parser.add_argument("--most", type=positive, default=10, metavar="N", help="rows of each table (default: 10)")
    parser.add_argument("--json", metavar="OUT", help="write all of it here as well, in the form below")
    parser.add_argument("--plot", metavar="OUT", help="draw the confusion matrix: .png, .pdf or .svg")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    weights = args.weights or [1.0] * len(args.results)
    if len(weights) != len(args.results) or not all(map(math.isfinite, weights)) or not any(weights):
        raise ValueError(
            f"--weights must be a number for each of {len(args.results)} results, not all 0, got {weights}"
        )
    if args.with_offset and not args.rawframes:
        raise ValueError("--with-offset must come with --rawframes, got it alone")
    topk = read_topk(args.eval_options, args.eval)
    for option, path in (("--json", args.json), ("--plot", args.plot)):
        if path:
            check_writable(option, path)
    if args.plot:
        if Path(args.plot).suffix not in (".png", ".pdf", ".svg"):
            raise ValueError(f"--plot must end in .png, .pdf or .svg, got '{args.plot}'")
        require_packages("--plot", ("matplotlib",), "plot")
    entries = read_annotations(args.list, raw_frames=args.rawframes, with_offset=args.with_offset, multi_label=False)
    scores, readable = _fused(args, weights, len(entries))
    names = read_labels(args.labels) if args.labels else None
    if names and len(names) != scores.shape[1]:
        raise ValueError(f"--labels must have a name for each of {scores.shape[1]} classes, got {len(names)}")
    labels = torch.tensor([entries[index].labels[0] for index in readable])
    metrics = evaluate(scores, labels, args.eval, topk=topk)
    matrix = confusion_matrix(scores, labels)

    left_out = sorted(set(range(len(entries))) - set(readable))
    if left_out:
        print(f"{len(left_out)} of {len(entries)} videos have no scores and do not count")
    for name, value in metrics.items():
        print(f"{name}: {value:.4f}")
    _print_tables(matrix, names, args.most)
    if args.json:
        write_json(
            args.json,
            {
                "results": args.results,
                "weights": weights,
                "videos": len(entries),
                "left_out": [entries[index].path for index in left_out],
                "metrics": metrics,
                "classes": _classes(matrix, names),
                "confused": [
                    {"right": right, "predicted": predicted, "videos": videos}
                    for right, predicted, videos in most_confused(matrix, matrix.numel())
                ],
            },
        )
    if args.plot:
        plot_confusion(matrix, names, args.plot)
    return 0


def _fused(args: argparse.Namespace, weights: list[float], videos: int) -> tuple[Tensor, list[int]]:
    """The weighted sum of all results, float32 Tensor[N, num_classes], and the N videos that all of them have."""
    results = [read_results(path) for path in args.results]
    for path, entries in zip(args.results, results, strict=True):
        if len(entries) != videos:
            raise ValueError(
                f"'{path}' must have an entry for each of the {videos} videos of the list, got {len(entries)}"
            )
    readable = [index for index in range(videos) if not any(isinstance(entries[index], dict) for entries in results)]
    if not readable:
        raise ValueError(f"the results must have scores of at least one of {videos} videos, got none")
    tables = [torch.from_numpy(np.stack([entries[index] for index in readable])) for entries in results]
    widths = [table.shape[1] for table in tables]
    if len(set(widths)) > 1:
        raise ValueError(f"the results must be of as many classes, got {widths}")
    if args.softmax:
        tables = [table.softmax(1) for table in tables]
    return sum(weight * table for weight, table in zip(weights, tables, strict=True)), readable


def _classes(matrix: Tensor, names: list[str] | None) -> list[dict]:
    return [
        {
            "index": index,
            "label": names[index] if names else None,
            "videos": videos,
            "recall": recall if videos else None,
        }
        for index, (videos, recall) in enumerate(zip(matrix.sum(1).tolist(), recalls(matrix).tolist(), strict=True))
    ]


def _print_tables(matrix: Tensor, names: list[str] | None, most: int) -> None:
    def name(index: int) -> str:
        return names[index] if names else f"class {index}"

    pairs = most_confused(matrix, most)
    print(
        "\nmost confused (videos: right class -> predicted class)" if pairs else "\nno video is taken for another class"
    )
    for right, predicted, videos in pairs:
        print(f"{videos:6}  {name(right)} -> {name(predicted)}")
    present = [entry for entry in _classes(matrix, names) if entry["videos"]]
    print("\nleast recognised (recall, videos of the class)")
    for entry in sorted(present, key=lambda entry: entry["recall"])[:most]:
        print(f"{entry['recall']:6.4f}  {entry['videos']:5}  {name(entry['index'])}")
