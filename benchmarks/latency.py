"""How long a SlowFast network takes: plain PyTorch in its best forms, and slowfast_ext.

    python benchmarks/latency.py
    python benchmarks/latency.py --dtype float32,bfloat16
    python benchmarks/latency.py --device cuda --dtype bfloat16 --json latency.json --plot latency.png

Every variant runs the same weights on the same clips under inference_mode. Its logits are compared with eager float32
before it is timed; one that is wrong, or cannot run, is listed with the reason. The variants are timed warm, one call
of each in every round, in shuffled order. With --processes N all of that happens N times, each in a process of its own:
where a process's memory lies decides over much of the time that eager PyTorch takes on a CPU. Exit status: 0; 1 if a
variant was wrong or none could be timed; 2 for bad options.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch
from isolated import Isolated
from report import describe_environment, environment_line, format_table, plot_bars, write_json
from roofline import Layer, count_layers, floor_milliseconds
from summaries import pool, summarise
from tqdm import tqdm
from variants import VARIANTS, Outcome, create_network, prepare, reference_output

import slowfast_ext
from slowfast_ext.engine import Ceilings, measure_ceilings
from slowfast_ext.evaluation.measuring import shuffled_rounds, time_once, tolerance

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALLEST_CROP = 32  # one position of the last feature map
EMULATED = 4  # a type whose convolution takes this many times as long as float32 has no hardware
SECONDS = {"cpu": 45.0, "cuda": 30.0}

progress = partial(print, file=sys.stderr, flush=True)


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Latency of a SlowFast network in plain PyTorch, torch.compile and slowfast_ext."
    )
    parser.add_argument("--model", default="slowfast_r50_4x16x1_256e_kinetics400_rgb", metavar="NAME", help="zoo name")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument(
        "--dtype",
        default="float32",
        help=f"of the arithmetic, one or more with commas between, of: {', '.join(DTYPES)} (default: float32)",
    )
    parser.add_argument("--batch", type=int, help="clips a call (default: 1 on a CPU, one video's views on a GPU)")
    parser.add_argument("--crop", type=int, help="side of the clips in pixels (default: the model's test crop)")
    parser.add_argument("--views", type=int, help="clips a video, for videos/s (default: the model's test views)")
    parser.add_argument("--variants", help=f"comma-separated, of: {', '.join(VARIANTS)} (default: depends on device)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--rounds", type=int, help="time exactly this many rounds")
    parser.add_argument(
        "--seconds",
        type=float,
        help="begin rounds for this long (default: {cpu:.0f} on a CPU, {cuda:.0f} on a GPU)".format(**SECONDS),
    )
    parser.add_argument(
        "--processes", type=int, default=1, help="measure in so many new processes, one after the other (default: 1)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, with all samples")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="write a bar chart (needs matplotlib)")
    options = parser.parse_args(arguments)
    with refusing(parser):
        check_options(options)
    return options


@contextmanager
def refusing(parser: argparse.ArgumentParser) -> Iterator[None]:
    """What is raised for an option that cannot be honoured becomes the parser's error: a line, and exit status 2."""
    try:
        yield
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        parser.error(str(error))


def check_options(options: argparse.Namespace) -> None:
    """Fill in the defaults that depend on model and device; raise if an option cannot be honoured."""
    options.device = check_device(options.device)
    options.dtypes = list(dict.fromkeys(name.strip() for name in options.dtype.split(",")))
    for name in options.dtypes:
        if name not in DTYPES:
            raise ValueError(f"--dtype must be of {', '.join(DTYPES)}, got {name!r}")
    check_workload(options, SECONDS)
    for name in options.dtypes:
        check_dtype(name, options.device)
    if options.processes < 1:
        raise ValueError(f"--processes must be at least 1, got {options.processes}")
    options.variants = choose_variants(options)
    check_folders(options, "json", "plot")


