"""Where a measurement was made, and how it is written down: screen, JSON, picture."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch


def describe_environment(device: torch.device) -> dict[str, str | int | bool | None]:
    """The machine, the versions and the commit, as plain values for JSON."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    environment = {
        "machine": _processor(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "slowfast_ext": importlib.metadata.version("slowfast-ext"),
        "commit": _commit(),
    }
    if device.type == "cuda":
        environment |= {
            "gpu": torch.cuda.get_device_name(device),
            "capability": "{}.{}".format(*torch.cuda.get_device_capability(device)),
            "driver": _run(
                "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", str(device.index)
            ),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "tf32": torch.backends.cudnn.allow_tf32,
        }
    return environment


def environment_line(environment: dict) -> str:
    """One line for the head of a table."""
    parts = [
        f"{environment['machine']}, {environment['cores']} cores ({environment['threads']} threads, "
        f"{environment['instructions']})"
    ]
    if "gpu" in environment:
        parts.append(f"{environment['gpu']}, driver {environment['driver'] or 'unknown'}")
    parts.append(f"torch {environment['torch']}")
    if "gpu" in environment:
        parts.append(f"CUDA {environment['cuda']}, cuDNN {environment['cudnn']}")
    return " | ".join([*parts, f"commit {environment['commit'] or 'unknown'}"])


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Short hash of the checkout this file is in, with ``-dirty`` where tracked files were changed; of a copy without
    its repository what the variable COMMIT says."""
    described = _run("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*")
    return described or os.environ.get("COMMIT")


def _run(*command: str) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells):
        first, *others = (
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


@contextmanager
def _replaced(path: Path):
    """A temporary file beside ``path`` that takes its place when the block ends well, and is removed otherwise."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(name)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp's own mode is for the owner alone
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def write_json(path: Path, document: dict) -> None:
    write_text(path, json.dumps(document, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    with _replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    """Rows of equal keys, which become the header; None becomes an empty cell."""
    with _replaced(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


@contextmanager
def drawn(path: Path, height: float):
    """Axes of a picture nine inches wide and as many inches high, which becomes a PNG when the block ends well."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    FigureCanvasAgg(figure)
    yield figure.subplots()
    with _replaced(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def plot_bars(
    path: Path,
    title: str,
    label: str,
    bars: Sequence[tuple[str, float, float, float]],
    colour: Callable[[str], str] = lambda name: "tab:blue",
) -> None:
    """Horizontal bars with ranges, as PNG. Needs matplotlib.

    Args:
        bars: name, value, lower and upper end of the range.
        colour: of a bar's name, in matplotlib's terms.
    """
    names, values, low, high = zip(*bars, strict=True)
    errors = [
        [value - end for value, end in zip(values, low, strict=True)],
        [end - value for value, end in zip(values, high, strict=True)],
    ]
    with drawn(path, 1.4 + 0.5 * len(bars)) as axes:
        container = axes.barh(names, values, xerr=errors, color=[colour(name) for name in names], capsize=3)
        axes.bar_label(container, fmt="%.4g", padding=6)
        axes.margins(x=0.15)
        axes.invert_yaxis()
        axes.set(title=title, xlabel=label)
