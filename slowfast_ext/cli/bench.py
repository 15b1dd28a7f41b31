"""``slowfast-ext bench MODEL``."""

import argparse
import copy
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import slowfast_ext

from ..engine import InferenceEngine
from ..engine.autotune import device_name
from ..engine.cpu import unavailable_reason as cpu_unavailable_reason
from ..evaluation.inference import PlainEngine, default_views
from ..evaluation.measuring import Summary, peak_memory, relative_error, shuffled_rounds, tolerance
from .arguments import DTYPES, add_model_argument, find_device, find_network
from .files import check_writable, positive, write_json

_DESCRIPTION = """\
How fast the inference engine runs a network on this machine, beside plain PyTorch with its weights in the same type:
the latency of a batch of clips in both memory formats, and the rate of videos, whose views are decoded already, in the
faster one. The logits of each are compared with those of plain PyTorch in float32. Plain PyTorch is measured first: on
a CPU the engine changes for its process how freed memory is kept.
"""
_EPILOG = """\
examples:
  slowfast-ext bench slowfast_r50_8x8.pyth --dtype bfloat16 --json bench.json
  slowfast-ext bench slowfast_r50_4x16x1_256e_kinetics400_rgb --device cuda --batch 8

Peak memory is what one call needs: on a GPU with the weights, on a CPU without them (Linux only).
Exit status: 0; 1 if logits are further from the float32 ones than rounding explains; 2 if the arguments are wrong.
"""
_LAYOUTS = {"plain, contiguous": torch.contiguous_format, "plain, channels_last_3d": torch.channels_last_3d}


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="time the inference engine beside plain PyTorch",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_argument(parser)
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the arithmetic (default: float32)")
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="clips at a time (default: 1)")
    parser.add_argument("--frames", type=positive, metavar="T", help="of a clip, instead of the network's test clip")
    parser.add_argument("--crop-size", type=positive, metavar="PIXELS", help="of a clip, instead of the network's")
    parser.add_argument("--views", type=positive, metavar="N", help="of a video, instead of the network's test views")
    parser.add_argument("--max-views", type=positive, metavar="N", help="views at a time (default: what fits)")
    parser.add_argument(
        "--seconds", type=float, default=10, metavar="S", help="to time each for, at least 3 calls (default: 10)"
    )
    parser.add_argument("--json", metavar="FILE", help="write everything, with all samples")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if not args.seconds > 0:
        raise ValueError(f"--seconds must be positive, got {args.seconds}")
    if args.json:
        check_writable("--json", args.json)
    device, dtype = find_device(args.device), DTYPES[args.dtype]
    reason = cpu_unavailable_reason(dtype) if device.type == "cpu" else slowfast_ext.unavailable_reason(device)
    if reason is not None:
        raise ValueError(f"--device and --dtype must be what the engine runs in, got {device}, {args.dtype}: {reason}")
    model = find_network(args).to(device)
    config = model.config
    frames, side = args.frames or config.clip_len, args.crop_size or config.test_crop_size
    views = args.views or config.test_clips * config.test_crops
    clip = torch.randn(args.batch, 3, frames, side, side).to(device)
    video = torch.randint(256, (views, frames, side, side, 3), dtype=torch.uint8).to(device)
    try:
        plan, rows = _measure(model, clip, video, dtype, args)
    except torch.OutOfMemoryError as error:
        print(f"slowfast-ext bench: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    document = {
        "model": args.model,
        "device": device_name(device),
        "torch": torch.__version__,
        "plan": plan,
        "dtype": args.dtype,
        "clip": list(clip.shape),
        "views": views,
        "allowed_error": tolerance(dtype, device),
        "speedup": min(row["median_ms"] for row in rows[:-1]) / rows[-1]["median_ms"],
        "ways": rows,
    }
    print(_table(document))
    if args.json:
        write_json(args.json, document)
    wrong = [row for row in rows if not row["relative_error"] <= document["allowed_error"]]  # NaN is wrong
    for row in wrong:
        print(
            f"slowfast-ext bench: error: {row['name']} must agree with plain PyTorch in float32 to "
            f"{document['allowed_error']:g}, got a relative error of {row['relative_error']:.1e}",
            file=sys.stderr,
        )
    return int(bool(wrong))


