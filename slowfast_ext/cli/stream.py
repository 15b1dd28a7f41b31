"""``slowfast-ext predict --stream``: labels over time of a long video, a camera or a network stream."""

import argparse
import datetime
import json
import sys
from collections import deque

import cv2

from ..data import StreamWindows, VideoError, Window
from ..data.streams import TRAINED_FPS
from ..evaluation.inference import video_probabilities
from .arguments import best_classes, find_device, load_network, prepare_engine, read_labels, view_plan

EPILOG = """\
With --stream one line of JSON a window goes to standard output:
  {"start": float, "end": float, seconds of its first and last frame: in a file, or since a live source was opened,
   "first_frame": int, "last_frame": int, counted from 0 at the rate of the windows,
   "predictions": [{"index": int, "label": str or null, "probability": float}, ...]}, best first
and of a live source also
   "time": str, date and time (UTC) at which the line was written,
   "skipped_windows": int, left out before this one because the network is slower than the source,
   "dropped_frames": int, that are in no window because of that}
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """--stream and what goes with it."""
    group = parser.add_argument_group(
        "streams",
        "A window of one clip slides over the source; each frame is decoded once, and only the frames of a window and "
        "a stride are kept. A file is read to its end; a live source is followed until Ctrl-C, at its own pace.",
    )
    group.add_argument("--stream", metavar="SOURCE", help="video file, number of a camera, or URL (rtsp://, ...)")
    group.add_argument("--stride", type=int, metavar="FRAMES", help="from window to window (default: half a window)")
    group.add_argument(
        "--fps",
        type=float,
        help="resample the source to this rate (default: frames as they come; networks were trained at about 30)",
    )
    group.add_argument("--threshold", type=float, metavar="P", help="show only classes at least this probable")
    group.add_argument("--average", type=int, metavar="N", help="probabilities are the mean of the last N windows")
    group.add_argument("--reconnect", type=int, metavar="N", help="attempts to restore a lost connection (default: 5)")


# Options of the one way to predict that mean nothing in the other.
_STREAM_ONLY = ("stride", "fps", "threshold", "average", "reconnect")
_FILES_ONLY = {"videos": [], "root": "", "json": None, "num_clips": None, "decoder": "auto"}  # and their defaults


def check_options(args: argparse.Namespace) -> None:
    """Raise ValueError for options that do not go together, or have values that mean nothing."""
    if args.stream is None:
        given = [name for name in _STREAM_ONLY if getattr(args, name) is not None]
        if given:
            raise ValueError(f"--{given[0]} must come with --stream, got it without")
        if not args.videos:
            raise ValueError("there must be a VIDEO or --stream SOURCE, got neither")
        return
    given = [name for name, default in _FILES_ONLY.items() if getattr(args, name) != default]
    if given:
        option = "VIDEO" if given == ["videos"] else f"--{given[0].replace('_', '-')}"
        raise ValueError(f"{option} must come without --stream, got both")
    for name, least in (("stride", 1), ("average", 1), ("reconnect", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(args, name)}")
    if args.fps is not None and not 0 < args.fps <= 1000:
        raise ValueError(f"--fps must be above 0 and at most 1000, got {args.fps:g}")
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise ValueError(f"--threshold must be in [0, 1], got {args.threshold:g}")


def run(args: argparse.Namespace) -> int:
    labels = read_labels(args.labels) if args.labels else None
    device = find_device(args.device)
    model = load_network(args, labels)
    args.num_crops = args.num_crops or 1  # three crops would be three times the work
    plan = view_plan(model.config, args)
    engine = prepare_engine(model, device, args)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # what fails is said below, in other words
    source = int(args.stream) if args.stream.isdecimal() else args.stream
    windows = None
    count = skipped = dropped = 0
    recent = deque(maxlen=args.average or 1)
    try:
        windows = StreamWindows(
            source,
            plan,
            stride=args.stride,
            fps=args.fps,
            reconnect=5 if args.reconnect is None else args.reconnect,
            notify=lambda message: _say(f"{args.stream}: {message}"),
        )
        _say(f"{args.stream}: {_rate(windows)}")
        for window in windows:
            recent.append(video_probabilities(engine, window.views).cpu())
            probabilities = sum(recent) / len(recent)
            if not probabilities.isfinite().all():
                raise VideoError(args.stream, "the network's results are not finite numbers")
            best = best_classes(probabilities, args.top_k, labels)
            best = [entry for entry in best if entry["probability"] >= (args.threshold or 0)]
            print(json.dumps(_line(window, windows.live, best), ensure_ascii=False), flush=True)
            count += 1
            skipped += window.skipped_windows
            dropped += window.dropped_frames
    except VideoError as error:
        _say(f"error: {error}")
        return 1
    finally:
        if windows is not None:
            windows.close()
            late = f"; {skipped} windows skipped, {dropped} frames in no window" if windows.live else ""
            _say(f"{args.stream}: {count} windows of {windows.frames} frames{late}")
    return 0


def _say(message: str) -> None:
    print(f"slowfast-ext predict: {message}", file=sys.stderr, flush=True)


def _rate(windows: StreamWindows) -> str:
    """What is assumed of the frame rate."""
    source = f"{windows.capture_fps:g} frames per second" if windows.capture_fps else "unknown frame rate"
    fps = windows.fps
    taken = "taken as they come" if fps == windows.capture_fps else f"resampled to {fps:g}"
    length = f"{windows.span} frames" + (f" ({windows.span / fps:.2f} s)" if fps else "")
    stride = f"{windows.stride}" + (f" ({windows.stride / fps:.2f} s)" if fps else "")
    usual = fps and abs(fps / TRAINED_FPS - 1) < 0.1
    hint = "" if usual else f"; networks were trained at about {TRAINED_FPS:g}, see --fps"
    return f"{source}, {taken}; a window is {length}, the next begins {stride} later{hint}"


def _line(window: Window, live: bool, predictions: list[dict]) -> dict:
    line = {
        "start": round(window.start, 3),
        "end": round(window.end, 3),
        "first_frame": window.first_frame,
        "last_frame": window.last_frame,
        "predictions": predictions,
    }
    if live:
        line["time"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        line["skipped_windows"] = window.skipped_windows
        line["dropped_frames"] = window.dropped_frames
    return line
