"""``slowfast-ext zoo``: the published networks as a table."""

from argparse import Namespace

from ..models import ZOO, ZooRow

_TITLES = ("config", "depth", "frames", "tau", "lateral norm", "data", "source", "top-1", "top-5")


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "zoo",
        help="list the published networks",
        description="The rows of the model zoo. config: what --config and create_model() take; depth: of the slow and "
        "the fast pathway; frames: that they see of a clip; tau: stride of the slow pathway in the clip. Accuracies "
        "(per cent, validation set, 30 views, 1 for Something-Something) as published with the weights.",
    )
    parser.set_defaults(run=run)


def run(args: Namespace) -> int:
    rows = [_TITLES, *map(_cells, ZOO)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _cells(row: ZooRow) -> tuple[str, ...]:
    network = row.network
    slow_frames = network.clip_len // network.resample_rate
    return (
        row.name,
        f"{network.slow.depth}/{network.fast.depth}",
        f"{slow_frames}/{slow_frames * network.speed_ratio}",
        str(network.resample_rate),
        "yes" if network.lateral_norm else "no",
        row.dataset,
        row.source,
        f"{row.top1:.2f}",
        f"{row.top5:.2f}",
    )
