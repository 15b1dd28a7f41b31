"""``slowfast-ext predict``: the most probable classes of video files."""

import argparse
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import slowfast_ext

from ..data import DECODERS, VideoError, VideoViews, ViewPlan, normalize, read_views
from ..models import SlowFastConfig
from .files import check_writable, positive, write_json

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_DESCRIPTION = """\
Show the most probable classes of video files. Each video is seen as the network was tested (10 clips x 3 crops for
Kinetics-400); its probabilities are the mean over these views of softmax(scores). A file that cannot be read is
reported and the rest is done. Ctrl-C keeps what is done.
"""
_EPILOG = """\
The file of --json, also written after Ctrl-C:
  {"checkpoint": str, "config": str or null, "device": str, "dtype": str,
   "views": {"clip_len", "frame_interval", "num_clips", "num_crops", "short_side", "crop_size", "protocol"},
   "complete": bool, false after Ctrl-C,
   "videos": [{"path": str, "views": int,
               "predictions": [{"index": int, "label": str or null, "probability": float}, ...], best first
               "seconds": {"decode": float, "network": float}}
              or {"path": str, "error": str}, ...]}

Exit status: 0; 1 if a video failed; 2 if the arguments are wrong, before any work; 130 after Ctrl-C.
"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "predict",
        help="label videos",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "videos", nargs="+", metavar="VIDEO", help=f"file, or folder searched for {' '.join(VIDEO_SUFFIXES)}"
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="FILE", help="mmaction2, PySlowFast or pytorchvideo weights"
    )
    parser.add_argument(
        "--config",
        metavar="NAME",
        help="zoo name (see slowfast-ext zoo); without it the network that the weights describe",
    )
    parser.add_argument("--labels", metavar="FILE", help="class names, one a line, in the order of the classes")
    parser.add_argument("--json", metavar="OUT", help="write the result here as well, in the form below")
    parser.add_argument("--top-k", type=positive, default=5, metavar="K", help="classes to show (default: 5)")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the arithmetic (default: float32)")
    parser.add_argument("--num-clips", type=positive, metavar="N", help="clips of a video, instead of the network's")
    parser.add_argument("--num-crops", type=int, choices=(1, 3), help="crops of a clip, instead of the network's")
    parser.add_argument("--crop-size", type=positive, metavar="PIXELS", help="scale and crop to this size instead")
    parser.add_argument(
        "--max-views", type=positive, metavar="N", help="views at a time (default: 10 on a GPU, 2 on a CPU)"
    )
    parser.add_argument("--decoder", default="auto", choices=DECODERS, help="default: decord if installed, else pyav")
    parser.add_argument("--no-accelerate", action="store_true", help="run the plain modules, without fused operators")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    paths = find_videos(args.videos)
    if args.json:
        check_writable("--json", args.json)
    labels = read_labels(args.labels) if args.labels else None
    device = _device(args.device)
    model = _model(args, labels).to(device).eval()
    plan = view_plan(model.config, args)
    if not args.no_accelerate:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            slowfast_ext.accelerate(model)
        _warn(str(warning.message) for warning in caught)

    result = {
        "checkpoint": args.checkpoint,
        "config": args.config,
        "device": str(device),
        "dtype": args.dtype,
        "views": {name: getattr(plan, name) for name in ViewPlan.__dataclass_fields__},
        "complete": False,
        "videos": [],
    }
    max_views = args.max_views or (10 if device.type == "cuda" else 2)
    try:
        with tqdm(total=len(paths), unit="video", disable=None) as progress:
            for path, views in _decoded(paths, plan, args.decoder, workers=4 if device.type == "cuda" else 1):
                try:
                    entry = _predict(model, views, DTYPES[args.dtype], max_views, args.top_k, labels)
                except VideoError as error:
                    entry = {"error": str(error)}
                except FloatingPointError as error:
                    entry = {"error": f"'{path}': {error}"}
                except torch.OutOfMemoryError:
                    entry = {"error": f"'{path}': out of GPU memory; less than --max-views {max_views} needs less"}
                result["videos"].append({"path": path, **entry})
                _show(path, entry)
                progress.update()
        result["complete"] = True
    finally:
        if args.json:
            write_json(args.json, result)
    return int(any("error" in entry for entry in result["videos"]))


def find_videos(inputs: Sequence[str]) -> list[str]:
    """Files as they are named, folders as the video files anywhere in them, sorted; hidden ones are left out.

    Raises:
        ValueError: a folder holds no file with a known suffix.
    """
    paths = []
    for name in inputs:
        if not os.path.isdir(name):
            paths.append(name)
            continue
        found = sorted(
            str(path)
            for path in Path(name).rglob("*")
            if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file() and not path.name.startswith(".")
        )
        if not found:
            raise ValueError(f"no video in the folder '{name}' (known: {' '.join(VIDEO_SUFFIXES)})")
        paths += found
    return paths


def read_labels(path: str) -> list[str]:
    """Class names, one a line; empty lines at the end do not count.

    Raises:
        ValueError: no text, no line, or an empty line between others.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").rstrip().split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"labels: '{path}' must be UTF-8 text, got other bytes at position {error.start}") from error
    for number, line in enumerate(lines, start=1):
        if not line:
            raise ValueError(f"labels: '{path}' must have a class name in each line, got none in line {number}")
    return lines


