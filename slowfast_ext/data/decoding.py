"""Frames of a video file by index, through decord or PyAV behind one small interface.

Both decoders return the same RGB bytes. Neither is imported before the first video is opened. Damage that the codec
reports raises `VideoError`; damage that it conceals (a few wrong blocks in a picture) goes unnoticed in both.
"""

import codecs
import functools
import importlib
import importlib.util
import itertools
import os
import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence

import numpy as np

DECODERS = ("auto", "decord", "pyav")

# Frames that decord hands over in one call: enough to hide its cost, few enough to hold large pictures.
_DECORD_CHUNK = 16


class VideoError(RuntimeError):
    """A video cannot be read. The message names the file and the reason in plain words."""

    def __init__(self, path: str | os.PathLike, reason: str):
        super().__init__(f"cannot read video '{os.fspath(path)}': {reason}")
        self.path = os.fspath(path)
        self.reason = reason


class Video(ABC):
    """An open video file. A context manager: close it promptly, decord decodes ahead without bound while it is idle.

    Open it in the process and thread that reads it; no decoder survives a fork.

    Attributes:
        path (str): the file.
        fps (float): average frames per second, 0 if the file does not say.
    """

    path: str
    fps: float

    @abstractmethod
    def __len__(self) -> int:
        """Number of frames."""

    @abstractmethod
    def _read(self, indices: list[int]) -> Iterator[np.ndarray]:
        """Frames at strictly increasing, valid indices."""

    @abstractmethod
    def close(self) -> None:
        """Free the decoder. The video cannot be read afterwards."""

    def read(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Frames one after the other, so that a caller can shrink each before the next is decoded.

        Args:
            indices: strictly increasing frame numbers, 0-based.

        Yields:
            uint8 array (H, W, 3), RGB, upright (a rotation stored in the file is applied).

        Raises:
            IndexError: an index is negative or not below ``len(self)``.
            VideoError: the frames cannot be decoded.
        """
        indices = [int(index) for index in indices]
        if any(after <= before for before, after in itertools.pairwise(indices)):
            raise ValueError(f"read: indices must be strictly increasing, got {indices}")
        if indices and (indices[0] < 0 or indices[-1] >= len(self)):
            raise IndexError(f"read: indices must be in [0, {len(self)}) for '{self.path}', got {indices}")
        return self._of_one_size(self._read(indices))

    def _of_one_size(self, frames):
        shape = None
        for frame in frames:
            if frame.shape != (shape or frame.shape):
                raise VideoError(self.path, f"its picture changes size on the way, from {shape} to {frame.shape}")
            shape = frame.shape
            yield frame

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """Frames at any indices, repeated and unsorted ones allowed; each distinct frame is decoded once.

        Returns:
            uint8 array (len(indices), H, W, 3), RGB.

        Raises:
            IndexError, VideoError: as `read`.
        """
        distinct, place = np.unique(np.asarray(indices, dtype=np.int64), return_inverse=True)
        if distinct.size == 0:
            raise ValueError("frames: indices must hold at least one frame number, got none")
        return np.stack(list(self.read(distinct.tolist())))[place.reshape(-1)]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


class _DecordVideo(Video):
    def __init__(self, path: str):
        decord = _decord()
        self.path = path
        try:
            # One thread: more gain little on one file, and two abort a forked process. The tolerance makes decord raise
            # where it would otherwise put a neighbouring frame in place of one that it cannot decode.
            self._reader = decord.VideoReader(path, num_threads=1, fault_tol=1e-9)
            self.fps = float(self._reader.get_avg_fps())
            # In files without timestamps (AVI with B-frames) decord seeks to wrong frames without a word.
            self._seekable = bool((self._reader.get_frame_timestamp(range(len(self._reader))) > -1e9).all())
        except Exception as error:  # DECORDError, RuntimeError and AssertionError share no narrower base
            raise VideoError(path, _reason_of_failed_open("decord", error)) from error

    def __len__(self):
        return len(self._reader)

    def _read(self, indices):
        wanted = set(indices)
        decoded = indices if self._seekable or not indices else range(indices[-1] + 1)
        for start in range(0, len(decoded), _DECORD_CHUNK):
            chunk = decoded[start : start + _DECORD_CHUNK]
            try:
                frames = self._reader.get_batch(chunk).asnumpy()
            except Exception as error:
                raise VideoError(self.path, _reason_of_failed_decode("decord", error)) from error
            yield from (frame for index, frame in zip(chunk, frames, strict=True) if index in wanted)

    def close(self):
        self._reader = None  # its destructor stops the decoding thread and frees the frames decoded ahead


class _PyAVVideo(Video):
    def __init__(self, path: str):
        self._av = _import("av", "pyav")
        # One for all frames: to prepare the conversion takes longer than to convert one.
        self._converter = importlib.import_module("av.video.reformatter").VideoReformatter()
        self.path = path
        self._seekable = True
        try:
            self._open()
        except Exception as error:
            raise VideoError(path, _reason_of_failed_open("pyav", error)) from error
        try:
            self._index_packets()
        except Exception as error:
            self.close()
            if isinstance(error, VideoError):
                raise
            raise VideoError(path, _reason_of_failed_open("pyav", error)) from error

    def _open(self):
        self._container = self._av.open(self.path)
        self._stream = next(iter(self._container.streams.video), None)
        if self._stream is not None:
            self._stream.codec_context.thread_count = 1  # as decord

    def _index_packets(self):
        """Timestamps of all frames and of the key frames, read without decoding."""
        if self._stream is None:
            raise VideoError(self.path, "it has no video stream")
        self.fps = float(self._stream.average_rate or 0)
        packets = [packet for packet in self._container.demux(self._stream) if packet.size and not packet.is_discard]
        if not packets:
            raise VideoError(self.path, "it has no frames")
        if any(packet.pts is None for packet in packets):
            raise VideoError(self.path, "its frames carry no timestamps, which pyav needs; try decord")
        self._times = sorted(packet.pts for packet in packets)
        self._key_times = sorted(packet.pts for packet in packets if packet.is_keyframe) or self._times[:1]

    def __len__(self):
        return len(self._times)

    def _read(self, indices):
        try:
            yield from self._decode([self._times[index] for index in indices])
        except VideoError:
            raise
        except Exception as error:
            raise VideoError(self.path, _reason_of_failed_decode("pyav", error)) from error

    def _decode(self, times):
        decoded, frame = iter(()), None
        for time in times:
            key_time = self._key_times[max(bisect_right(self._key_times, time) - 1, 0)]
            # Jump only over a key frame: without one in between, decoding on is the shorter way.
            if frame is None or (self._seekable and frame.pts < key_time):
                decoded = self._decoded_from(key_time)
                frame = next(decoded, None)
            while frame is not None and frame.pts < time:
                frame = next(decoded, None)
            if frame is None:
                raise VideoError(self.path, "it ends before the last frame that its index promises")
            yield _upright(self._converter.reformat(frame, format="rgb24").to_ndarray(), frame.rotation)

    def _decoded_from(self, key_time):
        """Frames from a key frame on, or from the very first if the format cannot seek to it (MPEG-TS lands behind)."""
        if self._seekable:
            self._container.seek(key_time, stream=self._stream)
            decoded = self._container.decode(self._stream)
            first = next(decoded, None)
            if first is not None and first.pts <= key_time:
                return itertools.chain([first], decoded)
            self._seekable = False
        self.close()
        self._open()
        return self._container.decode(self._stream)

    def close(self):
        self._container.close()


def open_video(path: str | os.PathLike, decoder: str = "auto") -> Video:
    """Open a video file for reading frames by index.

    Args:
        path: the file.
        decoder: ``decord``, ``pyav``, or ``auto``: decord where it is installed, else PyAV.

    Raises:
        VideoError: missing, a folder, empty, cut short, not a video, or without a picture.
        ValueError: unknown decoder.
        ImportError: the decoder is not installed.
    """
    if decoder not in DECODERS:
        raise ValueError(f"open_video: decoder must be one of {', '.join(DECODERS)}, got {decoder!r}")
    path = os.fspath(path)
    _check_file(path)
    if decoder == "auto":
        decoder = "decord" if importlib.util.find_spec("decord") else "pyav"
    video = _DecordVideo(path) if decoder == "decord" else _PyAVVideo(path)
    if len(video) == 0:
        video.close()
        raise VideoError(path, "it has no frames")
    return video


def _import(module: str, decoder: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RuntimeError(
            f"decoder {decoder!r} needs the package {module!r}, which does not import: {error}"
        ) from error


@functools.cache
def _decord():
    decord = _import("decord", "decord")
    decord.logging.set_level(decord.logging.QUIET)  # it reports harmless details of healthy files on stderr
    return decord


def _upright(picture: np.ndarray, degrees: float) -> np.ndarray:
    quarters = round(degrees / 90) % 4
    return np.ascontiguousarray(np.rot90(picture, quarters)) if quarters else picture


def _check_file(path: str) -> None:
    """What can be said about a file that is no video, before a decoder with worse words sees it."""
    if not os.path.exists(path):
        raise VideoError(path, "there is no such file")
    if os.path.isdir(path):
        raise VideoError(path, "it is a folder, not a file")
    if not os.access(path, os.R_OK):
        raise VideoError(path, "reading it is not permitted")
    size = os.path.getsize(path)
    if size == 0:
        raise VideoError(path, "the file is empty")
    promised = _mp4_size(path, size)
    if promised > size:
        raise VideoError(path, f"the file is cut short: it has {size:,} of {promised:,} bytes")
    if _is_text(path):
        raise VideoError(path, "it contains text, not a video")


def _mp4_size(path: str, size: int) -> int:
    """What the top-level boxes of an MP4 or MOV file add up to (ISO/IEC 14496-12, 4.2); 0 for other formats."""
    end = 0
    with open(path, "rb") as file:
        while end + 8 <= size:
            file.seek(end)
            header = file.read(16)
            length, kind = int.from_bytes(header[:4], "big"), header[4:8]
            if end == 0 and kind not in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
                return 0
            if length == 1:
                length = int.from_bytes(header[8:16], "big")
            if length < 8 or (end + length > size and kind not in (b"mdat", b"moov", b"moof")):
                return end  # a box that runs to the end, or stray bytes behind the last box
            end += length
    return end


def _is_text(path: str) -> bool:
    with open(path, "rb") as file:
        head = file.read(4096)
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # incremental: the last letter may be cut
    except UnicodeDecodeError:
        return False
    return all(letter >= " " or letter.isspace() for letter in text)


def _reason_of_failed_open(decoder: str, error: Exception) -> str:
    if "cannot find video stream" in str(error):
        return "it has no video stream"
    return f"it is damaged or not a video ({decoder}: {_short(error)})"


def _reason_of_failed_decode(decoder: str, error: Exception) -> str:
    hint = "; the decoder pyav may read it" if decoder == "decord" else ""
    return f"its frames are damaged or cut short ({decoder}: {_short(error)}){hint}"


def _short(error: Exception) -> str:
    """The decoder's own words on one line, without decord's clock and source positions."""
    text = re.sub(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ", "", str(error))
    return (text.strip().splitlines() or [type(error).__name__])[0][:160]
