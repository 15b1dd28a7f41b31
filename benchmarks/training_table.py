"""The tables of docs/training.md, from the newest committed results of `training.py` and `training_curves.py` on a CPU.

python benchmarks/training_table.py
"""

from __future__ import annotations

from recorded import newest

DTYPES = ("float32", "bfloat16")


def on_a_cpu(benchmark: str) -> list[dict]:
    return [newest(benchmark, dtype) for dtype in DTYPES]


def steps(documents: list[dict]) -> str:
    """A row for each variant in each document of `training.py`, below a line that names machine, versions and clips."""
    environment, workload = documents[0]["environment"], documents[0]["workload"]
    lines = [
        f"{environment['machine']}, {environment['cores']} cores ({environment['instructions']}), torch "
        f"{environment['torch']}, commit {environment['commit']}, {workload['model']}, clips of "
        f"{' x '.join(map(str, workload['clip']))}:",
        "",
        "| variant | type | step, s (p10 to p90) | forward | backward | against best plain | peak MiB | kept MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for document in documents:
        for row in document["variants"]:
            times = (row[f"{key}_ms"] / 1e3 for key in ("median", "p10", "p90", "forward", "backward"))
            lines.append(
                f"| {row['description']} | {document['workload']['dtype']} "
                "| {:.2f} ({:.2f} to {:.2f}) | {:.2f} | {:.2f} ".format(*times)
                + f"| {row['speedup_over_best_plain']:.2f}x "
                f"| {row['peak_memory_bytes'] / 2**20:.0f} | {row['kept_bytes'] / 2**20:.0f} |"
            )
    return "\n".join(lines)


def curves(documents: list[dict]) -> str:
    """A row for each document of `training_curves.py`, below a line that names versions."""
    lines = [
        f"{documents[0]['workload']['steps']} steps, torch {documents[0]['environment']['torch']}, commit "
        f"{documents[0]['environment']['commit']}:",
        "",
        "| type | another seed | another layout | fused | fused, first step |",
        "|---|---|---|---|---|",
    ]
    for document in documents:
        values = [document[f"difference_of_{which}"] for which in ("seeds", "layouts", "fused")]
        cells = " | ".join(f"{value:.4f}" for value in values)
        lines.append(f"| {document['workload']['dtype']} | {cells} | {document['first_difference']:.0e} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(steps(on_a_cpu("training")), curves(on_a_cpu("training_curves")), sep="\n\n")
