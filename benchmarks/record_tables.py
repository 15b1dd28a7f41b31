"""The tables of docs/gpu.md, in Markdown, from documents of the stages of gpu_check.sh by the name of the stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import training_table
from latency import format_milliseconds
from layer_variants import OPERATORS
from recorded import kind_of, short_name, stages
from report import environment_line
from training import PARTS
from variants import VARIANTS

EAGER = "eager_channels_last"
PLAIN = [name for name, variant in VARIANTS.items() if variant.is_plain and variant.compile is None]
COMPILED = [name for name, variant in VARIANTS.items() if variant.compile is not None]
OURS = [name for name, variant in VARIANTS.items() if variant.ours]

# The first targets of the design: videos of 30 views a second in bfloat16, milliseconds of one clip, and so on.
VIDEOS_PER_SECOND = {"r50_4x16": 100, "r50_8x8": 65, "r101_8x8": 40}
CLIP_MODEL, CLIP_MS = "r50_4x16", 0.6
OVER_PLAIN, OVER_COMPILED = 2.0, 1.0
TRAINING_SPEEDUP, TRAINING_MEMORY = 1.3, 0.6
FLOOR_FRACTION = 0.6


def of_kinds(documents: dict[str, dict], *kinds: str) -> dict[str, dict]:
    return {stage: document for stage, document in documents.items() if kind_of(stage) in kinds}


def timed(document: dict | None) -> dict[str, dict]:
    """The rows that have times, by the name of the variant."""
    rows = document["variants"] if document else ()
    return {row["name"]: row for row in rows if row["status"] == "timed"}


def fastest(rows: dict[str, dict], names: Sequence[str]) -> dict | None:
    return min((rows[name] for name in names if name in rows), key=lambda row: row["median_ms"], default=None)


def speedup(row: dict | None, other: dict | None) -> float | None:
    """How many times as fast as ``other`` it is, None where one of them was not timed."""
    return row and other and other["median_ms"] / row["median_ms"]


def page(documents: dict[str, dict]) -> str:
    """All that was measured on one GPU."""
    parts = [section("First targets", targets(documents))]
    for title, table, *kinds in (
        ("Whole networks", networks, "latency"),
        ("Whole networks, torch.compile with max-autotune", networks, "autotune"),
        ("Training steps", steps, "training"),
        ("Training steps, compiled into CUDA graphs", steps, "graphs"),
        ("Loss of plain and of fused blocks", training_table.curves, "curves"),
    ):
        machines: dict[str, list[dict]] = {}
        for document in of_kinds(documents, *kinds).values():
            machines.setdefault(environment_line(document["environment"]), []).append(document)
        if machines:
            parts.append(section(title, *(f"{line}:\n\n{table(chosen)}" for line, chosen in machines.items())))
    return "\n\n".join(parts)


def section(title: str, *parts: str) -> str:
    return "\n\n".join([f"### {title}", *parts])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _mebibytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:.0f}"


def _spread(row: dict) -> str:
    median, p10, p90 = (format_milliseconds(row[key]) for key in ("median_ms", "p10_ms", "p90_ms"))
    return f"{median} ({p10} to {p90})"


def _not_timed(document: dict) -> Iterator[str]:
    workload = document["workload"]
    for row in document["variants"]:
        if row["status"] != "timed":
            where = f"{short_name(workload['model'])}, {_type(document)}, {workload['clip'][0]} clips"
            yield f"- {row['name']} in {where}: {row['status']}, {row['reason']}"


def _with_reasons(table: str, documents: list[dict]) -> str:
    reasons = [line for document in documents for line in _not_timed(document)]
    return "\n".join([table, "", "Not timed:", "", *reasons]) if reasons else table


def _type(document: dict) -> str:
    workload = document["workload"]
    return workload["dtype"] if "dtype" in workload else ", ".join(workload["dtypes"])


def networks(documents: list[dict]) -> str:
    """A row for each variant in each document of `latency.py`."""
    header = ["network", "type", "clips", "variant", "ms (p10 to p90)", f"over {EAGER}", "over torch.compile"]
    header += ["videos/s", "of the floor", "peak MiB", "error"]
    lines = []
    for document in documents:
        workload, rows = document["workload"], timed(document)
        clips = workload["clip"][0]
        for row in rows.values():
            line = [short_name(workload["model"]), row["dtype"], str(clips), row["name"], _spread(row)]
            line += [_times(speedup(row, rows.get(EAGER))), _times(speedup(row, fastest(rows, COMPILED)))]
            line += [f"{row['videos_per_second']:.4g}" if clips == workload["views"] else "-"]
            line += [_percent(row["roofline_fraction"]), _mebibytes(row["peak_memory_bytes"])]
            lines.append([*line, f"{row['relative_error']:.0e}"])
    return _with_reasons(_table(header, lines), documents)


def steps(documents: list[dict]) -> str:
    """A row for each variant in each document of `training.py`."""
    header = ["network", "type", "clips", "variant", "ms (p10 to p90)", *PARTS, f"over {EAGER}", "peak MiB", "kept MiB"]
    lines = []
    for document in documents:
        workload, rows = document["workload"], timed(document)
        for row in rows.values():
            line = [short_name(workload["model"]), workload["dtype"], str(workload["clip"][0]), row["name"]]
            line += [_spread(row), *(format_milliseconds(row[f"{part}_ms"]) for part in PARTS)]
            line += [_times(speedup(row, rows.get(EAGER)))]
            lines.append([*line, _mebibytes(row["peak_memory_bytes"]), _mebibytes(row["kept_bytes"])])
    return _with_reasons(_table(header, lines), documents)


def targets(documents: dict[str, dict]) -> str:
    """Each target with what was measured; what nobody measured is "-"."""
    lines = []
    for model, goal in VIDEOS_PER_SECOND.items():
        ours = fastest(timed(documents.get(f"latency_{model}_bfloat16_batch30")), OURS)
        value = ours and ours["videos_per_second"]
        lines.append(_one(f"videos of 30 views a second, {model}, bfloat16", goal, value, "{:.4g}"))
    ours = fastest(timed(documents.get(f"latency_{CLIP_MODEL}_bfloat16_batch1")), OURS)
    value = ours and ours["median_ms"]
    lines.append(_one(f"one clip, {CLIP_MODEL}, bfloat16", CLIP_MS, value, "{:.4g} ms", least=False))
    for what, goal, kinds, others in (
        ("fastest of slowfast_ext over the fastest of plain PyTorch", OVER_PLAIN, ("latency",), PLAIN),
        ("fastest of slowfast_ext over the fastest of torch.compile", OVER_COMPILED, ("latency", "autotune"), COMPILED),
    ):
        values = {}
        for stage, document in of_kinds(documents, *kinds).items():
            rows = timed(document)
            if ratio := speedup(fastest(rows, OURS), fastest(rows, others)):
                values[stage, ""] = ratio
        lines.append(_everywhere(what, goal, values, kinds, "{:.2f}x"))
    for model in VIDEOS_PER_SECOND:
        for kind, name in (("training", "accelerate"), ("graphs", "accelerate_graphs")):
            rows = timed(documents.get(f"{kind}_{model}_bfloat16_batch8"))
            ours, eager = rows.get(name), rows.get(EAGER)
            what = f"{name} in training over {EAGER}, {model}, bfloat16"
            lines.append(_one(what, TRAINING_SPEEDUP, speedup(ours, eager), "{:.2f}x"))
            if kind == "training":  # of a graph's memory torch does not count the peak
                peaks = [row and row["peak_memory_bytes"] for row in (ours, eager)]
                memory = peaks[0] / peaks[1] if all(peaks) else None
                what = f"{name} in training, peak memory above weights, of {EAGER}'s, {model}, bfloat16"
                lines.append(_one(what, TRAINING_MEMORY, memory, "{:.0%}", least=False))
    operators = {"conv3d_bn_relu": {}} | {name: {} for name in OPERATORS.values()}
    for stage, document in of_kinds(documents, "layers").items():
        for row in document["rows"]:
            for operator, entry in _operators(row):
                operators[operator][stage, f"{row['name']} of "] = entry["floor_fraction"]
    for operator, values in operators.items():
        lines.append(_everywhere(f"{operator}, of its floor", FLOOR_FRACTION, values, ("layers",), "{:.0%}"))
    return _table(["target", "wanted", "measured", "outcome"], lines)


def _operators(row: dict) -> Iterator[tuple[str, dict]]:
    """The operators that compute the whole of a row of `layers.py` in one launch, each with its measurement."""
    part = row["kind"] if row["kind"] != "layer" else "lateral" if row["name"].endswith("_lateral") else "head"
    for name, entry in row["measured"].items():
        if entry["status"] != "timed":
            continue
        if name == "conv3d_bn_relu" and row["kind"] == "layer":
            yield name, entry
        elif name == "fused":
            yield OPERATORS[part], entry


def _wanted(goal: float, shown: str, least: bool = True) -> str:
    return f"at {'least' if least else 'most'} {shown.format(goal)}"


def _outcome(value: float, goal: float, least: bool = True) -> str:
    difference = value / goal - 1 if least else 1 - value / goal
    return f"{'reached' if difference >= 0 else 'missed'} by {abs(difference):.1%}"


def _one(what: str, goal: float, value: float | None, shown: str, least: bool = True) -> list[str]:
    if value is None:
        return [what, _wanted(goal, shown, least), "-", "-"]
    return [what, _wanted(goal, shown, least), shown.format(value), _outcome(value, goal, least)]


def _everywhere(what: str, goal: float, values: dict[tuple[str, str], float], kinds: Sequence[str], shown: str):
    """The least of the values by stage and place, and in how many of the stages of these kinds there are any."""
    if not values:
        return [what, _wanted(goal, shown), "-", "-"]
    (stage, place), least = min(values.items(), key=lambda item: item[1])
    reached = sum(value >= goal for value in values.values())
    count, of = len({name for name, _ in values}), sum(kind_of(name) in kinds for name in stages())
    measured = f"{shown.format(least)} in {place}{stage}, the least of {len(values)}"
    outcome = f"{_outcome(least, goal)}; {reached} of {len(values)} reach it"
    return [what, _wanted(goal, shown), measured, outcome if count == of else f"{outcome}, {of - count} stages missing"]
