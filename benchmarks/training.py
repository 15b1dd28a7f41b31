"""How long a training step of a SlowFast network takes, and what it keeps: plain PyTorch and slowfast_ext.

    python benchmarks/training.py
    python benchmarks/training.py --dtype bfloat16 --batch 2 --crop 112
    python benchmarks/training.py --device cuda --dtype bfloat16 --json training.json

Every variant starts from the same weights and takes the same clips; 16-bit types are autocast's. The gradients of the
first step are compared with those of eager float32 before anything is timed; a variant that is off by more than plain
PyTorch in its type, or cannot run, is listed with the reason. The steps are timed warm, one of each variant in every
round, in shuffled order, each in its parts: forward pass and loss, backward pass, update by SGD with momentum.

`kept` is what is kept from the forward pass for the backward pass, each tensor once, without parameters and the clips;
`counted` is the same by counting, without a run. Exit status: 0; 1 if a variant was wrong or none could be timed; 2 for
bad options.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.nn.functional as F
from kept import KeptTensors, count_kept
from latency import DTYPES, SMALLEST_CROP, check_device, check_dtype, check_folders, progress, refusing
from report import describe_environment, environment_line, format_table, write_json
from torch import Tensor, nn
from tqdm import tqdm

import slowfast_ext
from slowfast_ext.evaluation.measuring import Summary, peak_memory, relative_error, shuffled_orders
from slowfast_ext.models import BasicBlock3d, Bottleneck3d

CROP = 224  # of the recipes
SECONDS = 120.0
# A step is wrong whose gradient is off by this many times what plain PyTorch is off by in its type, or by LEAST: one
# activation next to 0 that the ReLU lets pass in one order of sums and not in another weighs 8e-3 in a tiny network.
FACTOR, LEAST = 2.0, 2e-2
PARTS = ("forward", "backward", "update")


@dataclass(frozen=True)
class Variant:
    """One way to train the network.

    Args:
        description: for the report.
        memory_format: of the weights and of the clips.
        compile: mode of ``torch.compile``, None for without.
        accelerated: whether with the fused blocks.
        default_on: types of devices on which it runs unless ``--variants`` says otherwise.
    """

    description: str
    memory_format: torch.memory_format = torch.channels_last_3d
    compile: str | None = None
    accelerated: bool = False
    default_on: tuple[str, ...] = ("cpu", "cuda")


VARIANTS = {
    "eager": Variant("plain modules, contiguous", torch.contiguous_format),
    "eager_channels_last": Variant("plain modules, channels_last_3d"),
    "compile": Variant("torch.compile, channels_last_3d", compile="default", default_on=()),
    "graphs": Variant(
        "torch.compile in CUDA graphs, channels_last_3d", compile="reduce-overhead", default_on=("cuda",)
    ),
    "accelerate": Variant('slowfast_ext.accelerate(mode="training"), channels_last_3d', accelerated=True),
    "accelerate_compile": Variant(
        "torch.compile of the same, channels_last_3d", compile="default", accelerated=True, default_on=()
    ),
    "accelerate_graphs": Variant(
        "torch.compile of the same in CUDA graphs, channels_last_3d",
        compile="reduce-overhead",
        accelerated=True,
        default_on=("cuda",),
    ),
}


@dataclass
class Trained:
    """A variant that is being measured: its step, and what is known of it."""

    variant: Variant
    status: str = "ready"
    reason: str | None = None
    step: Step | None = None
    error: float | None = None
    prepare_seconds: float | None = None
    peak_memory: int | None = None
    kept: int | None = None
    counted: int | None = None
    samples: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})


class Step:
    """A training step in its parts.

    Args:
        model: in training mode, on the device.
        clip (Tensor[N, 3, T, H, W]), label (Tensor[N]): of the batch, on the device.
        dtype: of the arithmetic.
    """

    def __init__(self, model: nn.Module, clip: Tensor, label: Tensor, dtype: torch.dtype):
        self.model, self.clip, self.label, self.dtype = model, clip, label, dtype
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)
        self.scaler = torch.amp.GradScaler(clip.device.type, enabled=dtype == torch.float16)
        self.loss: Tensor | None = None

    def forward(self) -> None:
        kind = self.clip.device.type
        with torch.autocast(kind, self.dtype) if self.dtype != torch.float32 else nullcontext():
            scores = self.model(self.clip)
        self.loss = F.cross_entropy(scores.float(), self.label)

    def backward(self) -> None:
        self.scaler.scale(self.loss).backward()
        self.loss = None

    def update(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def gradient(self) -> Tensor:
        """All gradients in one vector, in float64 on the CPU; leaves none."""
        self.forward()
        self.loss.backward()
        self.loss = None
        gradient = torch.cat([p.grad.detach().double().flatten().cpu() for p in self.model.parameters()])
        self.optimizer.zero_grad(set_to_none=True)
        return gradient

    def __call__(self) -> None:
        for part in PARTS:
            getattr(self, part)()

    def timed(self) -> dict[str, float]:
        """Milliseconds of each part of a step: between CUDA events where there are any, else by the host's clock."""
        device = self.clip.device
        if device.type != "cuda":
            marks = [time.perf_counter()]
            for part in PARTS:
                getattr(self, part)()
                marks.append(time.perf_counter())
            return {part: (marks[i + 1] - marks[i]) * 1e3 for i, part in enumerate(PARTS)}
        torch.cuda.synchronize(device)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(PARTS) + 1)]
        events[0].record()
        for part, event in zip(PARTS, events[1:], strict=True):
            getattr(self, part)()
            event.record()
        events[-1].synchronize()
        return {part: events[i].elapsed_time(events[i + 1]) for i, part in enumerate(PARTS)}


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A training step in plain PyTorch, torch.compile and slowfast_ext.")
    parser.add_argument("--model", default="slowfast_r50_4x16x1_256e_kinetics400_rgb", metavar="NAME", help="zoo name")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument("--dtype", default="float32", help=f"of the arithmetic, of: {', '.join(DTYPES)} (float32)")
    parser.add_argument("--batch", type=int, default=8, help="clips a step (default: 8, as the recipes)")
    parser.add_argument("--crop", type=int, default=CROP, help=f"side of the clips in pixels (default: {CROP})")
    parser.add_argument("--variants", help=f"comma-separated, of: {', '.join(VARIANTS)} (default: depends on device)")
    parser.add_argument("--rounds", type=int, help="time exactly this many rounds")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"begin rounds for this long ({SECONDS:.0f})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, with all samples")
    options = parser.parse_args(arguments)
    with refusing(parser):
        check_options(options)
    return options


