import itertools
import time

import cv2
import numpy as np
import pytest
import torch
from sample_videos import real_clip

from slowfast_ext.data import Capture, FrameRing, StreamWindows, VideoError, ViewPlan

PLAN = ViewPlan(clip_len=4, frame_interval=2, num_crops=1, short_side=8, crop_size=8)  # windows of 8 frames


class FakeCapture:
    """A source whose frame n is a picture full of n, and which keeps a live source's pace only as fast as it is read.

    Args:
        frames: how many until it ends, or fails.
        gate: called before each frame.
    """

    def __init__(self, frames, *, live=False, fps=25.0, sizes=None, gate=lambda number: None):
        self.name, self.live, self.fps, self.promised_frames = "fake", live, fps, 0 if live else frames
        self.frames, self.sizes, self.gate = frames, sizes or {}, gate
        self.number = -1
        self.decoded = []
        self.closed = False

    def grab(self):
        if self.number + 1 >= self.frames:
            return None
        self.gate(self.number + 1)
        self.number += 1
        return self.number / self.fps

    def picture(self):
        self.decoded.append(self.number)
        height, width = self.sizes.get(self.number, (8, 10))
        return np.full((height, width, 3), (self.number, self.number, 100), np.uint8)  # BGR

    def close(self):
        self.closed = True


def windows_of(capture, plan=PLAN, **options):
    with StreamWindows("fake", plan, open_capture=lambda source: capture, **options) as windows:
        return list(windows)


def numbers(window):
    """The frames in a window, told by their pictures."""
    assert (window.views.frames[..., 0] == 100).all()  # RGB
    return window.views.frames[:, 0, 0, 2].tolist()


def test_windows_slide_over_a_file_and_the_last_ends_with_it():
    capture = FakeCapture(19)
    windows = windows_of(capture, stride=3)
    assert [numbers(window) for window in windows] == [
        *([start, start + 2, start + 4, start + 6] for start in (0, 3, 6, 9)),
        [11, 13, 15, 17],
    ]
    assert [(window.first_frame, window.last_frame) for window in windows] == [
        (0, 7),
        (3, 10),
        (6, 13),
        (9, 16),
        (11, 18),
    ]
    assert [(window.start, window.end) for window in windows[:2]] == [(0, 0.28), (0.12, 0.4)]
    assert capture.decoded == list(range(19))  # each once
    assert capture.closed
    assert windows[0].views[:].shape == (1, 4, 8, 8, 3)


@pytest.mark.parametrize("frames", [8, 11, 16])
def test_no_frame_at_the_end_is_left_out_or_seen_again_for_nothing(frames):
    windows = windows_of(FakeCapture(frames), stride=8)
    assert [window.last_frame for window in windows] == {8: [7], 11: [7, 10], 16: [7, 15]}[frames]


def test_a_file_shorter_than_a_window_is_filled_up_as_at_test_time():
    (window,) = windows_of(FakeCapture(5))
    assert numbers(window) == [0, 2, 4, 1]
    assert (window.first_frame, window.last_frame) == (0, 4)
    assert windows_of(FakeCapture(0)) == []


def test_a_file_waits_and_memory_stays_that_of_a_window_and_a_stride():
    capture = FakeCapture(10_000)
    with StreamWindows("fake", PLAN, stride=4, open_capture=lambda source: capture) as windows:
        next(windows)
        time.sleep(0.3)
        assert 12 <= windows.frames <= 4 + 8 + 4  # the second window and its stride
        assert windows._ring._frames.shape == (12, 8, 10, 3)


def test_networks_that_count_in_seconds_span_fewer_frames_of_a_slower_source():
    plan = ViewPlan(4, 2, num_crops=1, short_side=8, crop_size=8, protocol="pyslowfast")
    assert [numbers(window) for window in windows_of(FakeCapture(8, fps=30.0), plan, stride=8)] == [[0, 2, 4, 7]]
    assert [numbers(window) for window in windows_of(FakeCapture(4, fps=15.0), plan, stride=4)] == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("source_fps", "fps", "expected"),
    [
        (15.0, 30.0, [0, 1, 2, 3]),  # resampled 0 1 1 2 2 3 3 4: every second of them
        (60.0, 30.0, [0, 4, 8, 12]),
        (25.0, 30.0, [0, 2, 4, 5]),  # resampled 0 1 2 3 4 5 5 6
    ],
)
def test_frames_are_repeated_or_left_out_to_reach_a_rate(source_fps, fps, expected):
    capture = FakeCapture(40, fps=source_fps)
    windows = windows_of(capture, stride=8, fps=fps)
    assert numbers(windows[0]) == expected
    assert windows[0].end == pytest.approx(7 / fps, abs=1e-5)
    if source_fps > fps:
        assert capture.decoded == list(range(0, 40, 2))  # what is left out is not even decoded


