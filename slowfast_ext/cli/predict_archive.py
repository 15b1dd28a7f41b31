"""``slowfast-ext predict-archive LIST OUT_DIR``: archives of videos on a Ray cluster, into Parquet files."""

import argparse
import os
import sys

from tqdm import tqdm

from ..data import DECODERS
from ..evaluation.archive import OUTPUTS, ArchiveSettings, WorkerOptions, open_archive, run_archive
from ..evaluation.extras import require_packages
from ..evaluation.features import ORDERS
from .arguments import (
    DTYPES,
    add_engine_options,
    add_network_options,
    add_view_options,
    load_network,
    read_labels,
    read_video_list,
    view_plan,
)
from .files import positive

_DESCRIPTION = """\
Run a list of videos through a network on a Ray cluster (RAY_ADDRESS, or this machine) and write one Parquet row a
video. Started again with the same OUT_DIR it does what is left; rows of videos that failed are not tried again.
Every machine must have slowfast-ext[ray], and see the videos and OUT_DIR by the same paths.
"""
_EPILOG = """\
OUT_DIR: settings.json and part-*.parquet with the columns
  path (string), error (string, null if the video was read), views (int32), and
  classes (list of int32), labels (list of strings, null without --labels), probabilities (list of float32), best first,
  or with --output features: features (list of float32), as slowfast-ext features writes them

Exit status: 0; 1 if a video failed in this run; 2 if the arguments are wrong, before any work; 130 after Ctrl-C.
"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "predict-archive",
        help="label videos on a Ray cluster",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("list", metavar="LIST", help="a path a line, class numbers behind it are passed over")
    parser.add_argument("out_dir", metavar="OUT_DIR", help="folder for the rows, made if it does not exist")
    parser.add_argument("--root", default="", metavar="FOLDER", help="in front of the relative paths of LIST")
    add_network_options(parser)
    parser.add_argument("--labels", metavar="FILE", help="class names, one a line, in the order of the classes")
    parser.add_argument("--output", default="classes", choices=OUTPUTS, help="what a row holds (default: classes)")
    parser.add_argument("--order", default="slow-fast", choices=ORDERS, help="of features (default: slow-fast)")
    parser.add_argument("--top-k", type=positive, default=5, metavar="K", help="classes of a row (default: 5)")
    add_view_options(parser)
    parser.add_argument("--workers", type=positive, default=1, metavar="N", help="copies of the network (default: 1)")
    parser.add_argument(
        "--cpus-per-worker",
        type=positive,
        default=1,
        metavar="N",
        help="reserved, and videos decoded at a time (default: 1)",
    )
    parser.add_argument("--gpus-per-worker", type=float, default=0, metavar="N", help="0 (default): run on CPUs")
    parser.add_argument("--videos-per-file", type=positive, default=64, metavar="N", help="rows a file (default: 64)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the arithmetic (default: float32)")
    parser.add_argument("--max-views", type=positive, metavar="N", help="views at a time, as in predict")
    parser.add_argument("--decoder", default="auto", choices=DECODERS, help="as in predict")
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    require_packages("predict-archive", ("ray", "pyarrow"), "ray")
    if args.gpus_per_worker < 0:
        raise ValueError(f"--gpus-per-worker must be at least 0, got {args.gpus_per_worker:g}")
    paths = [os.path.abspath(path) for path in dict.fromkeys(read_video_list(args.list, args.root))]
    labels = read_labels(args.labels) if args.labels else None
    model = load_network(args, labels)
    settings = ArchiveSettings(
        checkpoint=os.path.abspath(args.checkpoint),
        config=args.config,
        plan=view_plan(model.config, args),
        dtype=args.dtype,
        output=args.output,
        order=args.order,
        top_k=args.top_k,
        labels=labels and tuple(labels),
    )
    options = WorkerOptions(
        workers=args.workers,
        cpus=args.cpus_per_worker,
        gpus=args.gpus_per_worker,
        videos_per_file=args.videos_per_file,
        decoder=args.decoder,
        max_views=args.max_views,
        engine=not (args.no_engine or args.no_accelerate),
        accelerate=not args.no_accelerate,
    )
    done = open_archive(args.out_dir, settings)
    left = [path for path in paths if path not in done]
    failed = 0
    with tqdm(total=len(paths), initial=len(paths) - len(left), unit="video", disable=None) as progress:
        for videos, errors in run_archive(model, left, args.out_dir, settings, options):
            for error in errors:
                tqdm.write(f"slowfast-ext predict-archive: error: {error}", file=sys.stderr)
            failed += len(errors)
            progress.update(videos)
    print(f"written: {args.out_dir} ({len(left)} videos, {failed} failed; {len(paths) - len(left)} were there)")
    return int(failed > 0)
