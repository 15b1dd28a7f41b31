import json
import pickle

import numpy as np
import pytest
import torch
from sample_videos import bad_videos, write_video
from small_networks import lively_checkpoint, small_config

from slowfast_ext import InferenceEngine
from slowfast_ext.cli import main
from slowfast_ext.data import ViewPlan, normalize, read_views

FAST = ["--num-clips", "2", "--num-crops", "1", "--crop-size", "32", "--device", "cpu"]
PLAN = ViewPlan(num_clips=2, num_crops=1, short_side=32, crop_size=32)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    torch.manual_seed(0)
    return lively_checkpoint(tmp_path_factory.mktemp("small"), small_config(18, 18))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return [str(write_video(folder / f"{frames}.mp4", frames)) for frames in (70, 3)]


def by_hand(model, path):
    """Slow and fast features of each view."""
    views = read_views(path, PLAN)
    clips = normalize(views[:], model.config.normalization.mean, model.config.normalization.std)
    with torch.inference_mode():
        slow, fast = model.backbone(clips)
    return slow.mean((2, 3, 4)), fast.mean((2, 3, 4))


def test_features_are_the_mean_over_the_views_slow_then_fast(network, videos, tmp_path, capsys):
    model, checkpoint = network
    out = tmp_path / "features.npz"
    assert main(["features", *videos, "--checkpoint", checkpoint, "--out", str(out), *FAST]) == 0
    with np.load(out, allow_pickle=False) as file:
        assert file["paths"].tolist() == videos
        assert file["features"].dtype == np.float32
        for path, row in zip(videos, file["features"], strict=True):
            expected = torch.cat(by_hand(model, path), 1).mean(0)
            torch.testing.assert_close(torch.from_numpy(row), expected, rtol=1e-4, atol=1e-5)
        assert json.loads(str(file["settings"]))["order"] == "slow-fast"
    channels = model.config.slow.channels[-1] + model.config.fast.channels[-1]
    assert capsys.readouterr().out == f"written: {out} (2 videos, {channels} each, slow-fast)\n"


@pytest.mark.parametrize("suffix", [".json", ".pkl", ".npy"])
def test_rows_of_views_in_the_order_of_the_classifier(suffix, network, videos, tmp_path):
    model, checkpoint = network
    out = tmp_path / f"features{suffix}"
    argv = ["features", videos[0], "--checkpoint", checkpoint, "--out", str(out), "--per-view", *FAST]
    assert main([*argv, "--order", "fast-slow"]) == 0
    slow, fast = by_hand(model, videos[0])
    if suffix == ".npy":
        features, paths = np.load(out), out.with_suffix(".txt").read_text().splitlines()
    else:
        table = json.loads(out.read_text()) if suffix == ".json" else pickle.loads(out.read_bytes())
        features, paths = np.array(table["features"], np.float32), table["paths"]
    assert paths == videos[:1]
    torch.testing.assert_close(torch.from_numpy(features), torch.cat([fast, slow], 1)[None], rtol=1e-4, atol=1e-5)
    # In this order they are what the classifier takes.
    with torch.inference_mode():
        logits = model.head.fc_cls(torch.from_numpy(features[0]))
    clips = normalize(read_views(videos[0], PLAN)[:], (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
    with torch.inference_mode():
        torch.testing.assert_close(logits, model(clips), rtol=1e-3, atol=1e-3)


def test_lists_are_read_and_bad_videos_are_left_out(network, videos, tmp_path, capsys):
    folder = tmp_path / "videos"
    folder.mkdir()
    bad = {str(path): reason for path, reason in bad_videos(folder).items() if path.is_file()}
    (tmp_path / "list.txt").write_text("\n".join([f"{path} 12" for path in bad] + [videos[1], ""]))
    out = tmp_path / "features.npz"
    argv = ["features", str(tmp_path / "list.txt"), "--checkpoint", network[1], "--out", str(out), *FAST]
    assert main(argv) == 1
    with np.load(out) as file:
        assert file["paths"].tolist() == [videos[1]]
        assert len(file["features"]) == 1
    errors = capsys.readouterr().err
    for path, reason in bad.items():
        assert f"slowfast-ext features: error: cannot read video '{path}': {reason}" in errors


def test_an_interrupted_run_keeps_what_is_done_and_resumes(network, videos, tmp_path, monkeypatch, capsys):
    out = tmp_path / "features.json"
    argv = ["features", *videos, "--checkpoint", network[1], "--out", str(out), *FAST]
    calls = []
    original = InferenceEngine.features

    def interrupted_once(self, views):
        calls.append(len(views))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, views)

    monkeypatch.setattr(InferenceEngine, "features", interrupted_once)
    assert main([*argv]) == 130
    first = json.loads(out.read_text())
    assert first["paths"] == videos[:1]
    assert main([*argv, "--resume"]) == 0
    assert len(calls) == 3  # the video that was done is not seen again
    second = json.loads(out.read_text())
    assert second["paths"] == videos
    assert second["features"][0] == first["features"][0]
    capsys.readouterr()
    assert main([*argv, "--resume", "--order", "fast-slow"]) == 2
    assert "order was slow-fast, got fast-slow" in capsys.readouterr().err


def test_arguments_are_checked_before_any_work(network, videos, tmp_path, capsys):
    def error(*argv):
        assert main(["features", videos[0], "--checkpoint", network[1], *map(str, argv)]) == 2
        return capsys.readouterr().err

    assert "--out must end in .npz, .npy, .json, .pkl, got" in error("--out", tmp_path / "features.txt")
    assert "must be a file in an existing, writable folder" in error("--out", tmp_path / "no" / "features.npz")
    assert "--resume must have an OUT that ends in" in error("--out", tmp_path / "features.pkl", "--resume")
    (tmp_path / "broken.npz").write_text("no archive")
    assert "must be a file of features" in error("--out", tmp_path / "broken.npz", "--resume")
    (tmp_path / "empty.txt").write_text("\n\n")
    assert main(["features", str(tmp_path / "empty.txt"), "--checkpoint", network[1], "--out", "x.npz"]) == 2
    assert "must name a video in each line, got no line" in capsys.readouterr().err
