"""``slowfast-ext check-videos``: which videos of a list cannot be read."""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ..data import (
    DECODERS,
    Entry,
    FrameFolder,
    TaskFailure,
    VideoError,
    WorkerPool,
    check_filename_template,
    open_video,
    read_annotations,
)
from .files import check_writable, positive, write_json, write_text

_DESCRIPTION = """\
Decode every frame of every video of a list and report those that cannot be read: missing, empty, cut short, damaged,
or taking too long. A video that crashes or hangs the decoder is reported like the others. No video is ever changed.
"""
_EPILOG = """\
LIST has a line 'path label ...' for each video; with --rawframes 'folder total_frames label ...', with --with-offset
'folder offset total_frames label ...'. A name that ends in .json holds the same as JSON.

The file of --json, also written after Ctrl-C:
  {"list": str, "root": str, "decoder": str, null with --rawframes,
   "complete": bool, false after Ctrl-C, "videos": int, of the list, "checked": int,
   "bad": [{"position": int, line or JSON entry, "path": str, "reason": str}, ...], in the order of the list}

Exit status: 0; 1 if a video is bad; 2 if the arguments or the list are wrong, before any work; 130 after Ctrl-C.
"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "check-videos",
        help="find the videos of a list that cannot be read",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("list", metavar="LIST", help="annotation file")
    parser.add_argument("--root", default=".", metavar="FOLDER", help="where its paths start (default: here)")
    parser.add_argument("--decoder", default="auto", choices=DECODERS, help="default: decord if installed, else pyav")
    parser.add_argument("--rawframes", action="store_true", help="the list names folders of pictures")
    parser.add_argument("--with-offset", action="store_true", help="its lines give an offset (with --rawframes)")
    parser.add_argument("--filename-template", default="img_{:05}.jpg", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--start-index", type=int, default=1, metavar="N", help="of the first picture (default: 1)")
    parser.add_argument("--workers", type=positive, metavar="N", help="processes (default: one a processor)")
    parser.add_argument(
        "--timeout", type=float, default=300.0, metavar="SECONDS", help="longest for one video (default: 300)"
    )
    parser.add_argument("--json", metavar="OUT", help="write the result here as well, in the form below")
    parser.add_argument("--remove-from", metavar="LIST_OUT", help="write LIST without the bad videos here")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    for option, path in (("--json", args.json), ("--remove-from", args.remove_from)):
        if path:
            check_writable(option, path)
    if not os.path.isdir(args.root):
        raise ValueError(f"--root must be an existing folder, got '{args.root}'")
    if args.with_offset and not args.rawframes:
        raise ValueError("--with-offset must come with --rawframes, got it alone")
    check_filename_template(args.filename_template)
    entries = read_annotations(args.list, raw_frames=args.rawframes, with_offset=args.with_offset)
    check = _Check(args.root, args.decoder, args.rawframes, args.filename_template, args.start_index)
    pool = WorkerPool(check, args.workers or _processors(), args.timeout)
    bad, checked = {}, 0
    try:
        with tqdm(total=len(entries), unit="video", disable=None) as progress:
            for entry, reason in _checked(pool, entries):
                checked += 1
                progress.update()
                if reason is not None:
                    bad[entry.position] = {"position": entry.position, "path": check.path(entry), "reason": reason}
                    progress.set_postfix(bad=len(bad))
                    tqdm.write(f"{check.path(entry)}: {reason}", file=sys.stdout)
                    sys.stdout.flush()  # the next one may be hours away
    finally:
        pool.close()
        complete = checked == len(entries)
        if args.json:
            result = {"list": args.list, "root": args.root, "decoder": None if args.rawframes else args.decoder}
            result |= {"complete": complete, "videos": len(entries), "checked": checked}
            write_json(args.json, result | {"bad": [bad[position] for position in sorted(bad)]})
    print(f"{len(bad)} of {len(entries)} videos are bad")
    if args.remove_from:
        remove_entries(args.list, args.remove_from, set(bad))
    return int(bool(bad))


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@dataclass(frozen=True)
class _Check:
    """Why a video cannot be read, None if it can."""

    root: str
    decoder: str
    raw_frames: bool
    filename_template: str
    start_index: int

    def path(self, entry: Entry) -> str:
        return os.path.join(self.root, entry.path)

    def __call__(self, entry: Entry) -> str | None:
        try:
            with self._open(entry) as video:
                for _ in video.read(range(len(video))):
                    pass
        except VideoError as error:
            return error.reason
        except (OSError, MemoryError) as error:
            return f"{type(error).__name__}: {error}"
        return None

    def _open(self, entry):
        if not self.raw_frames:
            return open_video(self.path(entry), self.decoder)
        naming = {"filename_template": self.filename_template, "start_index": self.start_index}
        return FrameFolder(self.path(entry), entry.num_frames, offset=entry.offset, **naming)


def _checked(pool: WorkerPool, entries: list[Entry]) -> Iterator[tuple[Entry, str | None]]:
    """Each entry with its reason, as they are done."""
    remaining = iter(entries)
    while True:
        while len(pool) < 2 * pool.workers and (entry := next(remaining, None)) is not None:
            pool.submit(entry, entry)
        done = pool.wait()
        if not done:
            return
        for entry, outcome in done:
            yield entry, outcome.reason if isinstance(outcome, TaskFailure) else outcome


def remove_entries(source: str, target: str, positions: set[int]) -> None:
    """Copy a list without the lines, or JSON entries, at ``positions``, which count from 1."""
    text = Path(source).read_bytes().decode("utf-8-sig")
    if source.lower().endswith(".json"):
        kept = [item for position, item in enumerate(json.loads(text), start=1) if position not in positions]
        write_json(target, kept)
        return
    lines = text.split("\n")
    write_text(target, "\n".join(line for number, line in enumerate(lines, start=1) if number not in positions))
