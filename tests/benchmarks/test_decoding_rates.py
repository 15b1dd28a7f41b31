"""The decoding benchmark on small videos: what is read, what is reported, which options are refused."""

import json

import decoding
import numpy as np
import pytest
from sample_videos import write_video

from slowfast_ext.data import ClipSampling, open_video

DECODERS = ["decord", "pyav"]


@pytest.fixture(autouse=True)
def _decord():
    pytest.importorskip("decord")


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("videos") / "video.mp4", 40, g="10")


def test_each_way_reads_the_frames_that_it_names(video):
    sampling = ClipSampling(4, 2, num_clips=3)  # 33 starts in three parts: 5, 16 and 27
    with open_video(video, "pyav") as opened:
        frames = opened.frames(range(40))
    clips = [list(range(start, start + 8, 2)) for start in (5, 16, 27)]
    for decoder in DECODERS:
        ways = decoding.ways_to_read(video, decoder, sampling)
        assert tuple(ways) == decoding.WAYS
        assert np.array_equal(ways["one clip"](), frames[clips[1]])
        assert np.array_equal(ways["clips"](), np.concatenate([frames[clip] for clip in clips]))
        assert np.array_equal(ways["union"](), frames[sorted({index for clip in clips for index in clip})])


def test_rates_of_both_decoders_are_written_down(video, tmp_path, capsys):
    out = tmp_path / "out.json"
    argv = ["--videos", video, "--clips", 3, "--clip-len", 4, "--rounds", 3, "--json", out]
    assert decoding.main([*map(str, argv)]) == 0
    document = json.loads(out.read_text())
    assert document["benchmark"] == "decoding"
    assert document["environment"]["torch"]
    assert document["workload"]["bytes"] == {str(video): video.stat().st_size}
    assert [(row["decoder"], row["way"]) for row in document["rows"]] == [
        (decoder, way) for decoder in DECODERS for way in decoding.WAYS
    ]
    for row in document["rows"]:
        assert len(row["samples_ms"]) == 3
        assert row["videos_per_second"] == pytest.approx(1e3 / np.median(row["samples_ms"]))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines if str(video) in line] == [f"{video}, {name}" for name in DECODERS]


def test_wrong_frames_are_not_timed(video, tmp_path, monkeypatch, capsys):
    original = decoding.ways_to_read

    def shifted(path, decoder, sampling):
        ways = original(path, decoder, sampling)
        return {way: lambda call=call: call() + (decoder == "pyav") for way, call in ways.items()}

    monkeypatch.setattr(decoding, "ways_to_read", shifted)
    assert decoding.main(["--videos", str(video), "--clip-len", "4", "--rounds", "1"]) == 1
    assert f"{video}, pyav: not timed: its frames differ from those of decord" in capsys.readouterr().out


def test_a_video_that_no_decoder_reads_is_named(tmp_path, capsys):
    (tmp_path / "bad.mp4").write_text("no video")
    assert decoding.main(["--videos", str(tmp_path / "bad.mp4"), "--rounds", "1"]) == 1
    assert "not timed: it contains text, not a video" in capsys.readouterr().out


def test_samples_have_the_key_frames_that_they_are_named_after(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "FRAMES", 30)
    with open_video(decoding.write_sample(tmp_path / "sample.mp4", 12), "pyav") as video:
        assert len(video) == 30
        assert len(video._key_times) == 3
        assert video.frames([0]).shape == (1, 256, 340, 3)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--decoders", "opencv"], "--decoders must be of decord, pyav, got 'opencv'"),
        (["--videos", "nothing.mp4"], "--videos must be existing files, got 'nothing.mp4'"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--seconds", "0"], "--seconds must be positive, got 0"),
        (["--clips", "0"], "num_clips must be at least 1, got 0"),
        (["--json", "nowhere/out.json"], "--json must be in an existing folder"),
    ],
)
def test_impossible_options_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        decoding.main(argv)
    assert caught.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