def _measure(
    model: nn.Module, clip: Tensor, video: Tensor, dtype: torch.dtype, args: argparse.Namespace
) -> tuple[str, list[dict]]:
    """What the engine's plan is called, and the figures of plain PyTorch in each layout and of the engine."""

    def plain(layout: torch.memory_format, dtype: torch.dtype) -> PlainEngine:
        return PlainEngine(copy.deepcopy(model).to(dtype, memory_format=layout), dtype=dtype, max_views=args.batch)

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        reference = plain(torch.contiguous_format, torch.float32)(clip)
    torch.backends.cudnn.benchmark = True
    rows, networks = [], {}
    for name, layout in _LAYOUTS.items():
        ready = clip.to(dtype).contiguous(memory_format=layout)
        networks[name], figures = _clips(partial(plain, layout, dtype), ready, reference, args.seconds)
        rows.append({"name": name, **figures})
    best = min(rows, key=lambda row: row["median_ms"])
    network = networks.pop(best["name"])
    network.max_views = args.max_views or default_views(clip.device)
    best |= _videos(network, video, args.seconds)
    del network, networks
    build = partial(InferenceEngine, model, dtype=dtype, max_views=args.max_views)
    engine, figures = _clips(build, clip, reference, args.seconds)
    title = engine.plan.title
    rows.append({"name": "engine", **figures, **_videos(engine, video, args.seconds)})
    return title, rows


def _clips(
    build: Callable[[], PlainEngine | InferenceEngine], clip: Tensor, reference: Tensor, seconds: float
) -> tuple[PlainEngine | InferenceEngine, dict]:
    """What ``build`` gives, and the time, memory and error of its logits of ``clip``."""
    device = clip.device
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    start = time.perf_counter()
    network = build()
    error = relative_error(network(clip), reference)
    figures = {"relative_error": error, "prepare_seconds": time.perf_counter() - start}
    network(clip)
    figures["peak_memory_bytes"] = peak_memory(lambda: network(clip), device, held)
    samples = _samples(lambda: network(clip), device, seconds)
    summary = Summary.of(samples)
    figures |= {"median_ms": summary.median, "p10_ms": summary.p10, "p90_ms": summary.p90}
    return network, {**figures, "clips_per_second": len(clip) / summary.median * 1e3, "samples_ms": samples}


def _videos(network: PlainEngine | InferenceEngine, views: Tensor, seconds: float) -> dict:
    """The rate of videos of these views. On a CPU one is timed: it is many passes, and takes many seconds."""
    on_cpu = views.device.type == "cpu"
    network.video(views[:1] if on_cpu else views)
    samples = _samples(lambda: network.video(views), views.device, seconds, rounds=1 if on_cpu else None)
    return {"videos_per_second": 1e3 / Summary.of(samples).median, "video_samples_ms": samples}


def _samples(call: Callable, device: torch.device, seconds: float, rounds: int | None = None) -> list[float]:
    """Milliseconds of each call."""
    return [each["call"] for each in shuffled_rounds({"call": call}, device, rounds=rounds, seconds=seconds)]


def _table(document: dict) -> str:
    lines = [
        f"{document['device']}, torch {document['torch']}: {document['plan']}",
        f"{'':22}{'median ms (p10 to p90)':>28}{'clips/s':>10}{'videos/s':>10}{'peak MiB':>10}{'error':>9}",
    ]
    for row in document["ways"]:
        latency = f"{row['median_ms']:.4g} ({row['p10_ms']:.4g} to {row['p90_ms']:.4g})"
        videos = f"{row['videos_per_second']:.3g}" if "videos_per_second" in row else "-"
        peak = "-" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 2**20:.0f}"
        rest = f"{row['clips_per_second']:>10.3g}{videos:>10}{peak:>10}{row['relative_error']:>9.0e}"
        lines.append(f"{row['name']:22}{latency:>28}{rest}")
    lines.append(
        f"The engine is {document['speedup']:.2f} times as fast as the faster plain way. "
        f"A video is {document['views']} views, decoded already."
    )
    return "\n".join(lines)
