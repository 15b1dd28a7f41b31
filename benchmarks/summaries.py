"""What follows from the samples of a latency document, and the documents of several processes as one."""

from __future__ import annotations

import copy
import statistics
from collections import Counter

from variants import VARIANTS

from slowfast_ext.evaluation.measuring import Summary


def summarise(document: dict) -> dict:
    """Add medians, rates and speed-ups to the variants that were timed; returns the same document."""
    workload, roofline, rows = document["workload"], document["roofline"], document["variants"]
    summaries = {(row["name"], row["dtype"]): Summary.of(row["samples_ms"]) for row in rows if row["samples_ms"]}
    eager = summaries["eager", "float32"].median if ("eager", "float32") in summaries else None
    for row in rows:
        summary = summaries.get((row["name"], row["dtype"]))
        if summary is None:
            continue
        best_plain = min(
            (
                other.median
                for (name, dtype), other in summaries.items()
                if dtype == row["dtype"] and VARIANTS[name].is_plain
            ),
            default=None,
        )
        floor = roofline[row["dtype"]]["floor_ms"]
        clips = workload["clip"][0] / summary.median * 1e3
        row |= {
            "median_ms": summary.median,
            "p10_ms": summary.p10,
            "p90_ms": summary.p90,
            "clips_per_second": clips,
            "videos_per_second": clips / workload["views"],
            "speedup_over_best_plain": best_plain and best_plain / summary.median,
            "speedup_over_eager_float32": eager and eager / summary.median,
            "roofline_fraction": floor and floor / summary.median,
        }
    return document


def pool(documents: list[dict]) -> dict:
    """One document with the samples of all; a variant that was wrong or failed in one of them was so in the whole.

    Errors are the largest, memory and the time to prepare the median, the rest is as in the first document.
    ``process_medians_ms`` of a variant has what each document would say alone.
    """
    pooled = copy.deepcopy(documents[0])
    pooled["processes"] = len(documents)
    pooled["seconds"] = round(sum(document["seconds"] for document in documents), 1)
    pooled["variants"] = [_pool(rows) for rows in zip(*(document["variants"] for document in documents), strict=True)]
    return summarise(pooled)


def _pool(rows: tuple[dict, ...]) -> dict:
    for row in rows:
        if row["status"] != "timed":
            return row
    return rows[0] | {
        "relative_error": max(row["relative_error"] for row in rows),
        "prepare_seconds": statistics.median(row["prepare_seconds"] for row in rows),
        "peak_memory_bytes": _median_of_known([row["peak_memory_bytes"] for row in rows]),
        "blocks": rows[0]["blocks"] and _pool_blocks([row["blocks"] for row in rows]),
        "samples_ms": [sample for row in rows for sample in row["samples_ms"]],
        "process_medians_ms": [row["median_ms"] for row in rows],
    }


def _median_of_known(values: list[int | None]) -> int | None:
    return None if None in values else round(statistics.median(values))


def _pool_blocks(all_blocks: list[dict[str, int]]) -> dict[str, int]:
    """What all ran as one says it; of what only some ran, since each process chooses for itself, in how many."""
    counts = Counter(item for blocks in all_blocks for item in blocks.items())
    return {
        what if times == len(all_blocks) else f"{what} (in {times} of {len(all_blocks)} processes)": count
        for (what, count), times in counts.items()
    }
