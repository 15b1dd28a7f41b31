"""``slowfast-ext features``: pooled features of videos."""

import argparse
import dataclasses
import os
import sys
import time

from tqdm import tqdm

from ..evaluation.features import ORDERS, SUFFIXES, FeatureTable, arrange_features
from ..evaluation.inference import over_videos, view_features
from .arguments import (
    add_network_options,
    add_run_options,
    add_video_inputs,
    add_view_options,
    find_device,
    find_videos,
    load_network,
    prepare_engine,
    view_plan,
)
from .files import check_writable

_DESCRIPTION = """\
Write the features in front of the classifier: the last feature maps of both pathways, averaged over time and place
(2304 numbers for the published networks: 2048 slow, 256 fast), and over the views of the video, which are those that
the network was tested with. A file that cannot be read is reported and left out, and the rest is done. What is done is
written every ten minutes, after Ctrl-C and at the end.
"""
_EPILOG = """\
The file, by its suffix:
  .npz         arrays "paths", "features" (videos, channels) or, with --per-view, (videos, views, channels), float32,
               and "settings" (JSON)
  .json, .pkl  a dictionary with the same three
  .npy         the features alone; the paths in OUT.txt, one a line

Exit status: 0; 1 if a video failed; 2 if the arguments are wrong, before any work; 130 after Ctrl-C.
"""
_SECONDS_BETWEEN_WRITES = 600


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "features",
        help="write pooled features of videos",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_video_inputs(parser)
    add_network_options(parser)
    parser.add_argument("--out", required=True, metavar="OUT", help=f"file to write: {', '.join(SUFFIXES)}")
    parser.add_argument(
        "--order",
        default="slow-fast",
        choices=ORDERS,
        help="of the pathways' channels (default: slow-fast; fast-slow is that of the classifier's columns)",
    )
    parser.add_argument("--per-view", action="store_true", help="one row a view instead of their mean")
    parser.add_argument("--resume", action="store_true", help="keep what OUT (.npz or .json) holds and do the rest")
    add_view_options(parser)
    add_run_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    paths = list(dict.fromkeys(find_videos(args.videos, args.root)))
    if not args.out.endswith(SUFFIXES):
        raise ValueError(f"--out must end in {', '.join(SUFFIXES)}, got '{args.out}'")
    check_writable("--out", args.out)
    device = find_device(args.device)
    model = load_network(args)
    plan = view_plan(model.config, args)
    settings = {
        "checkpoint": args.checkpoint,
        "config": args.config,
        "dtype": args.dtype,
        "order": args.order,
        "per_view": args.per_view,
        "views": dataclasses.asdict(plan),
    }
    done = _done(args, settings)
    engine = prepare_engine(model, device, args)
    table = FeatureTable(settings, {path: done[path] for path in paths if path in done})
    failed = 0

    def compute(views):
        return arrange_features(view_features(engine, views), model.config, order=args.order, mean=not args.per_view)

    left = [path for path in paths if path not in done]
    workers = 4 if device.type == "cuda" else 1
    written = time.monotonic()
    try:
        with tqdm(total=len(paths), initial=len(table.rows), unit="video", disable=None) as progress:
            for video in over_videos(compute, left, plan, decoder=args.decoder, workers=workers):
                if video.error:
                    failed += 1
                    tqdm.write(f"slowfast-ext features: error: {video.error}", file=sys.stderr)
                else:
                    table.rows[video.path] = video.value.numpy()
                if time.monotonic() - written > _SECONDS_BETWEEN_WRITES:
                    table.write(args.out)
                    written = time.monotonic()
                progress.update()
    finally:
        table.rows = {path: table.rows[path] for path in paths if path in table.rows}
        table.write(args.out)
    shape = " x ".join(map(str, next(iter(table.rows.values())).shape)) if table.rows else "nothing"
    print(f"written: {args.out} ({len(table.rows)} videos, {shape} each, {args.order})")
    return int(failed > 0)


def _done(args: argparse.Namespace, settings: dict) -> dict:
    """Rows that --resume finds."""
    if not args.resume:
        return {}
    if not args.out.endswith((".npz", ".json")):
        raise ValueError(f"--resume must have an OUT that ends in .npz or .json, got '{args.out}'")
    if not os.path.exists(args.out):
        return {}
    before = FeatureTable.read(args.out)
    for name, value in settings.items():
        if before.settings.get(name) != value:
            raise ValueError(
                f"--resume must have the settings that '{args.out}' was written with: "
                f"{name} was {before.settings.get(name)}, got {value}"
            )
    return before.rows
