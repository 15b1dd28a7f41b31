"""``slowfast-ext predict``: the most probable classes of video files."""

import argparse
import sys
from functools import partial

from tqdm import tqdm

from ..data import ViewPlan
from ..evaluation.inference import over_videos, video_probabilities
from . import stream
from .arguments import (
    add_network_options,
    add_run_options,
    add_video_inputs,
    add_view_options,
    best_classes,
    find_device,
    find_videos,
    load_network,
    prepare_engine,
    read_labels,
    view_plan,
)
from .files import check_writable, positive, write_json

_DESCRIPTION = """\
Show the most probable classes of video files. Each video is seen as the network was tested (10 clips x 3 crops for
Kinetics-400); its probabilities are the mean over these views of softmax(scores). A file that cannot be read is
reported and the rest is done. Ctrl-C keeps what is done. Or, with --stream, the classes over time of one source.
"""
_EPILOG = """\
The file of --json, also written after Ctrl-C:
  {"checkpoint": str, "config": str or null, "device": str, "dtype": str,
   "views": {"clip_len", "frame_interval", "num_clips", "num_crops", "short_side", "crop_size", "protocol"},
   "complete": bool, false after Ctrl-C,
   "videos": [{"path": str, "views": int,
               "predictions": [{"index": int, "label": str or null, "probability": float}, ...], best first
               "seconds": {"decode": float, "network": float}}
              or {"path": str, "error": str}, ...]}

Exit status: 0; 1 if a video or the stream failed; 2 if the arguments are wrong, before any work; 130 after Ctrl-C.
"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "predict",
        help="label videos",
        description=_DESCRIPTION,
        epilog=f"{stream.EPILOG}\n{_EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_video_inputs(parser, nargs="*")
    add_network_options(parser)
    parser.add_argument("--labels", metavar="FILE", help="class names, one a line, in the order of the classes")
    parser.add_argument("--json", metavar="OUT", help="write the result here as well, in the form below")
    parser.add_argument("--top-k", type=positive, default=5, metavar="K", help="classes to show (default: 5)")
    add_view_options(parser)
    add_run_options(parser)
    stream.add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    stream.check_options(args)
    if args.stream is not None:
        return stream.run(args)
    paths = find_videos(args.videos, args.root)
    if args.json:
        check_writable("--json", args.json)
    labels = read_labels(args.labels) if args.labels else None
    device = find_device(args.device)
    model = load_network(args, labels)
    plan = view_plan(model.config, args)
    engine = prepare_engine(model, device, args)

    result = {
        "checkpoint": args.checkpoint,
        "config": args.config,
        "device": str(device),
        "dtype": args.dtype,
        "views": {name: getattr(plan, name) for name in ViewPlan.__dataclass_fields__},
        "complete": False,
        "videos": [],
    }
    workers = 4 if device.type == "cuda" else 1
    try:
        with tqdm(total=len(paths), unit="video", disable=None) as progress:
            for video in over_videos(
                partial(video_probabilities, engine), paths, plan, decoder=args.decoder, workers=workers
            ):
                if video.error:
                    entry = {"error": video.error}
                else:
                    entry = {
                        "views": video.views,
                        "predictions": best_classes(video.value, args.top_k, labels),
                        "seconds": {
                            "decode": round(video.decode_seconds, 4),
                            "network": round(video.network_seconds, 4),
                        },
                    }
                result["videos"].append({"path": video.path, **entry})
                _show(video.path, entry)
                progress.update()
        result["complete"] = True
    finally:
        if args.json:
            write_json(args.json, result)
    return int(any("error" in entry for entry in result["videos"]))


def _show(path: str, entry: dict) -> None:
    if "error" in entry:
        tqdm.write(f"slowfast-ext predict: error: {entry['error']}", file=sys.stderr)
        return
    lines = [path]
    for prediction in entry["predictions"]:
        name = prediction["label"] or f"class {prediction['index']}"
        lines.append(f"  {100 * prediction['probability']:6.2f} %  {name}")
    tqdm.write("\n".join(lines), file=sys.stdout)
    sys.stdout.flush()  # the next result may be minutes away
