import importlib.util

import numpy as np
import pytest
from sample_videos import (
    CLIPS,
    bad_videos,
    real_clip,
    rotate_by_metadata,
    write_video,
    write_with_index_in_front,
)

from slowfast_ext.data import VideoError, open_video

needs_decord = pytest.mark.skipif(importlib.util.find_spec("decord") is None, reason="decord has no wheel here")
DECODERS = [pytest.param("decord", marks=needs_decord), "pyav"]
NAMES = ["missing", "empty", "cut_short", "cut_short_index_in_front", "text", "noise", "audio", "folder"]


@needs_decord
@pytest.mark.parametrize("name", CLIPS)
def test_both_decoders_return_the_same_frames_of_real_clips(name):
    frames, height, width = CLIPS[name]
    indices = [frames - 1, 0, 40, 40, 77, 3]
    results = []
    for decoder in ("decord", "pyav"):
        with open_video(real_clip(name), decoder) as video:
            assert len(video) == frames
            assert 24 < video.fps < 31
            results.append(video.frames(indices))
    assert results[0].shape == (6, height, width, 3)
    assert results[0].dtype == np.uint8
    assert np.array_equal(*results)
    assert np.array_equal(results[0][2], results[0][3])
    assert not np.array_equal(results[0][0], results[0][1])


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".mkv", ".mov"])
def test_any_frames_equal_those_of_reading_all(tmp_path, decoder, suffix):
    path = write_video(tmp_path / f"video{suffix}", 60, g="12", bf="2")
    with open_video(path, decoder) as video:
        everything = np.stack(list(video.read(range(len(video)))))
    assert len(everything) == 60
    assert len({frame.tobytes() for frame in everything}) == 60
    indices = [59, 2, 2, 30, 0, 13, 12, 11, 47]
    with open_video(path, decoder) as video:
        assert np.array_equal(video.frames(indices), everything[indices])
        assert np.array_equal(video.frames([5]), everything[[5]])  # backwards, on the same reader


def test_pyav_reads_a_format_whose_seeks_miss(tmp_path):
    path = write_video(tmp_path / "video.ts", 30, g="10")
    with open_video(path, "pyav") as video:
        everything = np.stack(list(video.read(range(len(video)))))
        assert len({frame.tobytes() for frame in everything}) == 30
        assert np.array_equal(video.frames([25, 3, 0]), everything[[25, 3, 0]])


@needs_decord
@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_both_decoders_turn_pictures_upright(tmp_path, degrees):
    path = write_video(tmp_path / "video.mp4", 3, height=64, width=128)
    with open_video(path, "pyav") as video:
        stored = video.frames([1])[0]
    rotate_by_metadata(path, degrees, height=64, width=128)
    for decoder in ("decord", "pyav"):
        with open_video(path, decoder) as video:
            assert np.array_equal(video.frames([1])[0], np.rot90(stored, -degrees // 90))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", NAMES)
def test_a_bad_file_is_named_with_its_reason(tmp_path, name, decoder):
    path = tmp_path / f"{name}.mp4"
    reason = bad_videos(tmp_path)[path]
    with pytest.raises(VideoError) as caught:
        open_video(path, decoder)
    assert str(caught.value).startswith(f"cannot read video '{path}': {reason}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("decoder", DECODERS)
def test_damage_in_the_middle_is_reported_when_it_is_reached(tmp_path, decoder):
    content = bytearray(real_clip("bikes").read_bytes())
    content[200_000:220_000] = np.random.default_rng(0).bytes(20_000)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(content)
    with open_video(path, decoder) as video, pytest.raises(VideoError, match=r"its frames are damaged or cut short"):
        video.frames(range(0, 250, 5))


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_video_of_one_frame_is_a_video(tmp_path, decoder):
    with open_video(write_video(tmp_path / "one.mp4", 1), decoder) as video:
        assert len(video) == 1
        assert video.frames([0, 0]).shape == (2, 48, 64, 3)


def test_complete_files_are_not_called_cut_short(tmp_path):
    source = write_video(tmp_path / "video.mp4", 5)
    in_front = write_with_index_in_front(source, tmp_path / "in_front.mp4")
    trailed = tmp_path / "trailed.mp4"
    trailed.write_bytes(source.read_bytes() + b"stray bytes behind the last box")
    for path in (source, in_front, trailed):
        with open_video(path, "pyav") as video:
            assert len(video) == 5


@pytest.mark.parametrize("decoder", DECODERS)
def test_wrong_indices_are_rejected_before_decoding(tmp_path, decoder):
    with open_video(write_video(tmp_path / "video.mp4", 3), decoder) as video:
        for indices in ([3], [-1], [0, 100]):
            with pytest.raises(IndexError, match=r"must be in \[0, 3\)"):
                video.frames(indices)
        with pytest.raises(ValueError, match="strictly increasing"):
            video.read([1, 0])
        with pytest.raises(ValueError, match="at least one"):
            video.frames([])


def test_an_unknown_decoder_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="decoder must be one of auto, decord, pyav, got 'opencv'"):
        open_video(tmp_path / "video.mp4", "opencv")


@needs_decord
def test_decord_is_quiet_about_bad_files(tmp_path, capfd):
    bad_videos(tmp_path)
    capfd.readouterr()  # what FFmpeg said when the files were made
    for name in ("text.mp4", "cut_short.mp4", "cut_short_index_in_front.mp4", "audio.mp4", "empty.mp4"):
        with pytest.raises(VideoError):
            open_video(tmp_path / name, "decord")
    assert capfd.readouterr() == ("", "")
