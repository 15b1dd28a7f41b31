"""Where the time of a SlowFast network goes: every layer, and every block that can be one kernel, beside its floor.

    python benchmarks/layers.py
    python benchmarks/layers.py --model slowfast_r50_8x8x1_256e_kinetics400_rgb --csv layers.csv
    python benchmarks/layers.py --device cuda --layers 'fast_path.*' --json layers.json --plot roofline.png

For each layer its bytes, operations and floor, the longer of the two times that they take at the device's ceilings, and
on a CPU or GPU the time it was measured to take in plain PyTorch, in cuDNN's fused convolutions and in slowfast_ext,
each alone, warm, with cold caches, after its output was compared with eager float32. Then the floors of the whole
network in several ways to run it. Without a GPU nothing is timed unless `--device cpu` asks for it, and the ceilings
are those of an H200. Layers of one kind and size are timed once and printed as one row, whose second column counts
them. Exit status: 0; 1 if an output was wrong or nothing could be timed; 2 for bad options.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from latency import DTYPES, check_device, check_dtype, check_folders, check_workload, progress, refusing
from layer_variants import IMPLEMENTATIONS, cache_flush, has_operator, implementations, part_of, prepare, tolerance
from report import describe_environment, environment_line, format_table, write_csv, write_json
from roofline import (
    PLANS,
    Block,
    Layer,
    compute_milliseconds,
    count_layers,
    floor_milliseconds,
    fused_blocks,
    overlap_milliseconds,
    plans,
)
from roofline_picture import plot
from torch import nn
from tqdm import tqdm
from variants import Outcome

import slowfast_ext
from slowfast_ext.engine import Ceilings, measure_ceilings
from slowfast_ext.evaluation.measuring import Summary, shuffled_rounds

SECONDS = {"cpu": 60.0, "cuda": 90.0}
# An H200: 10^12 dense operations a second with 16-bit operands by wgmma and by mma.sync (TF32 has half), and bytes.
GIVEN_PEAKS = {"bfloat16": (788.0, 489.0), "float16": (788.0, 489.0), "float32": (394.0, 244.5)}
GIVEN_BANDWIDTH = 4.3
# Which implementation is counted in the measured time of a plan: of each layer or block the first that it has.
PREFERENCE = {
    "eager": ("eager",),
    "cudnn": ("cudnn", "eager"),
    "layers": ("conv3d_bn_relu", "eager"),
    "fast_blocks": ("fused", "conv3d_bn_relu", "eager"),
    "stems": ("fused", "conv3d_bn_relu", "eager"),
}


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Work, floor and time of every layer and fused block of a SlowFast network."
    )
    parser.add_argument("--model", default="slowfast_r50_4x16x1_256e_kinetics400_rgb", metavar="NAME", help="zoo name")
    parser.add_argument("--device", help="cpu, cuda, cuda:N, or meta to time nothing (default: cuda if there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="of weights and clips (default: float32 on a CPU or bfloat16)")
    parser.add_argument("--batch", type=int, help="clips a call (default: 1 on a CPU, else one video's views)")
    parser.add_argument("--crop", type=int, help="side of the clips in pixels (default: the model's test crop)")
    parser.add_argument("--views", type=int, help="clips a video, for videos/s (default: the model's test views)")
    parser.add_argument(
        "--layers", metavar="PATTERNS", help="only layers whose names match, as 'slow_path.layer[34].*'"
    )
    parser.add_argument("--blocks", metavar="PATTERNS", help="only blocks whose names match, as 'fast_path.*'")
    parser.add_argument("--peak", metavar="TFLOP/S,...", help="given ceilings; fractions are of the first")
    parser.add_argument("--bandwidth", type=float, metavar="TB/S", help="given ceiling, to go with --peak")
    parser.add_argument("--rounds", type=int, help="time each layer in exactly this many rounds")
    parser.add_argument(
        "--seconds",
        type=float,
        help="share this time among the layers (default: {cpu:.0f} on a CPU, {cuda:.0f} on a GPU)".format(**SECONDS),
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a row for each layer and block")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="write a roofline picture (needs matplotlib)")
    options = parser.parse_args(arguments)
    with refusing(parser):
        check_options(options)
    return options


def check_options(options: argparse.Namespace) -> None:
    """Fill in the defaults that depend on model and device; raise if an option cannot be honoured."""
    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() else "meta"
    options.device = torch.device("meta") if options.device == "meta" else check_device(options.device)
    options.timed = options.device.type != "meta"
    options.dtype = options.dtype or ("float32" if options.device.type == "cpu" else "bfloat16")
    if not options.timed and {options.rounds, options.seconds, options.plot} != {None}:
        raise ValueError("--rounds, --seconds and --plot must be left out where nothing is timed (--device meta)")
    check_workload(options, SECONDS)
    if options.timed:
        check_dtype(options.dtype, options.device)
    if options.timed and (options.peak is None) != (options.bandwidth is None):
        raise ValueError("--peak and --bandwidth must be given together where there is a device to measure, got one")
    if options.bandwidth is not None and not options.bandwidth > 0:
        raise ValueError(f"--bandwidth must be positive, got {options.bandwidth}")
    if options.peak is not None:
        options.peak = check_peaks(options.peak)
    check_folders(options, "json", "csv", "plot")
    options.work = find_work(options)


def check_peaks(text: str) -> tuple[float, ...]:
    try:
        peaks = tuple(float(part) for part in text.split(","))
    except ValueError:
        peaks = ()
    if not peaks or not all(0 < peak < math.inf for peak in peaks):
        raise ValueError(f"--peak must be positive numbers with commas between, got {text!r}")
    return peaks


def label(work: Layer | Block) -> str:
    """The name of a layer or block in tables and patterns."""
    return work.name.removeprefix("backbone.").removesuffix(".conv")


def choose(work: list, patterns: str | None, other: str | None, option: str) -> list:
    """The layers or blocks that ``patterns`` asks for: all, unless only those of the ``other`` option are wanted."""
    if patterns is None:
        return work if other is None else []
    chosen = [entry for entry in work if any(fnmatchcase(label(entry), part.strip()) for part in patterns.split(","))]
    if not chosen:
        names = f"{label(work[0])} to {label(work[-1])}" if work else "none"
        raise ValueError(f"--{option} must match one of {len(work)} names ({names}), got {patterns!r}")
    return chosen


@dataclass(frozen=True)
class Work:
    """A network on the meta device, all its layers and blocks, and those that were asked for."""

    model: nn.Module
    clip: torch.Size
    layers: list[Layer]
    blocks: list[Block]
    chosen: list[Layer | Block]


def find_work(options: argparse.Namespace) -> Work:
    with torch.device("meta"):
        model = slowfast_ext.create_model(options.model).eval()
        clip = torch.empty(
            options.batch, 3, model.config.clip_len, options.crop, options.crop, dtype=DTYPES[options.dtype]
        )
        layers = count_layers(model, clip)
    blocks = fused_blocks(model, layers)
    shown = [block for block in blocks if not options.timed or has_operator(block.kind)]
    chosen = choose(layers, options.layers, options.blocks, "layers")
    chosen = chosen + choose(shown, options.blocks, options.layers, "blocks")
    return Work(model, clip.shape, layers, blocks, chosen)


def choose_ceilings(options: argparse.Namespace) -> tuple[list[Ceilings], str]:
    if options.timed and options.peak is None:
        progress("measuring the ceilings of the device: a matrix product and a copy")
        return [measure_ceilings(options.device, DTYPES[options.dtype])], "measured"
    peaks = options.peak or GIVEN_PEAKS[options.dtype]
    bandwidth = options.bandwidth or GIVEN_BANDWIDTH
    return [Ceilings(peak * 1e12, bandwidth * 1e12) for peak in peaks], "given"


def measure(options: argparse.Namespace) -> dict:
    """Count, and on a device prepare, check and time; returns the document that ``--json`` writes."""
    device, work = options.device, options.work
    began = datetime.now(timezone.utc)
    start = time.perf_counter()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    ceilings, source = choose_ceilings(options)
    parts = {entry.name: part_of(work.model, entry) for entry in work.chosen}
    outcomes = time_parts(parts, options) if options.timed else {}
    return {
        "benchmark": "layers",
        "began": began.isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - start, 1),
        "environment": describe_environment(device) | {"load_before": load},
        "workload": {
            "model": options.model,
            "device": str(device),
            "dtype": options.dtype,
            "clip": list(work.clip),
            "views": options.views,
            "tolerance": tolerance(DTYPES[options.dtype], device) if options.timed else None,
        },
        "ceilings": {
            "source": source,
            "operations_per_second": [ceiling.operations for ceiling in ceilings],
            "bytes_per_second": ceilings[0].bandwidth,
        },
        "implementations": implementations(device) if options.timed else [],
        "kernels_unavailable": slowfast_ext.unavailable_reason(device) if options.timed else None,
        "rows": [
            describe_row(entry, parts[entry.name][0], ceilings, outcomes.get(entry.name, {})) for entry in work.chosen
        ],
        "totals": describe_totals(work, ceilings, outcomes, options),
    }


def time_parts(parts: dict[str, tuple], options: argparse.Namespace) -> dict[str, dict[str, Outcome]]:
    """What became of every implementation of every part, by its name; parts of one kind and size share theirs."""
    alike: dict[tuple, list[str]] = {}
    for name, (module, shapes) in parts.items():
        alike.setdefault((repr(module), shapes), []).append(name)
    seconds = None if options.seconds is None else options.seconds / len(alike)
    flush = cache_flush(options.device)
    outcomes = {}
    for names in tqdm(alike.values(), desc="layers", unit=""):
        outcomes |= dict.fromkeys(names, time_part(*parts[names[0]], options, seconds, flush))
    return outcomes


def time_part(module, shapes, options, seconds, flush) -> dict[str, Outcome]:
    device = options.device
    outcomes = prepare(module, shapes, DTYPES[options.dtype], device)
    calls = {name: outcome.call for name, outcome in outcomes.items() if outcome.status == "ready"}
    if calls:
        for samples in shuffled_rounds(calls, device, rounds=options.rounds, seconds=seconds, before=flush):
            for name, milliseconds in samples.items():
                outcomes[name].samples.append(milliseconds)
                outcomes[name].status = "timed"
    for outcome in outcomes.values():
        outcome.call = None  # frees its tensors
    return outcomes


def describe_row(
    work: Layer | Block, module: nn.Module, ceilings: list[Ceilings], outcomes: dict[str, Outcome]
) -> dict:
    convolution = getattr(module, "conv", None)
    inputs = work.layers[0].inputs if isinstance(work, Block) else work.inputs
    output = work.layers[-1].output if isinstance(work, Block) else work.output
    floors = [floor_milliseconds(ceiling, [work]) * 1e3 for ceiling in ceilings]
    memory_bound = work.bytes * ceilings[0].operations > 2 * work.macs * ceilings[0].bandwidth
    row = {
        "name": label(work),
        "kind": work.kind if isinstance(work, Block) else "layer",
        "kernel": convolution and "x".join(map(str, convolution.kernel_size)),
        "stride": convolution and "x".join(map(str, convolution.stride)),
        "inputs": [list(shape) for shape in inputs],
        "output": list(output),
        "macs": work.macs,
        "bytes": work.bytes,
        "bound": "memory" if memory_bound else "compute",
        "floor_us": floors,
        "measured": {},
    }
    for name, outcome in outcomes.items():
        entry = row["measured"][name] = {
            "status": outcome.status,
            "reason": outcome.reason,
            "relative_error": outcome.error,
        }
        if outcome.samples:
            summary = Summary.of([1e3 * sample for sample in outcome.samples])
            entry |= {"median_us": summary.median, "p10_us": summary.p10, "p90_us": summary.p90}
            entry |= {"floor_fraction": floors[0] / summary.median, "rounds": len(outcome.samples)}
    return row


def describe_totals(
    work: Work, ceilings: list[Ceilings], outcomes: dict[str, dict[str, Outcome]], options: argparse.Namespace
) -> list[dict]:
    """Floors of the whole network in each way to run it, whatever rows were asked for."""
    ways = plans(work.layers, work.blocks)
    floors = {name: [floor_milliseconds(ceiling, kernels) for ceiling in ceilings] for name, kernels in ways.items()}
    descriptions = dict(PLANS)
    for name, plan in (("overlap_layers", "layers"), ("overlap_stems", "stems")):
        ways[name] = ways[plan]
        floors[name] = [overlap_milliseconds(ceiling, ways[plan]) for ceiling in ceilings]
        descriptions[name] = f"the kernels of '{plan}', all their operations beside all their transfers"
    ways["compute"], descriptions["compute"] = ways["layers"], "operations alone"
    floors["compute"] = [compute_milliseconds(ceiling, work.layers) for ceiling in ceilings]
    rows = []
    for name, kernels in ways.items():
        members = work.layers if name in ("eager", "cudnn") else kernels
        measured = total_milliseconds(members, PREFERENCE[name], outcomes) if name in PREFERENCE else None
        rows.append(
            {
                "name": name,
                "description": descriptions[name],
                "kernels": len(kernels),
                "macs": sum(kernel.macs for kernel in kernels),
                "bytes": sum(kernel.bytes for kernel in kernels),
                "floor_ms": floors[name],
                "videos_per_second": [options.batch / options.views / floor * 1e3 for floor in floors[name]],
                "measured_ms": measured,
            }
        )
    return rows


def total_milliseconds(
    members: list[Layer | Block], preference: tuple[str, ...], outcomes: dict[str, dict[str, Outcome]]
) -> float | None:
    """The sum of the members' medians, None unless all were timed and the first preference is among them.

    Of each member the first preference that it has is counted; where a fused operator cannot run, the next.
    """
    total, seen = 0.0, set()
    for work in members:
        found = outcomes.get(work.name, {})
        candidates = [name for name in preference if name in found]
        if candidates and candidates[0] == "fused" and found["fused"].status == "failed":
            del candidates[0]
        if not candidates or not found[candidates[0]].samples:
            return None
        seen.add(candidates[0])
        total += Summary.of(found[candidates[0]].samples).median
    return total if preference[0] in seen else None


def flat_row(row: dict, document: dict) -> dict:
    """A line of the CSV file."""
    line = {name: row[name] for name in ("name", "kind", "kernel", "stride")}
    line |= {"inputs": " ".join("x".join(map(str, shape)) for shape in row["inputs"])}
    line |= {"output": "x".join(map(str, row["output"])), "macs": row["macs"], "bytes": row["bytes"]}
    line |= {"operations_per_byte": round(2 * row["macs"] / row["bytes"], 2), "bound": row["bound"]}
    for operations, floor in zip(document["ceilings"]["operations_per_second"], row["floor_us"], strict=True):
        line[f"floor_us_at_{operations / 1e12:.4g}_tflops"] = round(floor, 4)
    for name in document["implementations"]:
        entry = row["measured"].get(name, {})
        for key in ("median_us", "floor_fraction"):
            line[f"{name}_{key}"] = entry.get(key)
    return line


def format_report(document: dict) -> str:
    """Two tables, with the machine above them and what was and was not measured below."""
    workload, ceilings = document["workload"], document["ceilings"]
    peaks = [f"{operations / 1e12:.4g}" for operations in ceilings["operations_per_second"]]
    clip = " x ".join(map(str, workload["clip"]))
    timed = document["implementations"]
    return "\n".join(
        [
            environment_line(document["environment"]),
            f"{workload['model']} | clips {clip} | {workload['dtype']}"
            + (f" on {workload['device']}" if timed else ", nothing timed"),
            f"ceilings {ceilings['source']}{'' if ceilings['source'] == 'measured' else ', NOT measured'}: "
            f"{' or '.join(peaks)} TFLOP/s, {ceilings['bytes_per_second'] / 1e12:.4g} TB/s",
            "",
            format_rows(document["rows"], peaks, timed),
            "",
            format_totals(document["totals"], peaks, timed, workload["views"]),
            "",
            *format_notes(document),
        ]
    )


def format_rows(rows: list[dict], peaks: list[str], timed: list[str]) -> str:
    header = ["layer or block", "n", "kernel", "stride", "channels", "output", "GMAC", "MB", "bound"]
    header += [f"us at {peak}" for peak in peaks] + [f"{name} us" for name in timed]
    alike: dict[str, list[dict]] = {}
    for row in rows:
        alike.setdefault(repr([value for key, value in row.items() if key != "name"]), []).append(row)
    lines = []
    for same in alike.values():
        row = same[0]
        channels = f"{'+'.join(str(shape[1]) for shape in row['inputs'])}>{row['output'][1]}"
        name = row["name"] if row["kind"] == "layer" else f"{row['name']} ({row['kind']})"
        cells = [name, str(len(same)), row["kernel"] or "-", row["stride"] or "-", channels]
        cells += ["x".join(map(str, row["output"][2:])) or "-", f"{row['macs'] / 1e9:.2f}", f"{row['bytes'] / 1e6:.1f}"]
        cells += [row["bound"], *(f"{floor:.1f}" for floor in row["floor_us"])]
        lines.append(cells + [format_measured(row["measured"].get(name)) for name in timed])
    return format_table(header, lines)


def format_measured(entry: dict | None) -> str:
    if entry is None:
        return "-"
    if entry["status"] != "timed":
        return entry["status"]
    return f"{entry['median_us']:.1f} ({entry['floor_fraction']:.0%})"


def format_totals(totals: list[dict], peaks: list[str], timed: list[str], views: int) -> str:
    header = ["whole network", "kernels", "GB", *(f"ms at {peak}" for peak in peaks), f"{views}-view videos/s"]
    header += ["measured ms"] if timed else []
    lines = []
    for row in totals:
        cells = [row["name"], str(row["kernels"]), f"{row['bytes'] / 1e9:.2f}"]
        cells += [f"{floor:.3f}" for floor in row["floor_ms"]] + [f"{row['videos_per_second'][0]:.4g}"]
        measured = row["measured_ms"]
        lines.append(
            cells + ([f"{measured:.3f} ({row['floor_ms'][0] / measured:.0%})" if measured else "-"] if timed else [])
        )
    return format_table(header, lines)


def format_notes(document: dict) -> list[str]:
    notes = [f"{row['name']}: {row['description']}" for row in document["totals"]]
    if document["ceilings"]["source"] == "given":
        notes.append(
            "the ceilings are given, not measured: by default those of an H200, with wgmma and with mma.sync; "
            "--peak and --bandwidth set others"
        )
    if not document["implementations"]:
        return [*notes, "nothing was timed (--device cpu or cuda does)"]
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in document["rows"]:
        for name, entry in row["measured"].items():
            if entry["status"] != "timed":
                reasons.setdefault((name, entry["status"], entry["reason"]), []).append(row["name"])
    for (name, status, reason), names in reasons.items():
        notes.append(f"{name} {status}, not timed, in {len(names)} rows ({names[0]} and so on): {reason}")
    notes += [f"{name}: {IMPLEMENTATIONS[name]}" for name in document["implementations"]]
    rounds = [entry.get("rounds", 0) for row in document["rows"] for entry in row["measured"].values()]
    notes.append(
        f"medians of {min(filter(None, rounds), default=0)} or more rounds in shuffled order, warm, inference_mode, "
        "caches flushed before each call, random weights and inputs; in brackets the fraction of the floor; outputs "
        f"within {document['workload']['tolerance']:.0e} of eager float32"
    )
    load, cores = document["environment"]["load_before"], document["environment"]["cores"]
    if load is not None and load > cores / 2:
        notes.append(f"the load average before was {load:.1f} on {cores} cores: take the times as provisional")
    if document["workload"]["device"] == "cpu":
        notes.append("CPU only: no GPU figure was measured")
    return notes


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    document = measure(options)
    print(format_report(document))
    if options.json is not None:
        write_json(options.json, document)
    if options.csv is not None:
        write_csv(options.csv, [flat_row(row, document) for row in document["rows"]])
    if options.plot is not None:
        plot(options.plot, document)
    states = {entry["status"] for row in document["rows"] for entry in row["measured"].values()}
    return int("wrong" in states or (options.timed and "timed" not in states))


if __name__ == "__main__":
    sys.exit(main())
