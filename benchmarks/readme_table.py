"""The latency table of the README, from the newest committed result of `latency.py` on a CPU.

python benchmarks/readme_table.py
"""

from __future__ import annotations

from recorded import newest


def markdown(document: dict) -> str:
    """A row for each variant that was timed, below a line that names machine, versions and workload."""
    environment, workload = document["environment"], document["workload"]
    clip = " x ".join(map(str, workload["clip"]))
    processes = f", {document['processes']} processes" if "processes" in document else ""
    lines = [
        f"{environment['machine']}, {environment['cores']} cores ({environment['instructions']}), torch "
        f"{environment['torch']}, commit {environment['commit']}, {workload['model']}, one clip of {clip}{processes}:",
        "",
        "| variant | type | median ms (p10 to p90) | against eager float32 | peak MiB | error |",
        "|---|---|---|---|---|---|",
    ]
    for row in document["variants"]:
        if row["status"] == "timed":
            memory = "-" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 2**20:.0f}"
            lines.append(
                f"| {row['description']} | {row['dtype']} | {row['median_ms']:.0f} "
                f"({row['p10_ms']:.0f} to {row['p90_ms']:.0f}) | {row['speedup_over_eager_float32']:.2f}x | {memory} | "
                f"{row['relative_error']:.0e} |"
            )
    missing = [f"{row['description']} in {row['dtype']}" for row in document["variants"] if row["status"] != "timed"]
    return "\n".join([*lines, "", f"Not timed, because it failed: {'; '.join(missing)}."] if missing else lines)


if __name__ == "__main__":
    print(markdown(newest("latency")))