def test_a_slow_reader_of_a_live_source_skips_to_the_present_and_counts_what_it_missed():
    seen = []

    def gate(number):
        # Frames 0 to 7 make the first window; then the reader is away for 29 frames.
        while number == 8 and not seen:
            time.sleep(0.001)

    capture = FakeCapture(37, live=True, gate=gate)
    with StreamWindows("fake", PLAN, stride=2, reconnect=0, open_capture=lambda source: capture) as windows:
        seen.append(next(windows))
        while windows.frames < 37:
            time.sleep(0.001)
        seen.append(next(windows))
        with pytest.raises(VideoError, match="the connection was lost and 0 attempts to restore it failed"):
            next(windows)
    first, second = seen
    assert (first.first_frame, first.skipped_windows, first.dropped_frames) == (0, 0, 0)
    # The next would begin at 2; the last one on this grid that fits into 37 frames begins at 28.
    assert numbers(second) == [28, 30, 32, 34]
    assert second.skipped_windows == 13
    assert second.dropped_frames == 28 - 8


def test_a_lost_connection_is_restored_and_no_window_spans_the_gap():
    captures = [FakeCapture(11, live=True), FakeCapture(9, live=True)]
    said, spans = [], []

    def open_capture(source):
        if not captures:
            raise VideoError("fake", "not there")
        return captures.pop(0)

    def follow(windows):
        for window in windows:
            spans.append((window.first_frame, window.last_frame))

    with (
        StreamWindows("fake", PLAN, stride=8, reconnect=1, notify=said.append, open_capture=open_capture) as windows,
        pytest.raises(VideoError, match="the connection was lost and 1 attempts to restore it failed"),
    ):
        follow(windows)
    assert spans == [(0, 7), (11, 18)]
    lost = "connection lost; attempt 1 of 1 in 1 s"
    assert said == [lost, "connected again", lost]


def test_a_picture_of_another_size_begins_anew():
    windows = windows_of(FakeCapture(26, sizes=dict.fromkeys(range(10, 26), (10, 8))), stride=8)
    assert [window.first_frame for window in windows][-2:] == [10, 18]


def test_what_goes_wrong_while_reading_reaches_the_reader():
    def gate(number):
        if number == 9:
            raise MemoryError("no more")

    with (
        StreamWindows("fake", PLAN, stride=8, open_capture=lambda source: FakeCapture(99, gate=gate)) as windows,
        pytest.raises(VideoError, match="cannot read video 'fake': MemoryError: no more"),
    ):
        list(windows)


def test_closing_stops_a_file_that_nobody_reads():
    capture = FakeCapture(10**9)
    StreamWindows("fake", PLAN, open_capture=lambda source: capture).close()
    assert capture.closed


def test_a_file_is_read_as_its_frames_are():
    path = str(real_clip("carphone_pristine"))
    plan = ViewPlan(clip_len=4, frame_interval=3, num_crops=1, short_side=32, crop_size=32)
    with StreamWindows(path, plan, stride=50) as windows:
        assert (windows.live, windows.span) == (False, 12)
        second = next(itertools.islice(windows, 1, None))
    video = cv2.VideoCapture(path)
    frames = [video.read()[1] for _ in range(62)]
    expected = [cv2.resize(frames[index], (39, 32))[..., ::-1] for index in (50, 53, 56, 59)]
    assert torch.equal(second.views.frames, torch.from_numpy(np.stack(expected)))
    assert second.start == pytest.approx(50 / windows.capture_fps, abs=1e-3)


def test_a_source_that_does_not_open_is_an_error_at_once(tmp_path):
    with pytest.raises(VideoError, match="there is no such file"):
        Capture(str(tmp_path / "missing.mp4"))
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(VideoError, match="OpenCV cannot open it"):
        Capture(str(tmp_path / "text.mp4"))


def test_a_file_that_ends_early_is_mentioned():
    said = []
    capture = FakeCapture(26)
    capture.promised_frames = 30
    assert len(windows_of(capture, stride=8, notify=said.append)) == 4
    assert said == ["it ends after 26 of 30 frames; is it damaged?"]


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match="stride must be at least 1, got 0"):
        StreamWindows("fake", PLAN, stride=0)
    with pytest.raises(ValueError, match="fps must be positive, got 0"):
        StreamWindows("fake", PLAN, fps=0)


def test_a_ring_holds_the_last_frames_and_refuses_others():
    ring = FrameRing(3)
    for number in range(5):
        ring.append(np.full((2, 2, 3), number, np.uint8), number / 10)
    assert ring.frames([2, 4])[:, 0, 0, 0].tolist() == [2, 4]
    assert ring.seconds(4) == pytest.approx(0.4)
    for outside in (1, 5):
        with pytest.raises(IndexError, match=r"numbers must be in \[2, 5\)"):
            ring.frames([outside])
