"""Options that commands share, and what they stand for."""

import argparse
import os
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import slowfast_ext

from ..data import DECODERS, ViewPlan
from ..engine import InferenceEngine
from ..evaluation.inference import PlainEngine, prepare
from ..models import SlowFastConfig, build_model, get_config
from .files import positive

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_network_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """--checkpoint and --config, for `load_network`."""
    parser.add_argument(
        "--checkpoint", required=required, metavar="FILE", help="mmaction2, PySlowFast or pytorchvideo weights"
    )
    parser.add_argument(
        "--config",
        metavar="NAME",
        help="zoo name (see slowfast-ext zoo); without it the network that the weights describe",
    )


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """MODEL, --checkpoint and --config, for `find_network`."""
    parser.add_argument(
        "model", metavar="MODEL", help="checkpoint, or zoo name; without --checkpoint of random weights"
    )
    add_network_options(parser, required=False)


def add_view_options(parser: argparse.ArgumentParser) -> None:
    """The views of a video, for `view_plan`."""
    parser.add_argument("--num-clips", type=positive, metavar="N", help="clips of a video, instead of the network's")
    parser.add_argument("--num-crops", type=int, choices=(1, 3), help="crops of a clip, instead of the network's")
    parser.add_argument("--crop-size", type=positive, metavar="PIXELS", help="scale and crop to this size instead")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """What runs the network, and how."""
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the arithmetic (default: float32)")
    parser.add_argument("--max-views", type=positive, metavar="N", help="views at a time (default: what fits)")
    parser.add_argument("--decoder", default="auto", choices=DECODERS, help="default: decord if installed, else pyav")
    add_engine_options(parser)


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """How much of this package runs the network."""
    parser.add_argument(
        "--no-engine", action="store_true", help="run the modules one by one, fused, instead of a prepared plan"
    )
    parser.add_argument("--no-accelerate", action="store_true", help="run the plain modules, without anything fused")


def add_video_inputs(parser: argparse.ArgumentParser, nargs: str = "+") -> None:
    """The videos, for `find_videos`."""
    parser.add_argument(
        "videos",
        nargs=nargs,
        metavar="VIDEO",
        help=f"file, folder searched for {' '.join(VIDEO_SUFFIXES)}, or list: a .txt file with a path a line, "
        "class numbers behind it are passed over",
    )
    parser.add_argument("--root", default="", metavar="FOLDER", help="in front of the relative paths of lists")


def find_videos(inputs: Sequence[str], root: str = "") -> list[str]:
    """Files as they are named; folders as the video files anywhere in them, sorted, hidden ones left out; and lists
    (``.txt``) as what they name.

    Raises:
        ValueError: a folder holds no file with a known suffix, or a list no path.
    """
    paths = []
    for name in inputs:
        if os.path.isdir(name):
            found = sorted(
                str(path)
                for path in Path(name).rglob("*")
                if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file() and not path.name.startswith(".")
            )
            if not found:
                raise ValueError(f"no video in the folder '{name}' (known: {' '.join(VIDEO_SUFFIXES)})")
            paths += found
        elif name.lower().endswith(".txt"):
            paths += read_video_list(name, root)
        else:
            paths.append(name)
    return paths


def read_video_list(path: str, root: str = "") -> list[str]:
    """The paths of a list, one a line. Class numbers behind a video's name, as annotation lists have, are left out.

    Args:
        path: UTF-8 text; empty lines do not count.
        root: folder in front of the relative paths.

    Raises:
        ValueError: no text, or no line.
    """
    lines = [line.strip() for line in _read_text("list", path).splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"list: '{path}' must name a video in each line, got no line")
    labelled = re.compile(rf"(.*(?:{'|'.join(map(re.escape, VIDEO_SUFFIXES))}))(?:\s+\d+)+", re.IGNORECASE)
    names = [match[1] if (match := labelled.fullmatch(line)) else line for line in lines]
    return [os.path.join(root, name) for name in names]


def read_labels(path: str) -> list[str]:
    """Class names, one a line; empty lines at the end do not count.

    Raises:
        ValueError: no text, no line, or an empty line between others.
    """
    lines = [line.strip() for line in _read_text("labels", path).rstrip().split("\n")]
    for number, line in enumerate(lines, start=1):
        if not line:
            raise ValueError(f"labels: '{path}' must have a class name in each line, got none in line {number}")
    return lines