def check_workload(options: argparse.Namespace, seconds: dict[str, float]) -> None:
    """The part of the options that says what is run and for how long, on ``options.device``.

    Args:
        seconds: what ``--seconds`` is by default, by the type of the device.
    """
    with torch.device("meta"):
        config = slowfast_ext.create_model(options.model).config
    kind = options.device.type
    options.views = options.views if options.views is not None else config.test_clips * config.test_crops
    options.crop = options.crop if options.crop is not None else config.test_crop_size
    if options.batch is None:
        options.batch = 1 if kind == "cpu" else options.views
    for name, least in (("batch", 1), ("views", 1), ("crop", SMALLEST_CROP), ("rounds", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    if options.rounds is not None and options.seconds is not None:
        raise ValueError("--rounds and --seconds exclude each other, got both")
    if options.seconds is None:
        options.seconds = seconds.get(kind)
    elif not options.seconds > 0:
        raise ValueError(f"--seconds must be positive, got {options.seconds}")


def check_folders(options: argparse.Namespace, *names: str) -> None:
    for name in names:
        path = getattr(options, name)
        if path is not None and not path.parent.is_dir():
            raise FileNotFoundError(f"--{name} must be in an existing folder, got {path}")
    if "plot" in names and options.plot is not None:
        check_matplotlib("--plot")


def check_matplotlib(option: str) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError(f"{option} needs matplotlib, which is not installed: pip install 'slowfast-ext[plot]'")


def check_device(name: str | None) -> torch.device:
    """The device of this name; of None a GPU, if there is one."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in SECONDS:
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"--device must be a visible device, got {name!r}: torch {torch.__version__} sees no CUDA GPU"
        )
    count = torch.cuda.device_count()
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= count:
        raise ValueError(f"--device must be one of {count} CUDA devices (cuda:0 to cuda:{count - 1}), got {name!r}")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def check_dtype(name: str, device: torch.device) -> None:
    """Raise if ``device`` has no arithmetic for convolutions of this type, or only an emulation of it."""
    if name == "float32":
        return

    def milliseconds(dtype):
        x, weight = torch.ones(1, 64, 2, 28, 28, dtype=dtype), torch.ones(64, 64, 1, 3, 3, dtype=dtype)
        x, weight = x.to(device), weight.to(device)
        return min(time_once(lambda: torch.conv3d(x, weight), device) for _ in range(4))

    try:
        ratio = milliseconds(DTYPES[name]) / milliseconds(torch.float32)
    except RuntimeError as error:
        raise ValueError(f"--dtype must be one that {device} supports, got {name}: {error}") from None
    if device.type == "cpu" and ratio > EMULATED:
        raise ValueError(
            f"--dtype must be one that this CPU computes in hardware, got {name}: "
            f"its convolution takes {ratio:.0f} times as long as that of float32"
        )


def choose_variants(options: argparse.Namespace) -> list[tuple[str, str]]:
    """What is run: names of variants, each with a type."""
    if options.variants is None:
        names = [name for name, variant in VARIANTS.items() if options.device.type in variant.default_on]
        if importlib.util.find_spec("openvino") is None:
            names = [name for name in names if name not in ("openvino", "engine_torch_alone")]
    else:
        names = list(dict.fromkeys(name.strip() for name in options.variants.split(",")))
        for name in names:
            if name not in VARIANTS:
                raise ValueError(f"--variants must be of {', '.join(VARIANTS)}, got {name!r}")
            if not set(VARIANTS[name].dtypes) & set(options.dtypes):
                needed, given = " or ".join(VARIANTS[name].dtypes), ",".join(options.dtypes)
                raise ValueError(f"--variants must suit --dtype: {name} needs {needed}, got {given}")
    if options.no_compile:
        names = [name for name in names if VARIANTS[name].compile is None]
        if not names:
            raise ValueError("--variants must name one without torch.compile where --no-compile is given, got none")
    return [(name, dtype) for dtype in options.dtypes for name in names if dtype in VARIANTS[name].dtypes]


def measure(options: argparse.Namespace) -> dict:
    """Prepare, check and time the variants; returns the document that ``--json`` writes."""
    device = options.device
    began = datetime.now(timezone.utc)
    start = time.perf_counter()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    model = create_network(options.model)
    shape = (options.batch, 3, model.config.clip_len, options.crop, options.crop)
    clip = torch.randn(shape, generator=torch.Generator().manual_seed(1))

    layers, ceilings = {}, {}
    for dtype in options.dtypes:
        with torch.device("meta"):
            meta_clip = torch.empty(shape, dtype=DTYPES[dtype])
            layers[dtype] = count_layers(slowfast_ext.create_model(options.model).eval(), meta_clip)
        ceilings[dtype] = None
        if device.type == "cuda":
            progress(f"measuring the ceilings of the device in {dtype}: a matrix product and a copy")
            ceilings[dtype] = measure_ceilings(device, DTYPES[dtype])
            torch.cuda.empty_cache()

    progress("eager float32: the reference")
    reference = reference_output(model, clip, device)
    outcomes = {}
    for name, dtype in options.variants:
        outcome = outcomes[name, dtype] = prepare(VARIANTS[name], model, clip, reference, DTYPES[dtype], device)
        progress(f"{name} in {dtype}: {outcome.reason or f'correct, ready after {outcome.prepare_seconds:.1f} s'}")
    calls = {key: outcome.call for key, outcome in outcomes.items() if outcome.status == "ready"}
    if calls:
        rounds = shuffled_rounds(calls, device, rounds=options.rounds, seconds=options.seconds)
        for samples in tqdm(rounds, desc=f"timing {len(calls)} variants", unit=" rounds", total=options.rounds):
            for key, milliseconds in samples.items():
                outcomes[key].samples.append(milliseconds)
                outcomes[key].status = "timed"
    for call in calls.values():
        if isinstance(call, Isolated):
            call.close()

    document = {
        "benchmark": "latency",
        "began": began.isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - start, 1),
        "environment": describe_environment(device) | {"load_before": load},
        "workload": {
            "model": options.model,
            "device": str(device),
            "dtypes": options.dtypes,
            "clip": list(shape),
            "views": options.views,
            "tolerance": {dtype: tolerance(DTYPES[dtype], device) for dtype in options.dtypes},
        },
        "roofline": {dtype: describe_roofline(layers[dtype], ceilings[dtype]) for dtype in options.dtypes},
        "kernels_unavailable": slowfast_ext.unavailable_reason(device),
        "variants": [describe_variant(name, dtype, outcome) for (name, dtype), outcome in outcomes.items()],
    }
    return summarise(document)


def describe_roofline(layers: list[Layer], ceilings: Ceilings | None) -> dict:
    return {
        "macs": sum(layer.macs for layer in layers),
        "bytes": sum(layer.bytes for layer in layers),
        "operations_per_second": ceilings and ceilings.operations,
        "bytes_per_second": ceilings and ceilings.bandwidth,
        "floor_ms": ceilings and floor_milliseconds(ceilings, layers),
    }


def describe_variant(name: str, dtype: str, outcome: Outcome) -> dict:
    return {
        "name": name,
        "dtype": dtype,
        "description": VARIANTS[name].description,
        "status": outcome.status,
        "reason": outcome.reason,
        "relative_error": outcome.error,
        "prepare_seconds": outcome.prepare_seconds,
        "peak_memory_bytes": outcome.peak_memory,
        "blocks": outcome.blocks,
        "samples_ms": outcome.samples,
    }


def set_up_process(threads: int) -> None:
    torch.set_num_threads(threads)
    tqdm.set_lock(threading.RLock())  # its own is shared by processes, and would be reported as left behind


def measure_in_processes(options: argparse.Namespace) -> dict:
    """:func:`measure` in one new process after the other, with the samples of all in one document."""
    context, documents = torch.multiprocessing.get_context("spawn"), []
    for number in range(options.processes):
        progress(f"process {number + 1} of {options.processes}")
        with ProcessPoolExecutor(1, context, set_up_process, (torch.get_num_threads(),)) as executor:
            documents.append(executor.submit(measure, options).result())
    return pool(documents)


def format_report(document: dict) -> str:
    """The table, with the machine above it and what was and was not measured below."""
    workload, roofline = document["workload"], document["roofline"]
    on_cpu = workload["device"] == "cpu"
    header = [
        "variant",
        "type",
        "median ms",
        "p10 .. p90",
        "clips/s",
        f"{workload['views']}-view videos/s",
        "peak MiB",
        "vs best plain",
        "vs eager f32",
        "error",
    ] + ([] if on_cpu else ["of roofline"])
    rows = []
    for row in document["variants"]:
        error = "-" if row["relative_error"] is None else f"{row['relative_error']:.0e}"
        if row["status"] != "timed":
            rows.append([row["name"], row["dtype"], row["status"], *["-"] * 6, error] + ([] if on_cpu else ["-"]))
            continue
        memory = row["peak_memory_bytes"]
        cells = [
            row["name"],
            row["dtype"],
            format_milliseconds(row["median_ms"]),
            f"{format_milliseconds(row['p10_ms'])} .. {format_milliseconds(row['p90_ms'])}",
            f"{row['clips_per_second']:.4g}",
            f"{row['videos_per_second']:.3g}",
            "-" if memory is None else f"{memory / 2**20:.0f}",
            *(
                "-" if row[speedup] is None else f"{row[speedup]:.2f}x"
                for speedup in ("speedup_over_best_plain", "speedup_over_eager_float32")
            ),
            error,
        ]
        rows.append(cells if on_cpu else [*cells, f"{row['roofline_fraction']:.0%}"])
    clip = " x ".join(map(str, workload["clip"]))
    lines = [
        environment_line(document["environment"]),
        f"{workload['model']} | clips {clip} | {workload['device']} | "
        f"{next(iter(roofline.values()))['macs'] / workload['clip'][0] / 1e9:.2f} GMAC a clip",
        "",
        format_table(header, rows),
        "",
        *format_notes(document),
    ]
    return "\n".join(lines)


def format_milliseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def format_notes(document: dict) -> list[str]:
    workload, rows = document["workload"], document["variants"]
    rounds = max(len(row["samples_ms"]) for row in rows)
    notes = [
        f"{row['name']} in {row['dtype']} {row['status']}, not timed: {row['reason']}"
        for row in rows
        if row["status"] != "timed"
    ]
    for row in rows:
        if medians := row.get("process_medians_ms"):
            ordered = ", ".join(map(format_milliseconds, sorted(medians)))
            notes.append(f"{row['name']} in {row['dtype']}: medians of the processes {ordered} ms")
    for row in rows:
        for outcome, count in (row["blocks"] or {}).items():
            notes.append(f"{row['name']} in {row['dtype']}: {count} {outcome}")
    left_out = [name for name in VARIANTS if name not in {row["name"] for row in rows}]
    if left_out:
        notes.append(f"not asked for (--variants): {', '.join(left_out)}")
    where = f" in {document['processes']} processes" if "processes" in document else ""
    notes.append(
        f"{rounds} rounds{where} in shuffled order, warm, inference_mode, random weights; error: relative to eager "
        f"float32, at most {', '.join(f'{limit:.0e} in {dtype}' for dtype, limit in workload['tolerance'].items())}"
    )
    load, cores = document["environment"]["load_before"], document["environment"]["cores"]
    if load is not None and load > cores / 2:
        notes.append(f"the load average before was {load:.1f} on {cores} cores: take the times as provisional")
    if workload["device"] == "cpu":
        notes.append("peak MiB: growth of the process's resident memory during one call, hence without weights")
        if any(VARIANTS[row["name"]].ours == "engine" for row in rows):
            notes.append("an engine runs in another process than the rest: it lets its process keep freed memory")
        notes.append(f"CPU only: {document['kernels_unavailable']}; no GPU figure was measured")
        return notes
    notes.append("peak MiB: all that torch allocated for the variant: weights, clip, workspaces, activations")
    for dtype, roofline in document["roofline"].items():
        notes.append(
            f"roofline in {dtype}: {roofline['floor_ms']:.4g} ms with each layer one kernel "
            f"({roofline['macs'] / 1e9:.1f} GMAC, {roofline['bytes'] / 1e9:.2f} GB), from "
            f"{roofline['operations_per_second'] / 1e12:.0f} TFLOP/s and {roofline['bytes_per_second'] / 1e12:.2f} "
            "TB/s measured at the start"
        )
    if document["kernels_unavailable"]:
        notes.append(f"slowfast_ext ran without its CUDA kernels: {document['kernels_unavailable']}")
    return notes


def plot(path: Path, document: dict) -> None:
    workload = document["workload"]
    timed = [row for row in document["variants"] if row["status"] == "timed"]
    title = f"{workload['model']}, {' x '.join(map(str, workload['clip']))}\n"
    title += document["environment"].get("gpu", document["environment"]["machine"])
    plot_bars(
        path,
        title,
        "ms a call, median and p10 to p90",
        [(f"{row['name']}, {row['dtype']}", row["median_ms"], row["p10_ms"], row["p90_ms"]) for row in timed],
        lambda label: "tab:orange" if VARIANTS[label.partition(",")[0]].ours else "tab:blue",
    )


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    document = measure(options) if options.processes == 1 else measure_in_processes(options)
    print(format_report(document))
    if options.json is not None:
        write_json(options.json, document)
    timed = any(row["status"] == "timed" for row in document["variants"])
    if options.plot is not None and timed:
        plot(options.plot, document)
    return int(any(row["status"] == "wrong" for row in document["variants"]) or not timed)


if __name__ == "__main__":
    sys.exit(main())
