"""Whether fused blocks learn as plain ones do: the loss of a few hundred steps, from the same seed and from another.

    python benchmarks/training_curves.py
    python benchmarks/training_curves.py --dtype bfloat16 --json curves.json

A small SlowFast learns which way a random texture slides (left, right, up, down; clips of 16 frames of 64 pixels, each
made for its step) by SGD with momentum. Four runs: plain blocks from seed 0, in channels_last_3d and contiguous, which
differ by nothing but the order of sums; plain blocks from seed 1; fused blocks from seed 0. The seed decides about
weights, clips and labels. What is compared are the losses, averaged over windows
of 20 steps: fused blocks are in the noise if their curve is no further from the plain one of the same seed, in the mean
over the windows, than the plain curves of two seeds are from each other. Rounding drives the runs of one seed apart
step by step; their first losses are compared, too, before it could. Exit status: 0; 1 if the fused curve is further
off than the noise; 2 for bad options.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import nullcontext
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.nn.functional as F
from latency import DTYPES, check_device, check_dtype, check_folders, refusing
from report import describe_environment, environment_line, format_table, write_json
from torch import Tensor
from tqdm import tqdm

import slowfast_ext
from slowfast_ext.models import PathwayConfig, SlowFastConfig, build_model

STEPS, WINDOW, BATCH = 200, 20, 8
FRAMES, SIZE = 16, 64
DIRECTIONS = ((0, -1), (0, 1), (-1, 0), (1, 0))
NETWORK = SlowFastConfig(
    PathwayConfig(18, base_channels=16, stem_temporal_kernel=1, temporal_kernels=(1, 1, 3, 3)),
    PathwayConfig(18, base_channels=8, stem_temporal_kernel=5, temporal_kernels=(3, 3, 3, 3)),
    resample_rate=4,
    speed_ratio=4,
    fusion_kernel=5,
    num_classes=len(DIRECTIONS),
    dropout=0.0,
)
LAST, FIRST = torch.channels_last_3d, torch.contiguous_format
# Seed, whether fused, memory format.
RUNS = {
    "plain": (0, False, LAST),
    "plain, other layout": (0, False, FIRST),
    "plain, other seed": (1, False, LAST),
    "fused": (0, True, LAST),
}


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The loss of plain and of fused blocks in training.")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument("--dtype", default="float32", help=f"of the arithmetic, of: {', '.join(DTYPES)} (float32)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each run (default: {STEPS})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, with all losses")
    options = parser.parse_args(arguments)
    with refusing(parser):
        options.device = check_device(options.device)
        if options.dtype not in DTYPES:
            raise ValueError(f"--dtype must be of {', '.join(DTYPES)}, got {options.dtype!r}")
        check_dtype(options.dtype, options.device)
        if options.steps < WINDOW:
            raise ValueError(f"--steps must be at least {WINDOW}, got {options.steps}")
        check_folders(options, "json")
    return options


def make_batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Clips float32 Tensor[N, 3, T, H, W] of textures that slide by one or two pixels a frame, and their directions."""
    label = torch.randint(len(DIRECTIONS), (BATCH,), generator=generator)
    coarse = torch.randn(BATCH, 3, SIZE // 4, SIZE // 4, generator=generator)
    texture = F.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear")
    speed = torch.randint(1, 3, (BATCH,), generator=generator)
    clips = []
    for one, direction, pixels in zip(texture, label.tolist(), speed.tolist(), strict=True):
        down, right = DIRECTIONS[direction]
        frames = [one.roll((down * pixels * t, right * pixels * t), (1, 2)) for t in range(FRAMES)]
        clips.append(torch.stack(frames, 1))
    return torch.stack(clips), label


def train(name: str, options: argparse.Namespace) -> list[float]:
    """The loss of each step."""
    seed, fused, layout = RUNS[name]
    torch.manual_seed(seed)
    model = build_model(NETWORK).train().to(options.device, memory_format=layout)
    if fused:
        model = slowfast_ext.accelerate(model, mode="training")
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    kind, dtype = options.device.type, DTYPES[options.dtype]
    scaler = torch.amp.GradScaler(kind, enabled=dtype == torch.float16)
    losses = []
    for _ in tqdm(range(options.steps), desc=name, unit=" steps"):
        clip, label = (tensor.to(options.device) for tensor in make_batch(generator))
        with torch.autocast(kind, dtype) if dtype != torch.float32 else nullcontext():
            scores = model(clip.contiguous(memory_format=layout))
        loss = F.cross_entropy(scores.float(), label)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def windows(losses: list[float]) -> list[float]:
    """Means of WINDOW steps each; what is left over at the end belongs to the last."""
    count = len(losses) // WINDOW
    parts = [losses[i * WINDOW : (i + 1) * WINDOW if i < count - 1 else None] for i in range(count)]
    return [sum(part) / len(part) for part in parts]


def distance(one: list[float], other: list[float]) -> float:
    """The mean over the windows of how far two curves are apart."""
    pairs = list(zip(windows(one), windows(other), strict=True))
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


def measure(options: argparse.Namespace) -> dict:
    began, start = datetime.now(timezone.utc), time.perf_counter()
    losses = {name: train(name, options) for name in RUNS}
    plain, layout, seed, fused = losses.values()
    return {
        "benchmark": "training_curves",
        "began": began.isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - start, 1),
        "environment": describe_environment(options.device),
        "workload": {"device": str(options.device), "dtype": options.dtype, "steps": options.steps, "window": WINDOW},
        "losses": losses,
        "first_difference": abs(fused[0] - plain[0]),
        "difference_of_seeds": distance(plain, seed),
        "difference_of_layouts": distance(plain, layout),
        "difference_of_fused": distance(plain, fused),
    }


def format_report(document: dict) -> str:
    workload, losses = document["workload"], document["losses"]
    curves = {name: windows(curve) for name, curve in losses.items()}
    rows = [[name, *(f"{value:.3f}" for value in curve)] for name, curve in curves.items()]
    header = ["loss up to step", *(str((i + 1) * WINDOW) for i in range(len(rows[0]) - 1))]
    return "\n".join(
        [
            environment_line(document["environment"]),
            f"{workload['steps']} steps in {workload['dtype']}, {BATCH} clips of {FRAMES} x {SIZE} x {SIZE}",
            "",
            format_table(header, rows),
            "",
            f"plain from another seed is {document['difference_of_seeds']:.3g} off, "
            f"in another layout {document['difference_of_layouts']:.3g}, "
            f"fused {document['difference_of_fused']:.3g}; "
            f"in the first step {document['first_difference']:.1e}",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    document = measure(options)
    print(format_report(document))
    if options.json is not None:
        write_json(options.json, document)
    return int(document["difference_of_fused"] > document["difference_of_seeds"])


if __name__ == "__main__":
    sys.exit(main())