def _read_text(what: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what}: '{path}' must be UTF-8 text, got other bytes at position {error.start}") from error


def load_network(args: argparse.Namespace, labels: list[str] | None = None) -> nn.Module:
    """The network of --config with every weight from --checkpoint: with fewer, its answers would mean nothing.

    Args:
        args: with ``checkpoint``, ``config`` and the ``command`` that warnings name; ``labels`` if labels are given.
        labels: class names, one for each class.

    Returns:
        The plain network in evaluation mode, on the CPU.
    """
    if args.config is None:
        model = slowfast_ext.load_checkpoint(args.checkpoint)
        warn(args.command, model.load_report.notes)
    else:
        model = slowfast_ext.create_model(args.config, num_classes=labels and len(labels))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it repeats the report, which is looked at here
            slowfast_ext.load_checkpoint(args.checkpoint, model)
        report = model.load_report
        for mismatch in report.mismatched:
            if mismatch.name == "cls_head.fc_cls.bias":
                who = "the labels file has" if labels else f"{args.config} has"
                raise ValueError(
                    f"'{args.checkpoint}' must have as many classes as asked for: "
                    f"{who} {mismatch.model_shape[0]}, got {mismatch.file_shape[0]}"
                )
        if report.missing or report.mismatched:
            raise ValueError(f"'{args.checkpoint}' must hold all weights of {args.config}, got {report}")
        warn(args.command, report.notes)
    if labels and len(labels) != model.config.num_classes:
        raise ValueError(
            f"labels: '{args.labels}' must have a name for each of the {model.config.num_classes} classes of "
            f"'{args.checkpoint}', got {len(labels)}"
        )
    return model.eval()


def find_network(args: argparse.Namespace) -> nn.Module:
    """The network of MODEL, which is either a checkpoint or a zoo name."""
    if os.path.exists(args.model):
        if args.checkpoint is not None:
            raise ValueError(f"--checkpoint goes with a zoo name, got the file '{args.model}' as MODEL")
        args.checkpoint = args.model
        return load_network(args)
    try:
        config = get_config(args.model)
    except ValueError as error:
        raise ValueError(f"MODEL must be a file or a zoo name (see slowfast-ext zoo), got '{args.model}'") from error
    if args.config is not None:
        raise ValueError(f"--config goes with a checkpoint, got the zoo name '{args.model}' as MODEL")
    if args.checkpoint is None:
        warn(args.command, ["the weights are random: no --checkpoint"])
        return build_model(config).eval()
    args.config = args.model
    return load_network(args)


def view_plan(config: SlowFastConfig, args: argparse.Namespace) -> ViewPlan:
    """The test views of a network, unless the arguments say otherwise."""
    return ViewPlan(
        clip_len=config.clip_len,
        frame_interval=config.frame_interval,
        num_clips=args.num_clips or config.test_clips,
        num_crops=args.num_crops or config.test_crops,
        short_side=args.crop_size or config.test_short_side,
        crop_size=args.crop_size or config.test_crop_size,
        protocol="pyslowfast" if config.frame_sampling == "linspace" else "mmaction2",
    )


def prepare_engine(model: nn.Module, device: torch.device, args: argparse.Namespace) -> InferenceEngine | PlainEngine:
    """The network of `load_network`, ready to run as `add_run_options` says."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine = prepare(
            model,
            device=device,
            dtype=DTYPES[args.dtype],
            max_views=args.max_views,
            engine=not (args.no_engine or args.no_accelerate),
            accelerate=not args.no_accelerate,
        )
    warn(args.command, (str(warning.message) for warning in caught))
    return engine


def find_device(name: str) -> torch.device:
    """The device of --device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device must be auto, cpu or cuda, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu or cuda, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device must be available, got {name!r} with {torch.cuda.device_count()} CUDA devices visible"
        )
    return device


def best_classes(probabilities: Tensor, top_k: int, labels: list[str] | None) -> list[dict]:
    """The most probable of the classes as JSON entries, best first; Tensor[num_classes]."""
    best = probabilities.topk(min(top_k, len(probabilities)))
    return [
        {"index": index, "label": labels[index] if labels else None, "probability": probability}
        for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def warn(command: str, notes: Iterable[str]) -> None:
    """One line on stderr for each note."""
    for note in notes:
        print(f"slowfast-ext {command}: warning: {note}", file=sys.stderr)
