"""The roofline picture of a document of layers.py: what each layer and block reached, below what the device could."""

from __future__ import annotations

from pathlib import Path

from recorded import short_name
from report import drawn

# Of each layer or block the fastest implementation of a kind is one point.
KINDS = {
    "slowfast_ext": (("conv3d_bn_relu", "fused"), "tab:orange"),
    "best alternative": (("eager", "cudnn"), "tab:blue"),
}


def points(rows: list[dict], names: tuple[str, ...]) -> list[tuple[float, float]]:
    """Operations a byte and operations a second of the rows that were timed in one of the implementations ``names``.

    Bytes are the least that the row must move, so that two implementations of it are one above the other. What only
    moves data, as pooling, has no point.
    """
    found = []
    for row in rows:
        times = [
            entry["median_us"] for name, entry in row["measured"].items() if name in names and "median_us" in entry
        ]
        if times and row["macs"]:
            found.append((2 * row["macs"] / row["bytes"], 2e6 * row["macs"] / min(times)))
    return found


def plot(path: Path, document: dict) -> None:
    """The picture as PNG, layers as discs and blocks as triangles. Needs matplotlib."""
    workload, ceilings = document["workload"], document["ceilings"]
    bandwidth = ceilings["bytes_per_second"]
    layers = [row for row in document["rows"] if row["kind"] == "layer"]
    blocks = [row for row in document["rows"] if row["kind"] != "layer"]
    intensities = [2 * row["macs"] / row["bytes"] for row in document["rows"] if row["macs"]]
    with drawn(path, 6) as axes:
        for label, (names, colour) in KINDS.items():
            for rows, marker, what in ((layers, "o", "layers"), (blocks, "^", "blocks")):
                if found := points(rows, names):
                    x, y = zip(*found, strict=True)
                    axes.scatter(x, y, s=22, color=colour, marker=marker, alpha=0.7, label=f"{label}, {what}")
        for peak in ceilings["operations_per_second"]:
            ridge = peak / bandwidth
            ends = sorted([min([ridge / 2, *intensities]), ridge, max([2 * ridge, *intensities])])
            label = f"{peak / 1e12:.4g} TFLOP/s, {bandwidth / 1e12:.4g} TB/s, {ceilings['source']}"
            axes.plot(ends, [min(peak, end * bandwidth) for end in ends], color="black", label=label)
        axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="operations a second")
        clip = " x ".join(map(str, workload["clip"]))
        device = document["environment"].get("gpu", document["environment"]["machine"])
        axes.set_title(f"{short_name(workload['model'])}, {clip}, {workload['dtype']}\n{device}")
        axes.grid(alpha=0.3)
        axes.legend()