def check_options(options: argparse.Namespace) -> None:
    """Fill in the defaults that depend on the device; raise if an option cannot be honoured."""
    options.device = check_device(options.device)
    if options.dtype not in DTYPES:
        raise ValueError(f"--dtype must be of {', '.join(DTYPES)}, got {options.dtype!r}")
    check_dtype(options.dtype, options.device)
    for name, least in (("batch", 2), ("crop", SMALLEST_CROP), ("rounds", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    if not options.seconds > 0:
        raise ValueError(f"--seconds must be positive, got {options.seconds}")
    if options.variants is None:
        options.variants = [name for name, one in VARIANTS.items() if options.device.type in one.default_on]
    else:
        options.variants = list(dict.fromkeys(name.strip() for name in options.variants.split(",")))
        for name in options.variants:
            if name not in VARIANTS:
                raise ValueError(f"--variants must be of {', '.join(VARIANTS)}, got {name!r}")
    with torch.device("meta"):
        slowfast_ext.create_model(options.model)
    check_folders(options, "json")


def create_network(name: str) -> nn.Module:
    """In training mode and without dropout, with residual branches that matter to all gradients, but not so much that
    the rounding of one layer is amplified by the next."""
    torch.manual_seed(0)
    model = slowfast_ext.create_model(name).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, (BasicBlock3d, Bottleneck3d)):
            nn.init.constant_(module.last_norm.weight, 0.1)
    return model


def build_step(variant: Variant, options: argparse.Namespace, clip: Tensor, label: Tensor, dtype) -> Step:
    model = create_network(options.model).to(options.device, memory_format=variant.memory_format)
    if variant.accelerated:
        model = slowfast_ext.accelerate(model, mode="training")
    if variant.compile:
        model = torch.compile(model, mode=variant.compile)
    return Step(model, clip.contiguous(memory_format=variant.memory_format), label, dtype)


def prepare(trained: Trained, options, clip: Tensor, label: Tensor, reference: Tensor, allowed: float) -> None:
    """Build the variant, compare its gradient and measure its memory; what goes wrong becomes its status."""
    began = time.perf_counter()
    try:
        step = build_step(trained.variant, options, clip, label, DTYPES[options.dtype])
        trained.error = relative_error(step.gradient(), reference)
        trained.prepare_seconds = time.perf_counter() - began
        if not trained.error <= allowed:
            trained.status, trained.reason = "wrong", f"gradient off by {trained.error:.1e}, allowed {allowed:.1e}"
            return
        if not trained.variant.compile:
            with KeptTensors([step.model, step.clip]) as kept:
                step.forward()
            step.loss = None
            trained.kept = kept.bytes
        step()
        on_gpu = options.device.type == "cuda"
        if trained.variant.compile == "reduce-overhead" and on_gpu:
            step()  # the second step was recorded; of a graph's memory torch does not count the peak
        else:
            held = torch.cuda.memory_allocated(options.device) if on_gpu else 0
            trained.peak_memory = peak_memory(step, options.device, held)
        trained.step = step
    except (RuntimeError, MemoryError) as error:
        trained.status, trained.reason = "failed", f"{type(error).__name__}: {str(error).splitlines()[0]}"


def measure(options: argparse.Namespace) -> dict:
    """Prepare, check and time the variants; returns the document that ``--json`` writes."""
    began, start = datetime.now(timezone.utc), time.perf_counter()
    if options.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    dtype = DTYPES[options.dtype]
    config = create_network(options.model).config
    shape = (options.batch, 3, config.clip_len, options.crop, options.crop)
    generator = torch.Generator().manual_seed(1)
    clip = torch.randn(shape, generator=generator).to(options.device)
    label = torch.randint(config.num_classes, (options.batch,), generator=generator).to(options.device)

    progress("eager float32: the reference")
    reference = build_step(VARIANTS["eager"], options, clip, label, torch.float32).gradient()
    allowed = LEAST
    if dtype != torch.float32:
        progress(f"eager in {options.dtype}: what is off by rounding")
        rounded = build_step(VARIANTS["eager_channels_last"], options, clip, label, dtype).gradient()
        allowed = max(LEAST, FACTOR * relative_error(rounded, reference))
    every = {}
    for name in options.variants:
        trained = every[name] = Trained(VARIANTS[name])
        prepare(trained, options, clip, label, reference, allowed)
        if not trained.variant.compile:
            with torch.device("meta"):
                network = slowfast_ext.create_model(options.model).train()
            trained.counted = count_kept(network, shape, dtype, trained.variant.accelerated, options.device.type)
        progress(f"{name}: {trained.reason or f'correct, ready after {trained.prepare_seconds:.1f} s'}")
    ready = {name: trained for name, trained in every.items() if trained.step is not None}
    orders = shuffled_orders(ready, rounds=options.rounds, seconds=options.seconds) if ready else ()
    for order in tqdm(orders, desc=f"timing {len(ready)} variants", unit=" rounds", total=options.rounds):
        for name in order:
            for part, milliseconds in ready[name].step.timed().items():
                ready[name].samples[part].append(milliseconds)
            ready[name].status = "timed"
    return {
        "benchmark": "training",
        "began": began.isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - start, 1),
        "environment": describe_environment(options.device),
        "workload": {
            "model": options.model,
            "device": str(options.device),
            "dtype": options.dtype,
            "clip": list(shape),
            "gradient_allowed": allowed,
        },
        "kernels_unavailable": slowfast_ext.unavailable_reason(options.device),
        "variants": [describe(name, trained, every) for name, trained in every.items()],
    }


