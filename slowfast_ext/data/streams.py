"""Sliding windows over video of any length: files, cameras and network streams, each frame decoded once.

A thread reads frames through OpenCV, shrinks them and puts them into a ring that holds one window and the step to the
next, so memory is bounded whatever the length. The thread waits for the reader of the windows if the source is a file.
A live source does not wait: where the reader is too slow, windows are skipped and the next one is close to the present.
"""

from __future__ import annotations

import dataclasses
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from .decoding import VideoError
from .views import VideoViews, ViewPlan

TRAINED_FPS = 30.0  # of most videos in Kinetics; what PySlowFast counts in
_TIMEOUT_MILLISECONDS = 10_000  # without a picture a network stream counts as lost
_LONGEST_PAUSE = 30.0  # seconds between attempts to connect again


class Capture:
    """An open source of frames: a file, a camera or a network stream, through OpenCV.

    Args:
        source: number of a camera, path or URL.

    Attributes:
        name (str): of the source.
        live (bool): frames come when they come, and those not taken are lost.
        fps (float): frames per second as the source says, 0 if it says nothing credible.

    Raises:
        VideoError: the source cannot be opened.
    """

    def __init__(self, source: str | int):
        self.name = f"camera {source}" if isinstance(source, int) else source
        device = isinstance(source, int) or source.startswith("/dev/")
        url = isinstance(source, str) and "://" in source
        if not url and isinstance(source, str) and not os.path.exists(source):
            raise VideoError(self.name, "there is no such file")
        if url:
            timeouts = (cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, cv2.CAP_PROP_READ_TIMEOUT_MSEC)
            options = [value for option in timeouts for value in (option, _TIMEOUT_MILLISECONDS)]
            self._capture = cv2.VideoCapture(source, cv2.CAP_FFMPEG, options)
        else:
            self._capture = cv2.VideoCapture(source, cv2.CAP_ANY if device else cv2.CAP_FFMPEG)
        if not self._capture.isOpened():
            raise VideoError(self.name, "OpenCV cannot open it")
        frames = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.live = device or (url and not frames > 0)
        self.promised_frames = 0 if self.live else max(int(frames), 0)
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 0 < fps <= 1000 else 0.0  # streams without a rate report that of their clock, 90000
        self._count = 0
        self._start = time.monotonic()

    def grab(self) -> float | None:
        """Go to the next frame. Its time in seconds: in a file, or since a live source was opened; None at the end."""
        if not self._capture.grab():
            return None
        self._count += 1
        if self.live:
            return time.monotonic() - self._start
        seconds = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        if seconds > 0 or self._count == 1:
            return max(seconds, 0.0)
        return (self._count - 1) / (self.fps or TRAINED_FPS)  # a file without timestamps

    def picture(self) -> np.ndarray:
        """The frame that was grabbed: uint8 (H, W, 3), BGR.

        Raises:
            VideoError: it cannot be decoded.
        """
        decoded, picture = self._capture.retrieve()
        if not decoded or picture.ndim != 3:
            raise VideoError(self.name, f"its frame {self._count - 1} cannot be decoded")
        return picture

    def close(self) -> None:
        self._capture.release()


