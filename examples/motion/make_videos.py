"""Write short MP4 videos of six classes that differ only in how the picture moves, and their lists.

Each video looks through a window at a random texture, which slides to the left or to the right, slowly or fast, or
turns. A single frame tells nothing about the class: position, angle and texture are random in all of them.

    python make_videos.py data/motion

writes ``train`` and ``val`` with the videos, ``train.txt`` and ``val.txt`` (``path label`` in each line), the same as
``train.json`` and ``val.json``, and ``labels.txt``, the names of the classes.
"""

import argparse
import json
import math
from pathlib import Path

import av
import cv2
import numpy as np

# Name -> pixels to the right and degrees clockwise from frame to frame.
CLASSES = {
    "left slowly": (-1.0, 0.0),
    "left fast": (-3.0, 0.0),
    "right slowly": (1.0, 0.0),
    "right fast": (3.0, 0.0),
    "turns clockwise": (0.0, 5.0),
    "turns counterclockwise": (0.0, -5.0),
}
HEIGHT, WIDTH, FRAMES, FPS = 64, 80, 24, 25
TEXTURE, GRAIN = 256, 8  # side of the texture and of its grains, in pixels


def frames(motion: tuple[float, float], random: np.random.Generator) -> list[np.ndarray]:
    """The pictures of one video, uint8 RGB (HEIGHT, WIDTH, 3); its speed is within 15 % of ``motion``."""
    coarse = random.normal(128, 60, (TEXTURE // GRAIN, TEXTURE // GRAIN, 3)).clip(0, 255).astype(np.uint8)
    texture = cv2.resize(coarse, (TEXTURE, TEXTURE), interpolation=cv2.INTER_CUBIC)
    position, angle = random.uniform(0, TEXTURE, 2), random.uniform(0, 2 * math.pi)
    speed = random.uniform(0.85, 1.15)
    pictures = []
    for frame in range(FRAMES):
        shift, turn = (speed * frame * amount for amount in motion)
        total = angle + math.radians(turn)
        cos, sin = math.cos(total), math.sin(total)
        # From a pixel of the window, seen from its middle, back to the texture: shifted, turned, and moved.
        back = np.array([[cos, sin], [-sin, cos]])
        offset = position - back @ np.array([WIDTH / 2 + shift, HEIGHT / 2])
        matrix = np.column_stack([back, offset])
        picture = cv2.warpAffine(
            texture,
            matrix,
            (WIDTH, HEIGHT),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_WRAP,
        )
        pictures.append(picture)
    return pictures


def write_video(path: Path, pictures: list[np.ndarray]) -> None:
    """H.264 in MP4."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def write_subset(root: Path, subset: str, videos: int, random: np.random.Generator) -> None:
    """``videos`` of each class below ``root / subset``, and their lists."""
    (root / subset).mkdir(parents=True, exist_ok=True)
    entries = []
    for number in range(videos):
        for label, motion in enumerate(CLASSES.values()):
            name = f"{subset}/{number:04}_{label}.mp4"
            write_video(root / name, frames(motion, random))
            entries.append({"filename": name, "label": label})
    lines = (f"{entry['filename']} {entry['label']}\n" for entry in entries)
    (root / f"{subset}.txt").write_text("".join(lines), encoding="utf-8")
    (root / f"{subset}.json").write_text(json.dumps(entries, indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write videos whose classes differ only in motion.")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where to write")
    parser.add_argument("--train", type=int, default=64, metavar="N", help="training videos a class (default: 64)")
    parser.add_argument("--val", type=int, default=16, metavar="N", help="validation videos a class (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers (default: 0)")
    args = parser.parse_args()
    for option, value, least in (("--train", args.train, 1), ("--val", args.val, 1), ("--seed", args.seed, 0)):
        if value < least:
            parser.error(f"{option} must be at least {least}, got {value}")
    for number, (subset, videos) in enumerate((("train", args.train), ("val", args.val))):
        write_subset(args.folder, subset, videos, np.random.default_rng([args.seed, number]))
    names = "".join(f"{name}\n" for name in CLASSES)
    (args.folder / "labels.txt").write_text(names, encoding="utf-8")
    print(f"{len(CLASSES) * (args.train + args.val)} videos in {args.folder}")


if __name__ == "__main__":
    main()