def describe(name: str, trained: Trained, every: dict[str, Trained]) -> dict:
    row = {
        "name": name,
        "description": trained.variant.description,
        "status": trained.status,
        "reason": trained.reason,
        "gradient_error": trained.error,
        "prepare_seconds": trained.prepare_seconds,
        "peak_memory_bytes": trained.peak_memory,
        "kept_bytes": trained.kept,
        "counted_bytes": trained.counted,
        "samples_ms": trained.samples,
    }
    if trained.status == "timed":
        plain = [_steps(one) for one in every.values() if one.status == "timed" and not one.variant.accelerated]
        steps = Summary.of(_steps(trained))
        best = min((Summary.of(samples).median for samples in plain), default=None)
        row |= {"median_ms": steps.median, "p10_ms": steps.p10, "p90_ms": steps.p90}
        row |= {f"{part}_ms": Summary.of(trained.samples[part]).median for part in PARTS}
        row["speedup_over_best_plain"] = best and best / steps.median
    return row


def _steps(trained: Trained) -> list[float]:
    return [sum(parts) for parts in zip(*trained.samples.values(), strict=True)]


def format_report(document: dict) -> str:
    """The table, with the machine above it and what was and was not measured below."""
    workload = document["workload"]
    header = ["variant", "step ms", "p10 .. p90", *PARTS, "vs best plain", "peak MiB", "kept MiB", "counted", "error"]

    def mib(count):
        return "-" if count is None else f"{count / 2**20:.0f}"

    rows = []
    for row in document["variants"]:
        error = "-" if row["gradient_error"] is None else f"{row['gradient_error']:.0e}"
        times = [row["status"], *["-"] * 5]
        if row["status"] == "timed":
            ratio = row["speedup_over_best_plain"]
            times = [f"{row['median_ms']:.4g}", f"{row['p10_ms']:.4g} .. {row['p90_ms']:.4g}"]
            times += [f"{row[f'{part}_ms']:.4g}" for part in PARTS]
            times.append("-" if ratio is None else f"{ratio:.2f}x")
        memory = [mib(row[key]) for key in ("peak_memory_bytes", "kept_bytes", "counted_bytes")]
        rows.append([row["name"], *times, *memory, error])
    lines = [
        environment_line(document["environment"]),
        f"{workload['model']}, {workload['dtype']}, clips {' x '.join(map(str, workload['clip']))}",
        "",
        format_table(header, rows),
        "",
        "medians of rounds in shuffled order; peak: above weights, momentum and clips; kept: for the backward pass",
    ]
    lines += [f"{row['name']}: {row['reason']}" for row in document["variants"] if row["reason"]]
    if document["kernels_unavailable"]:
        lines.append(f"slowfast_ext runs without CUDA kernels: {document['kernels_unavailable']}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    document = measure(options)
    print(format_report(document))
    if options.json is not None:
        write_json(options.json, document)
    statuses = [row["status"] for row in document["variants"]]
    return int("wrong" in statuses or "timed" not in statuses)


if __name__ == "__main__":
    sys.exit(main())