class FrameRing:
    """The last ``capacity`` frames of a stream, uint8 (H, W, 3) of one size each, and their times."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.count = 0
        self._frames: np.ndarray | None = None
        self._times = np.zeros(capacity)

    def fits(self, frame: np.ndarray) -> bool:
        """Whether a frame has the size of those in the ring."""
        return self._frames is None or self._frames.shape[1:] == frame.shape

    def append(self, frame: np.ndarray, seconds: float) -> None:
        """Add a frame in the place of the oldest; one of another size forgets all others."""
        if self._frames is None or not self.fits(frame):
            self._frames = np.zeros((self.capacity, *frame.shape), np.uint8)
        self._frames[self.count % self.capacity] = frame
        self._times[self.count % self.capacity] = seconds
        self.count += 1

    def frames(self, numbers: np.ndarray) -> np.ndarray:
        """A copy of the frames of these numbers, counted from the first that was ever appended."""
        numbers = np.asarray(numbers)
        if numbers.min() < max(self.count - self.capacity, 0) or numbers.max() >= self.count:
            raise IndexError(
                f"FrameRing: numbers must be in [{max(self.count - self.capacity, 0)}, {self.count}), got {numbers}"
            )
        return self._frames[numbers % self.capacity]

    def seconds(self, number: int) -> float:
        """Time of a frame that is still held."""
        return float(self._times[number % self.capacity])


@dataclass(frozen=True)
class Window:
    """One clip out of a stream.

    Attributes:
        views: the clip in the crops of the plan.
        first_frame, last_frame: that it spans, counted from 0 at the rate of the windows.
        start, end: times of these frames, in seconds.
        skipped_windows: of a live source, left out before this one because the reader was too slow.
        dropped_frames: of a live source, between the window before and this one, that are in no window because of that.
    """

    views: VideoViews
    first_frame: int
    last_frame: int
    start: float
    end: float
    skipped_windows: int = 0
    dropped_frames: int = 0


class StreamWindows:
    """Windows that slide over a source. An iterator and a context manager.

    A window spans as many frames as a test clip of the network. mmaction2's networks count in frames, whatever the
    rate; PySlowFast's and pytorchvideo's in seconds of 30 frames (``plan.protocol``). The last window of a file ends
    with the file; a file shorter than a window gives one, filled up as at test time.

    A live source that ends or fails is opened again, ``reconnect`` times in a row with growing pauses; no window spans
    the gap.

    Args:
        source: number of a camera, path or URL.
        plan: clip length, frame interval, size and crops; its number of clips does not matter.
        stride: frames between the starts of windows; by default half a window.
        fps: resample the source to this many frames per second, by repeating and leaving out frames.
        reconnect: attempts in a row to open a live source again.
        notify: called with a sentence when a connection is lost or restored, or a file ends early; on another thread.
        open_capture: opens ``source``.

    Attributes:
        capture_fps (float): of the source, 0 if unknown. live (bool): as :class:`Capture`.
        fps (float): of the frames that windows count in; 0 if unknown.
        span (int): frames of a window. stride (int): frames from window to window.
        frames (int): frames so far.

    Raises:
        VideoError: the source cannot be opened; while iterating: it fails, or the connection stays lost.
    """

    def __init__(
        self,
        source: str | int,
        plan: ViewPlan,
        *,
        stride: int | None = None,
        fps: float | None = None,
        reconnect: int = 5,
        notify: Callable[[str], None] = lambda message: None,
        open_capture: Callable[[str | int], Capture] = Capture,
    ):
        if stride is not None and stride < 1:
            raise ValueError(f"StreamWindows: stride must be at least 1, got {stride}")
        if fps is not None and not 0 < fps < math.inf:
            raise ValueError(f"StreamWindows: fps must be positive, got {fps}")
        self._open = lambda: open_capture(source)
        self._capture = self._open()
        self.live, self.capture_fps = self._capture.live, self._capture.fps
        self._resample = fps
        self.fps = fps or self.capture_fps
        self._sampling = dataclasses.replace(plan, num_clips=1).sampling
        self._transform = plan.transform
        span = plan.clip_len * plan.frame_interval
        if plan.protocol == "pyslowfast":
            span = max(1, math.ceil(span * (self.fps or TRAINED_FPS) / TRAINED_FPS))
        self.span = span
        self.stride = stride or max(span // 2, 1)
        self._reconnect = reconnect
        self._notify = notify

        self._ring = FrameRing(self.span + self.stride)
        self._segment = 0  # first frame after the last gap
        self._next = 0  # first frame of the next window
        self._end = 0  # behind the last frame of the last window
        self._changed = threading.Condition()
        self._ended = False
        self._closed = threading.Event()
        self._error: VideoError | None = None
        self._thread = threading.Thread(target=self._fill, name="slowfast_ext stream", daemon=True)
        self._thread.start()

    @property
    def frames(self) -> int:
        return self._ring.count

    def __iter__(self) -> Iterator[Window]:
        return self

    def __next__(self) -> Window:
        with self._changed:
            while not self._ready() and not self._ended:
                self._changed.wait(0.2)  # not for ever: on some systems only then is Ctrl-C seen
            if self._ready():
                return self._window()
            if self._error is not None:
                raise self._error
            return self._last_window()

    def _ready(self) -> bool:
        self._next = max(self._next, self._segment)  # a window does not span a gap
        return self._ring.count >= self._next + self.span

    def _window(self) -> Window:
        skipped = dropped = 0
        if self.live:
            # The ring holds one stride more than a window, so this one is still there.
            skipped = (self._ring.count - self._next - self.span) // self.stride
            self._next += skipped * self.stride
            if skipped:
                dropped = max(0, self._next - self._end) if self.stride <= self.span else skipped * self.span
        numbers = self._next + self._sampling.centred_clips(self.span, self.fps)[0]
        return self._cut(self._next, self._next + self.span, numbers, skipped, dropped)

    def _last_window(self) -> Window:
        """The one that ends with the file, if frames are left that no window has seen."""
        first = max(self._segment, self._ring.count - self.span)
        if self.live or self._end >= self._ring.count or self._ring.count == first:
            raise StopIteration
        numbers = first + self._sampling.centred_clips(self._ring.count - first, self.fps)[0]
        return self._cut(first, self._ring.count, numbers, 0, 0)

    def _cut(self, first: int, end: int, numbers: np.ndarray, skipped: int, dropped: int) -> Window:
        frames = torch.from_numpy(self._ring.frames(numbers))
        clip = torch.arange(len(numbers))[None]
        crops = self._transform.test_crops(*frames.shape[1:3])
        views = VideoViews(frames, clip, crops, self._transform.crop_size)
        times = self._ring.seconds(first), self._ring.seconds(end - 1)
        self._next, self._end = first + self.stride, end
        self._changed.notify_all()  # a file goes on
        return Window(views, first, end - 1, *times, skipped, dropped)

    def _fill(self) -> None:
        try:
            for picture, seconds in self._read():
                with self._changed:
                    # A file waits until the frame that would be overwritten is in no window to come.
                    while not self.live and self._ring.count - self._next >= self._ring.capacity:
                        if self._closed.is_set():
                            return
                        self._changed.wait(0.2)
                    if not self._ring.fits(picture):
                        self._segment = self._ring.count
                    self._ring.append(picture, seconds)
                    self._changed.notify_all()
        except VideoError as error:
            self._error = error
        except Exception as error:  # a thread that dies in silence would leave the reader waiting
            self._error = VideoError(self._capture.name, f"{type(error).__name__}: {error}")
        finally:
            self._capture.close()
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _read(self) -> Iterator[tuple[np.ndarray, float]]:
        """Frames and times at the rate of the windows, across lost connections."""
        begin = time.monotonic()
        while True:
            offset = time.monotonic() - begin if self.live else 0.0
            grabbed = produced = 0
            while not self._closed.is_set() and (seconds := self._capture.grab()) is not None:
                grabbed += 1
                # Tick k of the resampled stream is the first frame at or after k / fps; it costs no waiting.
                due = 1
                if self._resample:
                    due = math.floor(seconds * self._resample + 1e-6) + 1 - produced
                produced += max(due, 0)
                if due < 1:
                    continue
                picture = self._shrink(self._capture.picture())
                for repeat in range(max(due - self._ring.capacity, 0), due):
                    tick = (produced - due + repeat) / self._resample if self._resample else seconds
                    yield picture, round(offset + tick, 6)
            if self._closed.is_set():
                return
            if not self.live:
                if grabbed < 0.9 * self._capture.promised_frames:
                    self._notify(f"it ends after {grabbed} of {self._capture.promised_frames} frames; is it damaged?")
                return
            self._connect_again()

    def _shrink(self, picture: np.ndarray) -> np.ndarray:
        return cv2.cvtColor(self._transform.resize(picture), cv2.COLOR_BGR2RGB)

    def _connect_again(self) -> None:
        name = self._capture.name
        self._capture.close()
        for attempt in range(1, self._reconnect + 1):
            pause = min(2.0 ** (attempt - 1), _LONGEST_PAUSE)
            self._notify(f"connection lost; attempt {attempt} of {self._reconnect} in {pause:g} s")
            if self._closed.wait(pause):
                return
            try:
                self._capture = self._open()
            except VideoError:
                continue
            self._notify("connected again")
            with self._changed:
                self._segment = self._ring.count
            return
        raise VideoError(name, f"the connection was lost and {self._reconnect} attempts to restore it failed")

    def close(self) -> None:
        """Stop reading. A read that blocks ends in its own time, at the latest with the program."""
        self._closed.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join(timeout=2)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()
