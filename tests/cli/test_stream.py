import json

import pytest
import torch
from sample_videos import real_clip, write_video
from small_networks import lively_checkpoint, small_config

from slowfast_ext import InferenceEngine
from slowfast_ext.cli import main
from slowfast_ext.data import StreamWindows, ViewPlan
from slowfast_ext.evaluation.inference import PlainEngine

FAST = ["--crop-size", "32", "--device", "cpu"]


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    torch.manual_seed(0)
    return lively_checkpoint(tmp_path_factory.mktemp("small"), small_config(18, 18))


def predict(capsys, checkpoint, *argv):
    status = main(["predict", "--checkpoint", checkpoint, *FAST, *map(str, argv)])
    captured = capsys.readouterr()
    return status, [json.loads(line) for line in captured.out.splitlines()], captured.err


def test_a_line_of_json_a_window_with_the_mean_of_the_last_windows(network, tmp_path, capsys):
    model, checkpoint = network
    clip = real_clip("carphone_pristine")
    plan = ViewPlan(num_crops=1, short_side=32, crop_size=32)
    engine = PlainEngine(model, dtype=torch.float32, max_views=2)
    with StreamWindows(str(clip), plan, stride=28) as windows:
        each = [engine.video(window.views) for window in windows]
        fps = windows.capture_fps

    (tmp_path / "labels.txt").write_text("a\nb\nc\nd\ne\n")
    argv = ["--stream", clip, "--stride", 28, "--average", 2, "--top-k", 3, "--labels", tmp_path / "labels.txt"]
    status, lines, err = predict(capsys, checkpoint, *argv)
    assert status == 0
    assert [(line["first_frame"], line["last_frame"]) for line in lines] == [(0, 63), (28, 91), (56, 119)]
    means = [each[0], (each[0] + each[1]) / 2, (each[1] + each[2]) / 2]
    for line, mean in zip(lines, means, strict=True):
        assert line["end"] == pytest.approx(line["last_frame"] / fps, abs=2e-3)
        expected = mean.topk(3)
        assert [entry["index"] for entry in line["predictions"]] == expected.indices.tolist()
        assert [entry["label"] for entry in line["predictions"]] == ["abcde"[index] for index in expected.indices]
        found = [entry["probability"] for entry in line["predictions"]]
        assert found == pytest.approx(expected.values.tolist(), rel=1e-5)
    assert "a window is 64 frames" in err
    assert "3 windows of 120 frames" in err


def test_classes_below_the_threshold_are_not_shown(network, tmp_path, capsys):
    video = write_video(tmp_path / "video.mp4", 10)
    _, (every,), _ = predict(capsys, network[1], "--stream", video)
    second = every["predictions"][1]["probability"]
    _, (line,), _ = predict(capsys, network[1], "--stream", video, "--threshold", second + 1e-6)
    assert line["predictions"] == every["predictions"][:1]


def test_ctrl_c_ends_with_what_was_done(network, tmp_path, monkeypatch, capsys):
    def interrupted(self, views):
        raise KeyboardInterrupt

    monkeypatch.setattr(InferenceEngine, "video", interrupted)
    status, lines, err = predict(capsys, network[1], "--stream", write_video(tmp_path / "video.mp4", 10))
    assert (status, lines) == (130, [])
    assert "0 windows of 10 frames" in err


def test_a_stream_that_cannot_be_read_is_an_error(network, tmp_path, capsys):
    status, lines, err = predict(capsys, network[1], "--stream", tmp_path / "missing.mp4")
    assert (status, lines) == (1, [])
    assert "there is no such file" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["video.mp4", "--stream", "0"], "VIDEO must come without --stream, got both"),
        (["--stream", "0", "--json", "x.json"], "--json must come without --stream, got both"),
        (["--stream", "0", "--decoder", "pyav"], "--decoder must come without --stream, got both"),
        (["--stream", "0", "--num-clips", "2"], "--num-clips must come without --stream, got both"),
        (["video.mp4", "--stride", "8"], "--stride must come with --stream, got it without"),
        ([], "there must be a VIDEO or --stream SOURCE, got neither"),
        (["--stream", "0", "--stride", "0"], "--stride must be at least 1, got 0"),
        (["--stream", "0", "--fps", "-1"], "--fps must be above 0 and at most 1000, got -1"),
        (["--stream", "0", "--threshold", "2"], "--threshold must be in [0, 1], got 2"),
    ],
)
def test_wrong_arguments_are_rejected_before_any_work(argv, message, capsys):
    status, lines, err = predict(capsys, "missing.pth", *argv)
    assert (status, lines) == (2, [])
    assert message in err