def _model(args: argparse.Namespace, labels: list[str] | None) -> nn.Module:
    """The network with every weight from the checkpoint: with fewer, its answers would mean nothing."""
    if args.config is None:
        model = slowfast_ext.load_checkpoint(args.checkpoint)
        _warn(model.load_report.notes)
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
        _warn(report.notes)
    if labels and len(labels) != model.config.num_classes:
        raise ValueError(
            f"labels: '{args.labels}' must have a name for each of the {model.config.num_classes} classes of "
            f"'{args.checkpoint}', got {len(labels)}"
        )
    return model


def _warn(notes: Iterable[str]) -> None:
    for note in notes:
        print(f"slowfast-ext predict: warning: {note}", file=sys.stderr)


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


def _device(name: str) -> torch.device:
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


def _decoded(paths: list[str], plan: ViewPlan, decoder: str, workers: int) -> Iterator[tuple[str, Future]]:
    """Each path in turn with the future of its views, decoded in the background while the network runs."""

    def decode(path: str) -> tuple[VideoViews, float]:
        start = time.perf_counter()
        views = read_views(path, plan, decoder)
        return views, time.perf_counter() - start

    pool = ThreadPoolExecutor(workers)
    try:
        remaining = iter(paths)
        # One decoded video waits for the network, no more: views of large videos are large.
        pending = deque((path, pool.submit(decode, path)) for path in islice(remaining, workers + 1))
        while pending:
            yield pending.popleft()
            pending.extend((path, pool.submit(decode, path)) for path in islice(remaining, 1))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _predict(
    model: nn.Module, decoding: Future, dtype: torch.dtype, max_views: int, top_k: int, labels: list[str] | None
) -> dict:
    """The JSON entry of one video, without its path."""
    views, decode_seconds = decoding.result()
    start = time.perf_counter()
    probabilities = video_probabilities(model, views, dtype, max_views).cpu()
    if not probabilities.isfinite().all():
        raise FloatingPointError(f"the network's scores are not finite numbers in {str(dtype).removeprefix('torch.')}")
    best = probabilities.topk(min(top_k, len(probabilities)))
    return {
        "views": len(views),
        "predictions": [
            {"index": index, "label": labels[index] if labels else None, "probability": probability}
            for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ],
        "seconds": {
            "decode": round(decode_seconds, 4),
            "network": round(time.perf_counter() - start, 4),
        },
    }


@torch.inference_mode()
def video_probabilities(model: nn.Module, views: VideoViews, dtype: torch.dtype, max_views: int) -> Tensor:
    """Mean over the views of softmax(scores): float32 Tensor[num_classes] on the model's device.

    Args:
        model: a network with a ``config``, in evaluation mode.
        views: of one video.
        dtype: of the arithmetic; parameters stay in theirs, other dtypes than float32 go through autocast.
        max_views: views in one forward pass.
    """
    device = next(model.parameters()).device
    views = views.to(device)
    normalization = model.config.normalization
    total = 0
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for start in range(0, len(views), max_views):
            clips = normalize(views[start : start + max_views], normalization.mean, normalization.std)
            total = total + model(clips).float().softmax(1).sum(0)
    return total / len(views)


def _show(path: str, entry: dict) -> None:
    if "error" in entry:
        tqdm.write(f"slowfast-ext predict: error: {entry['error']}", file=sys.stderr)
        return
    lines = [path]
    for prediction in entry["predictions"]:
        name = prediction["label"] or f"class {prediction['index']}"
        lines.append(f"  {100 * prediction['probability']:6.2f} %  {name}")
    tqdm.write("\n".join(lines), file=sys.stdout)
    sys.stdout.flush()  # the next result may be minutes away
