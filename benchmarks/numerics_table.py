"""The table of docs/numerics.md, from the newest committed result of `numerics.py` on a CPU.

python benchmarks/numerics_table.py
"""

from __future__ import annotations

from recorded import newest, short_name

WAYS = {"eager": "eager", "eager_channels_last": "eager, channels_last_3d", "engine": "engine"}


def markdown(document: dict) -> str:
    """A row for each network, type and way, below a line that names machine, versions and clips."""
    environment, clips = document["environment"], document["clips"]
    lines = [
        f"{environment['machine']} ({environment['instructions']}), torch {environment['torch']}, commit "
        f"{environment['commit']}, {clips[0]} clips of {' x '.join(map(str, clips[1:]))}:",
        "",
        "| network | type | way | mean error | largest | top-1 agrees | top-5 agrees |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        network = short_name(row["model"])
        lines.append(
            f"| {network} | {row['dtype']} | {WAYS[row['way']]} | {row['mean_error']:.2e} | {row['largest_error']:.2e} "
            f"| {row['top1_agreement']:.1%} | {row['top5_agreement']:.1%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(newest("numerics")))
