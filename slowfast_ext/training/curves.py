"""The curves of a run, drawn from its JSON lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .logs import read_log


def require_matplotlib() -> None:
    """Raise ImportError, with what to install, unless curves can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "--plot must find matplotlib, got none installed: pip install 'slowfast-ext[plot]'"
        ) from error


def read_curves(folder: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Epochs (fractional) and values of each quantity that the ``.log.json`` files of ``folder`` hold.

    Where a resumed run did epochs again, the later lines count. Names: ``train/loss``, ``val/top1_acc``, ...
    """
    points: dict[str, dict[tuple[float, int], float]] = {}
    for path in sorted(folder.glob("*.log.json")):
        entries = [entry for entry in read_log(path) if "mode" in entry]
        last: dict[int, int] = {}
        for entry in entries:
            if entry["mode"] == "train":
                last[entry["epoch"]] = max(last.get(entry["epoch"], 1), entry["iter"])
        longest = max(last.values(), default=1)
        if entries:
            _forget_later(points, _place(entries[0], longest))
        for entry in entries:
            for name, value in entry.items():
                if name not in ("mode", "epoch", "iter", "lr") or (name == "lr" and entry["mode"] == "train"):
                    points.setdefault(f"{entry['mode']}/{name}", {})[_place(entry, longest)] = value
    return {
        name: ([place[0] for place in sorted(values)], [values[place] for place in sorted(values)])
        for name, values in points.items()
    }


def plot_curves(folder: Path, path: Path) -> None:
    """Draw loss, accuracies and learning rate over the epochs.

    Raises:
        ImportError: matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    curves = read_curves(folder)
    figure = Figure(figsize=(8, 9), layout="constrained")
    for axis, title, names in zip(
        figure.subplots(3, 1, sharex=True),
        ("loss", "accuracy", "learning rate"),
        (
            ("train/loss",),
            ("train/top1_acc", "train/top5_acc", "val/top1_acc", "val/top5_acc", "val/mean_class_accuracy"),
            ("train/lr",),
        ),
        strict=True,
    ):
        for name in names:
            if name in curves:
                axis.plot(*curves[name], label=name, marker="o" if name.startswith("val") else None, markersize=3)
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    axis.set_xlabel("epoch")
    figure.savefig(path)


def _place(entry: dict[str, Any], iterations: int) -> tuple[float, int]:
    if entry["mode"] == "val":
        return float(entry["epoch"]), 1
    return entry["epoch"] - 1 + entry["iter"] / max(iterations, entry["iter"]), 0


def _forget_later(points: dict[str, dict[tuple[float, int], float]], place: tuple[float, int]) -> None:
    for values in points.values():
        for later in [point for point in values if point >= place]:
            del values[later]
