"""How many videos a second one processor core decodes: a training clip, a test's clips one by one, and their union.

    python benchmarks/decoding.py
    python benchmarks/decoding.py --videos holiday.mp4 party.webm --json decoding.json

Without `--videos` it encodes its own: 300 frames of 340x256 at 30 frames a second in H.264 with B-frames, with a key
frame every 250 frames (x264's default) and every 12 (as for seeking). Each call opens a file, reads the frames and
closes it, in a warm file cache. `one clip` is one of 32 frames at an interval of 2; `clips` is a test's 10 clips, each
read by itself; `union` reads each frame of these 10 clips once, as slowfast_ext does. Before anything is timed, the
decoders must return the same frames. Exit status: 0; 1 if they did not or nothing could be timed; 2 for bad options.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from latency import check_folders, progress, refusing
from report import describe_environment, environment_line, format_table, plot_bars, write_json
from tqdm import tqdm

from slowfast_ext.data import DECODERS, ClipSampling, VideoError, open_video
from slowfast_ext.evaluation.measuring import Summary, shuffled_rounds

SECONDS = 30.0
FRAMES, HEIGHT, WIDTH, RATE = 300, 256, 340, 30
KEY_FRAME_INTERVALS = (250, 12)
PACKAGES = {"decord": "decord", "pyav": "av"}
WAYS = ("one clip", "clips", "union")


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Videos a second that each decoder reads, on one core.")
    parser.add_argument("--videos", nargs="+", type=Path, metavar="FILE", help="instead of encoded samples")
    parser.add_argument("--decoders", help="comma-separated (default: those installed, of decord, pyav)")
    parser.add_argument("--clips", type=int, default=10, help="clips of a test (default: 10)")
    parser.add_argument("--clip-len", type=int, default=32, help="frames of a clip (default: 32)")
    parser.add_argument("--frame-interval", type=int, default=2, help="their distance (default: 2)")
    parser.add_argument("--rounds", type=int, help="time exactly this many rounds")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"begin rounds for this long ({SECONDS:.0f})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, with all samples")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="write a bar chart (needs matplotlib)")
    options = parser.parse_args(arguments)
    with refusing(parser):
        check_options(options)
    return options


def check_options(options: argparse.Namespace) -> None:
    """Fill in the decoders; raise if an option cannot be honoured."""
    installed = [name for name, package in PACKAGES.items() if importlib.util.find_spec(package)]
    options.decoders = options.decoders.split(",") if options.decoders else installed
    for name in options.decoders:
        if name not in installed:
            known = "installed" if name in DECODERS else f"of {', '.join(PACKAGES)}"
            raise ValueError(f"--decoders must be {known}, got {name!r}")
    if options.rounds is not None and options.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {options.rounds}")
    if not options.seconds > 0:
        raise ValueError(f"--seconds must be positive, got {options.seconds}")
    options.sampling = ClipSampling(options.clip_len, options.frame_interval, options.clips)
    for path in options.videos or []:
        if not path.is_file():
            raise FileNotFoundError(f"--videos must be existing files, got '{path}'")
    if options.videos is None and "pyav" not in installed:
        raise RuntimeError("--videos must be given where the package 'av' is not installed to encode samples, got none")
    check_folders(options, "json", "plot")
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError("--plot needs matplotlib, which is not installed: pip install 'slowfast-ext[plot]'")


def write_sample(path: Path, key_frame_interval: int) -> Path:
    """A picture that moves under a grain that changes: it takes as many bits as films of this size do."""
    import av

    random = np.random.default_rng(0)
    coarse = random.integers(40, 216, (HEIGHT // 8, (WIDTH + FRAMES) // 8 + 1, 3)).astype(np.float32)
    picture = np.asarray(coarse.repeat(8, 0).repeat(8, 1))
    with av.open(str(path), "w") as container:
        options = {"g": str(key_frame_interval), "bf": "2", "threads": "1"}
        stream = container.add_stream("libx264", rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(FRAMES):
            frame = picture[:, number : number + WIDTH] + random.normal(0, 4, (HEIGHT, WIDTH, 1))
            frame = av.VideoFrame.from_ndarray(frame.clip(0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def ways_to_read(path: Path, decoder: str, sampling: ClipSampling) -> dict[str, Callable[[], np.ndarray]]:
    """What is timed: each call returns the frames it read, uint8 array (frames, H, W, 3)."""
    with open_video(path, decoder) as video:
        clips = sampling.centred_clips(len(video), video.fps)

    def read(parts):
        with open_video(path, decoder) as video:
            return np.concatenate([video.frames(part) for part in parts])

    middle = clips[len(clips) // 2]
    return {
        "one clip": lambda: read([middle]),
        "clips": lambda: read(clips),
        "union": lambda: read([np.unique(clips)]),
    }


def measure(options: argparse.Namespace, videos: dict[str, Path]) -> dict:
    """Check and time the decoders; returns the document that ``--json`` writes."""
    began, start = datetime.now(timezone.utc), time.perf_counter()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    rows, calls = {}, {}
    for name, path in videos.items():
        reference = None
        for decoder in options.decoders:
            try:
                ways = ways_to_read(path, decoder, options.sampling)
                frames = ways["union"]()
                wrong = None
                if reference is not None and not np.array_equal(frames, reference):
                    wrong = f"its frames differ from those of {options.decoders[0]}"
            except VideoError as error:
                frames, ways, wrong = None, dict.fromkeys(WAYS), error.reason
            reference = frames if reference is None else reference
            progress(
                f"{name}, {decoder}: {wrong or f'{len(frames)} distinct frames in {options.clips} clips, correct'}"
            )
            for way, call in ways.items():
                key = f"{name}, {decoder}, {way}"
                rows[key] = {"video": name, "decoder": decoder, "way": way, "reason": wrong, "samples_ms": []}
                if wrong is None:
                    calls[key] = call
    if calls:
        cpu = torch.device("cpu")
        rounds = shuffled_rounds(calls, cpu, rounds=options.rounds, seconds=options.seconds)
        for samples in tqdm(rounds, desc=f"timing {len(calls)} ways", unit=" rounds", total=options.rounds):
            for key, milliseconds in samples.items():
                rows[key]["samples_ms"].append(milliseconds)
    for row in rows.values():
        if row["samples_ms"]:
            summary = Summary.of(row["samples_ms"])
            row |= {"median_ms": summary.median, "p10_ms": summary.p10, "p90_ms": summary.p90}
            row["videos_per_second"] = 1e3 / summary.median
    return {
        "benchmark": "decoding",
        "began": began.isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - start, 1),
        "environment": describe_environment(torch.device("cpu")) | {"load_before": load},
        "workload": {
            "clips": options.clips,
            "clip_len": options.clip_len,
            "frame_interval": options.frame_interval,
            "bytes": {name: path.stat().st_size for name, path in videos.items()},
        },
        "rows": list(rows.values()),
    }


def format_report(document: dict) -> str:
    """Videos a second, a line for each video and decoder."""
    workload, rows = document["workload"], document["rows"]
    ways = ("one clip", f"{workload['clips']} clips", "union", "union / clips")
    table, notes = [], []
    for row in (row for row in rows if row["way"] == "one clip"):
        name = f"{row['video']}, {row['decoder']}"
        if row["reason"] is not None:
            table.append([name, *["-"] * len(ways)])
            notes.append(f"{name}: not timed: {row['reason']}")
            continue
        same = [other for other in rows if (other["video"], other["decoder"]) == (row["video"], row["decoder"])]
        rate = {other["way"]: other["videos_per_second"] for other in same}
        table.append([name, *(f"{rate[way]:.3g}" for way in WAYS), f"{rate['union'] / rate['clips']:.1f}x"])
    rounds = max(len(row["samples_ms"]) for row in rows)
    notes.append(
        f"videos a second on one core, median of {rounds} rounds in shuffled order; "
        f"clips of {workload['clip_len']} frames, {workload['frame_interval']} apart"
    )
    load, cores = document["environment"]["load_before"], document["environment"]["cores"]
    if load is not None and load > cores / 2:
        notes.append(f"the load average before was {load:.1f} on {cores} cores: take the rates as provisional")
    return "\n".join(
        [environment_line(document["environment"]), "", format_table(["video, decoder", *ways], table), "", *notes]
    )


def plot(path: Path, document: dict) -> None:
    bars = [
        (f"{row['video']}, {row['decoder']}, {row['way']}", row["median_ms"], row["p10_ms"], row["p90_ms"])
        for row in document["rows"]
        if row["samples_ms"]
    ]
    title = f"Decoding on one core\n{document['environment']['machine']}"
    plot_bars(path, title, "ms a video, median and p10 to p90", bars)


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    with tempfile.TemporaryDirectory() as folder:
        if options.videos is None:
            progress(f"encoding {len(KEY_FRAME_INTERVALS)} samples")
            paths = {f"key frame every {gap}": Path(folder, f"{gap}.mp4") for gap in KEY_FRAME_INTERVALS}
            videos = {name: write_sample(path, int(path.stem)) for name, path in paths.items()}
        else:
            videos = {str(path): path for path in options.videos}
        document = measure(options, videos)
    print(format_report(document))
    if options.json is not None:
        write_json(options.json, document)
    timed = any(row["samples_ms"] for row in document["rows"])
    if options.plot is not None and timed:
        plot(options.plot, document)
    return int(any(row["reason"] is not None for row in document["rows"]) or not timed)


if __name__ == "__main__":
    sys.exit(main())
