"""How far the inference engine's scores are from the exact ones, beside plain PyTorch in the same type.

    python benchmarks/numerics.py
    python benchmarks/numerics.py --device cuda --dtype float32,bfloat16,float16 --json numerics.json

For each network and type: the relative error ||scores - reference|| / ||reference|| of each clip, and how often the
best class and the five best classes are the reference's. The reference is eager float64 for float32, and eager float32
for the 16-bit types; eager is the plain network with its weights in the type, contiguous or in channels_last_3d.
Weights and clips are random, see `variants.create_network`. Exit status: 0; 1 if the engine's mean error is more than
a tenth above that of contiguous eager; 2 for bad options.
"""

from __future__ import annotations

import argparse
import copy
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.nn.functional as F
from latency import DTYPES, check_device, check_folders, refusing
from report import describe_environment, environment_line, format_table, write_json
from torch import Tensor, nn
from tqdm import tqdm
from variants import create_network

from slowfast_ext import InferenceEngine

MODELS = (
    "slowfast_r50_4x16x1_256e_kinetics400_rgb",
    "slowfast_r50_8x8x1_256e_kinetics400_rgb",
    "slowfast_r101_8x8x1_256e_kinetics400_rgb",
)
ALLOWED = 1.1  # times eager's mean error: both are sums of the same number of roundings, in another order


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Error of the inference engine's scores beside that of plain PyTorch.")
    parser.add_argument("--models", default=",".join(MODELS), metavar="NAMES", help="zoo names, with commas between")
    parser.add_argument("--dtype", default="float32,bfloat16", help=f"with commas between, of: {', '.join(DTYPES)}")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--clips", type=int, default=32, help="clips that are compared (default: 32)")
    parser.add_argument("--crop", type=int, default=112, help="side of the clips in pixels (default: 112)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything")
    options = parser.parse_args(arguments)
    with refusing(parser):
        options.device = check_device(options.device)
        options.dtypes = options.dtype.split(",")
        for name in options.dtypes:
            if name not in DTYPES:
                raise ValueError(f"--dtype must be of {', '.join(DTYPES)}, got {name!r}")
        for name, least in (("clips", 1), ("crop", 32)):
            if getattr(options, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(options, name)}")
        check_folders(options, "json")
    return options


def compare(scores: Tensor, reference: Tensor) -> dict[str, float]:
    """Tensor[N, classes] twice."""
    scores, reference = scores.double().cpu(), reference.double().cpu()
    errors = torch.linalg.vector_norm(scores - reference, dim=1) / torch.linalg.vector_norm(reference, dim=1)
    best, expected = (each.topk(min(5, each.shape[1])).indices for each in (scores, reference))
    same = [
        len(set(one.tolist()) & set(other.tolist())) / best.shape[1] for one, other in zip(best, expected, strict=True)
    ]
    return {
        "mean_error": float(errors.mean()),
        "largest_error": float(errors.max()),
        "top1_agreement": float((best[:, 0] == expected[:, 0]).double().mean()),
        "top5_agreement": sum(same) / len(same),
    }


def create_clips(count: int, frames: int, side: int) -> Tensor:
    """Tensor[N, 3, T, H, W]: patches of colour that change over time, a tint of each clip's own, and noise.

    To a network all clips of nothing but noise are alike: it gives them the same class.
    """
    generator = torch.Generator().manual_seed(1)
    patches = torch.randn(count, 3, max(frames // 8, 2), 4, 4, generator=generator)
    patches = F.interpolate(patches, size=(frames, side, side), mode="trilinear")
    tint = torch.randn(count, 3, 1, 1, 1, generator=generator)
    return 1.5 * patches + tint + 0.5 * torch.randn(count, 3, frames, side, side, generator=generator)


@torch.inference_mode()
def scores_of(
    model: nn.Module, clips: Tensor, dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format
) -> Tensor:
    """Of eager PyTorch with weights and clips in ``dtype`` and ``layout``, clip by clip."""
    model = copy.deepcopy(model).to(clips.device, dtype, memory_format=layout)
    return torch.cat([model(clip.to(dtype).contiguous(memory_format=layout)) for clip in clips.split(1)])


def rows_of(model: nn.Module, clips: Tensor, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """The figures of eager in both layouts and of the engine.

    Args:
        model: plain, float32, in evaluation mode.
        clips (Tensor[N, 3, T, H, W]): float32, on the device where they are compared.
    """
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        reference = scores_of(model, clips, torch.float64 if dtype == torch.float32 else torch.float32)
        eager = scores_of(model, clips, dtype)
        channels_last = scores_of(model, clips, dtype, torch.channels_last_3d)
        engine = InferenceEngine(copy.deepcopy(model).to(clips.device), dtype=dtype)
        ours = torch.cat([engine(clip) for clip in clips.split(1)])
    scores = {"eager": eager, "eager_channels_last": channels_last, "engine": ours}
    return {way: compare(each, reference) for way, each in scores.items()}


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    began = datetime.now(timezone.utc)
    environment = describe_environment(options.device)
    rows, too_far = [], False
    for name in tqdm(options.models.split(","), unit=" networks"):
        model = create_network(name)
        clips = create_clips(options.clips, model.config.clip_len, options.crop).to(options.device)
        for dtype in options.dtypes:
            compared = rows_of(model, clips, DTYPES[dtype])
            rows += [{"model": name, "dtype": dtype, "way": way, **figures} for way, figures in compared.items()]
            too_far |= compared["engine"]["mean_error"] > ALLOWED * compared["eager"]["mean_error"]
    document = {
        "benchmark": "numerics",
        "began": began.isoformat(timespec="seconds"),
        "environment": environment,
        "clips": [options.clips, 3, "clip_len", options.crop, options.crop],
        "rows": rows,
    }
    print(environment_line(environment), end="\n\n")
    header = ["network", "type", "way", "mean error", "largest", "top-1 agrees", "top-5 agrees"]
    cells = [
        [
            row["model"].removeprefix("slowfast_").removesuffix("_256e_kinetics400_rgb"),
            row["dtype"],
            row["way"],
            f"{row['mean_error']:.2e}",
            f"{row['largest_error']:.2e}",
            f"{row['top1_agreement']:.1%}",
            f"{row['top5_agreement']:.1%}",
        ]
        for row in rows
    ]
    print(format_table(header, cells))
    if options.json is not None:
        write_json(options.json, document)
    return int(too_far)


if __name__ == "__main__":
    sys.exit(main())
