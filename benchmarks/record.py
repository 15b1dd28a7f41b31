"""The record of a GPU: results of gpu_check.sh among the committed ones, and docs/gpu.md with pictures from these.

    python benchmarks/record.py out
    python benchmarks/record.py --page

The first copies each stage's document in `out` to `benchmarks/results/<device>-<date>-<stage>.json`. All must be of one
machine, one commit without changes and one version of torch. Stages that are missing are listed, and so are damaged
documents; the others are taken. The second writes docs/gpu.md and pictures beside it, from the newest result of each
stage on each GPU; where there is none, it writes nothing. Exit status: 0; 1 if a document was damaged; 2 for bad
arguments or refused documents.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import datetime
from pathlib import Path

import latency
import record_tables
import recorded
import roofline_picture
from latency import check_matplotlib, refusing
from record_tables import OURS, fastest, timed
from recorded import BENCHMARKS, device_name, kind_of, newest_on_gpus, path_of, short_name, stages
from report import plot_bars, write_json, write_text

PAGE = Path(__file__).resolve().parents[1] / "docs" / "gpu.md"
LARGEST = 200_000  # bytes of a file with all samples
HEAD = """# Measured on GPUs

Written by `benchmarks/record.py --page` from the files in `benchmarks/results` that `benchmarks/gpu_check.sh` left;
change these, not this page.

Times are medians of rounds in shuffled order, warm, after the result was compared with eager float32. *floor*: each
layer one kernel that takes the longer of its operations and its bytes at the rates that were measured of the device
(`benchmarks/roofline.py`). Peak memory is all that torch allocates for a network, and in training what a step adds to
weights, momentum and clips. *over torch.compile* is over the fastest that was timed beside. In the pictures *best
alternative* is the fastest of eager PyTorch and cuDNN's fused convolutions.
"""


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Take over what gpu_check.sh measured; write docs/gpu.md.")
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT", help="folder that gpu_check.sh wrote")
    parser.add_argument("--page", action="store_true", help="write docs/gpu.md and its pictures (needs matplotlib)")
    options = parser.parse_args(arguments)
    with refusing(parser):
        if options.out is None and not options.page:
            raise ValueError("OUT or --page must be given, got neither")
        if options.page:
            check_matplotlib("--page")
        options.documents, options.damaged = {}, {}
        if options.out is not None:
            options.documents, options.damaged = read(options.out)
            if not options.documents and not options.damaged:
                raise ValueError(f"OUT must be a folder with documents of gpu_check.sh's stages, got {options.out}")
            check(options.documents)
    return options


def read(folder: Path) -> tuple[dict[str, dict], dict[str, str]]:
    """The documents of the stages in a folder, and what is wrong with those that are damaged, by the stage."""
    documents, damaged = {}, {}
    for stage in stages():
        path = folder / f"{stage}.json"
        if not path.exists():
            continue
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["benchmark"] != BENCHMARKS[kind_of(stage)]:
                raise ValueError(f"of the benchmark {document['benchmark']}")
            datetime.fromisoformat(document["began"])
            record_tables.page({stage: document})
            documents[stage] = document
        except Exception as error:  # what is damaged fails in many ways; the other stages go on
            damaged[stage] = f"{type(error).__name__}: {error}"
    return documents, damaged


def check(documents: dict[str, dict]) -> None:
    """Raise unless the documents are of one machine, torch and commit, and the commit says what ran."""
    for key in ("machine", "gpu", "torch", "commit"):
        seen = {document["environment"].get(key): stage for stage, document in documents.items()}
        if len(seen) > 1:
            found = " and ".join(f"{value} ({stage})" for value, stage in seen.items())
            raise ValueError(f"OUT must hold documents of one {key}, got {found}")
        if key == "commit" and None in seen:
            raise ValueError("OUT must hold documents that name their commit, got none (see COMMIT of gpu_check.sh)")
        if key == "commit" and any(commit.endswith("-dirty") for commit in seen):
            raise ValueError(f"OUT must hold documents of a commit without changes, got {', '.join(seen)}")


def without_samples(document: dict) -> dict:
    """The document itself if its file is small or has none, else with a note in place of the samples."""
    if len(json.dumps(document, indent=1)) <= LARGEST or "variants" not in document:
        return document
    rows = [{key: value for key, value in row.items() if key != "samples_ms"} for row in document["variants"]]
    return document | {"samples_ms": f"left out of a file larger than {LARGEST} bytes", "variants": rows}


def draw(gpu: str, documents: dict[str, dict]) -> list[Path]:
    """Pictures of the stages in bfloat16, beside the page."""
    paths = []

    def beside(stage: str) -> Path:
        paths.append(PAGE.with_name(f"{PAGE.stem}-{device_name({'gpu': gpu})}-{stage}.png"))
        return paths[-1]

    for stage, document in documents.items():
        if "_bfloat16_" not in stage:
            continue
        if kind_of(stage) == "latency" and (ours := fastest(timed(document), OURS)):
            latency.plot(beside(stage), document)
            if others := [row for name, row in timed(document).items() if name not in OURS]:
                plot_speedups(beside(stage.replace("latency", "speedup")), document, ours, others)
        elif kind_of(stage) == "layers":
            roofline_picture.plot(beside(stage.replace("layers", "roofline")), document)
    return paths


def plot_speedups(path: Path, document: dict, ours: dict, others: list[dict]) -> None:
    """How many times as fast as each of the others ``ours`` is; the ranges are those of the other."""
    keys = ("median_ms", "p10_ms", "p90_ms")
    bars = [(row["name"], *(row[key] / ours["median_ms"] for key in keys)) for row in others]
    workload = document["workload"]
    title = f"{short_name(workload['model'])}, {' x '.join(map(str, workload['clip']))}, {ours['dtype']}\n"
    title += document["environment"].get("gpu", document["environment"]["machine"])
    plot_bars(path, title, f"speed-up of {ours['name']}, p10 to p90 of the other", bars)


def write_page() -> bool:
    """Whether there was a result of a GPU to write docs/gpu.md from."""
    parts = [HEAD.strip()]
    for gpu, documents in newest_on_gpus().items():
        pictures = "\n".join(f"![{path.stem}]({path.name})" for path in draw(gpu, documents))
        parts += [f"## {gpu}", record_tables.page(documents), *([pictures] if pictures else [])]
    if len(parts) > 1:
        write_text(PAGE, "\n\n".join(parts) + "\n")
    return len(parts) > 1


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    for stage, document in options.documents.items():
        write_json(path_of(stage, document), without_samples(document))
        print(f"taken: {path_of(stage, document).name}")
    if options.out is not None:
        missing = [stage for stage in stages() if stage not in options.documents and stage not in options.damaged]
        print(f"missing: {', '.join(missing) or 'none'}")
        for stage, reason in options.damaged.items():
            print(f"damaged: {stage}.json: {reason}")
    if options.page:
        print(f"written: {PAGE}" if write_page() else f"not written: {recorded.RESULTS} has no result of a GPU")
    return int(bool(options.damaged))


if __name__ == "__main__":
    sys.exit(main())
