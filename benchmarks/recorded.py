"""The committed results: where they lie, how they are named, and which of them are the newest."""

from __future__ import annotations

import functools
import json
import re
import subprocess
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"
# What the stages of gpu_check.sh that measure begin with, and which benchmark writes their document.
BENCHMARKS = {
    "latency": "latency",
    "autotune": "latency",
    "layers": "layers",
    "training": "training",
    "graphs": "training",
    "curves": "training_curves",
}


@functools.cache
def stages() -> tuple[str, ...]:
    """Names of the stages of gpu_check.sh that measure, in their order."""
    command = ["bash", str(FOLDER / "gpu_check.sh"), "--list"]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return tuple(name for name in names if kind_of(name) in BENCHMARKS)


def kind_of(stage: str) -> str:
    return stage.partition("_")[0]


def device_name(environment: dict) -> str:
    """``nvidia-h200`` of a GPU, ``cpu-amd-epyc`` of a machine without one."""
    name = environment.get("gpu") or f"cpu {environment['machine']}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def path_of(stage: str, document: dict) -> Path:
    """Where the result of a stage belongs."""
    return RESULTS / f"{device_name(document['environment'])}-{document['began'][:10]}-{stage}.json"


def newest(benchmark: str, dtype: str | None = None) -> dict:
    """The document that ``--json`` of this benchmark, with this type if it is given, wrote last on a CPU."""
    documents = [document for _, document in _read("cpu-*.json") if document["benchmark"] == benchmark]
    documents = [each for each in documents if dtype is None or each["workload"]["dtype"] == dtype]
    return max(documents, key=lambda each: each["began"])


def newest_on_gpus() -> dict[str, dict[str, dict]]:
    """The newest document of each stage, in the order of the stages, by the name of the GPU."""
    found: dict[str, dict[str, dict]] = {}
    for path, document in sorted(_read("*.json"), key=lambda pair: pair[1]["began"]):
        if "gpu" in document["environment"]:
            stage = path.stem.partition(f"-{document['began'][:10]}-")[2]
            found.setdefault(document["environment"]["gpu"], {})[stage] = document
    return {gpu: {name: found[gpu][name] for name in stages() if name in found[gpu]} for gpu in sorted(found)}


def _read(pattern: str) -> list[tuple[Path, dict]]:
    return [(path, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(RESULTS.glob(pattern))]


def short_name(model: str) -> str:
    """``r50_4x16x1`` of ``slowfast_r50_4x16x1_256e_kinetics400_rgb``."""
    return model.removeprefix("slowfast_").removesuffix("_256e_kinetics400_rgb")
