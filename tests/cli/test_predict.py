import argparse
import json
from itertools import pairwise

import cv2
import numpy as np
import pytest
import torch
from sample_videos import bad_videos, real_clip, write_video

from slowfast_ext import InferenceEngine, create_model
from slowfast_ext.cli import main
from slowfast_ext.cli.arguments import view_plan
from slowfast_ext.data import ViewPlan, open_video
from slowfast_ext.models import SlowFastConfig, build_model, fast_pathway, slow_pathway

ZOO_NAME = "slowfast_r50_4x16x1_256e_kinetics400_rgb"
CLASSES = 7
LABELS = [f"activity {index}" for index in range(CLASSES)]
FAST = ["--num-clips", "1", "--num-crops", "1", "--crop-size", "32", "--device", "cpu"]


def _spread(model):
    """Random classifiers give all classes nearly the same probability; these differ."""
    with torch.no_grad():
        model.head.fc_cls.weight.mul_(20)
    return model.eval()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A network of depth 18 and the file of its weights."""
    torch.manual_seed(0)
    config = SlowFastConfig(
        slow_pathway(18), fast_pathway(18), resample_rate=8, speed_ratio=8, fusion_kernel=5, num_classes=CLASSES
    )
    model = _spread(build_model(config))
    path = tmp_path_factory.mktemp("small") / "small.pth"
    torch.save({"state_dict": model.state_dict()}, path)
    return model, str(path)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A network of the zoo with 7 classes and the file of its weights."""
    torch.manual_seed(0)
    model = _spread(create_model(ZOO_NAME, num_classes=CLASSES))
    path = tmp_path_factory.mktemp("published") / "published.pth"
    torch.save(model.state_dict(), path)
    return model, str(path)


@pytest.fixture
def labels(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("\n".join(LABELS) + "\n\n", encoding="utf-8")
    return str(path)


def _error(capsys, argv) -> str:
    """The one line that a rejected command leaves."""
    assert main(["predict", *map(str, argv)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    line = captured.err.splitlines()[-1]
    assert line.startswith("slowfast-ext predict: error: ")
    assert "Traceback" not in captured.err
    return line


def _by_hand(model, path, starts, lefts, size, width):
    """Mean probabilities of the clips that begin at ``starts``, cropped at ``lefts`` out of pictures of ``width``."""
    views = []
    with open_video(path, "pyav") as video:
        for left in lefts:
            for start in starts:
                frames = video.frames(range(start, start + 64, 2))
                pictures = [cv2.resize(frame, (width, size))[:, left : left + size] for frame in frames]
                views.append(np.stack(pictures).transpose(3, 0, 1, 2))
    mean = torch.tensor([123.675, 116.28, 103.53])[:, None, None, None]
    std = torch.tensor([58.395, 57.12, 57.375])[:, None, None, None]
    with torch.inference_mode():
        scores = model((torch.from_numpy(np.stack(views)).float() - mean) / std)
    return scores.softmax(1).mean(0)


def test_accelerated_predictions_are_the_mean_probabilities_of_the_zoo_views(published, labels, tmp_path, capsys):
    model, checkpoint = published
    clip, out = real_clip("bikes"), tmp_path / "out.json"
    # 250 frames, 187 starts, two clips: 46 and 140. 640x272 becomes 75x32: slack 43, crops at 0, 42 and 21.
    expected = _by_hand(model, clip, starts=[46, 140], lefts=[0, 42, 21], size=32, width=75)
    argv = [clip, "--config", ZOO_NAME, "--checkpoint", checkpoint, "--labels", labels, "--json", out]
    argv += ["--num-clips", 2, "--crop-size", 32, "--max-views", 4, "--device", "cpu"]
    assert main(["predict", *map(str, argv)]) == 0

    result = json.loads(out.read_text())
    assert result["complete"] is True
    assert result["config"] == ZOO_NAME
    assert result["views"]["num_clips"] == 2
    assert result["views"]["num_crops"] == 3
    (video,) = result["videos"]
    assert video["path"] == str(clip)
    assert video["views"] == 6
    assert video["seconds"].keys() == {"decode", "network"}
    assert [entry["index"] for entry in video["predictions"]] == expected.topk(5).indices.tolist()
    assert [entry["label"] for entry in video["predictions"]] == [LABELS[i] for i in expected.topk(5).indices]
    probabilities = [entry["probability"] for entry in video["predictions"]]
    assert probabilities == pytest.approx(expected.topk(5).values.tolist(), rel=1e-4)
    assert min(first - second for first, second in pairwise(probabilities)) > 1e-4  # else the order above is luck

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(clip)
    assert len(lines) == 6
    assert lines[1] == f"  {100 * probabilities[0]:6.2f} %  {video['predictions'][0]['label']}"


def test_without_config_the_checkpoint_describes_the_network(small, tmp_path):
    model, checkpoint = small
    out = tmp_path / "out.json"
    argv = ["predict", str(real_clip("carphone_pristine")), "--checkpoint", checkpoint, "--json", str(out), *FAST]
    assert main(argv) == 0
    predictions = json.loads(out.read_text())["videos"][0]["predictions"]
    # 120 frames, 57 starts: 28. 176x144 becomes 39x32: the crop begins at 3.
    expected = _by_hand(model, real_clip("carphone_pristine"), starts=[28], lefts=[3], size=32, width=39)
    assert [entry["probability"] for entry in predictions] == pytest.approx(expected.topk(5).values.tolist(), rel=1e-4)
    assert predictions[0]["label"] is None


def test_a_folder_is_searched_and_bad_files_do_not_stop_it(small, tmp_path, capsys):
    folder = tmp_path / "videos"
    (folder / "deep").mkdir(parents=True)
    bad = {str(path): reason for path, reason in bad_videos(folder).items() if path.is_file()}
    good = [write_video(folder / "deep" / "a.MP4", 3), write_video(folder / "z.avi", 70)]
    (folder / "notes.txt").write_text("not searched for")
    (folder / "._z.mp4").write_text("what macOS leaves beside a file")
    out = tmp_path / "out.json"
    missing = str(tmp_path / "missing.mp4")
    argv = ["predict", str(folder), missing, "--checkpoint", small[1], "--json", str(out), *FAST]
    assert main(argv) == 1

    result = json.loads(out.read_text())
    assert result["complete"] is True
    videos = {video["path"]: video for video in result["videos"]}
    assert videos.keys() == {*bad, *map(str, good), missing}
    assert len(result["videos"]) == len(videos)
    for path, reason in {**bad, missing: "there is no such file"}.items():
        assert videos[path].keys() == {"path", "error"}
        assert videos[path]["error"].startswith(f"cannot read video '{path}': {reason}")
    for path in good:
        assert len(videos[str(path)]["predictions"]) == 5
    captured = capsys.readouterr()
    assert [line for line in captured.out.splitlines() if not line.startswith(" ")] == [str(path) for path in good]
    assert captured.err.count("slowfast-ext predict: error: cannot read video") == len(bad) + 1


def test_ctrl_c_keeps_what_is_done(small, tmp_path, monkeypatch, capsys):
    videos = [str(write_video(tmp_path / f"{index}.mp4", 3)) for index in range(3)]
    calls = []

    def interrupted(*arguments):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return torch.full((CLASSES,), 1 / CLASSES)

    monkeypatch.setattr(InferenceEngine, "video", interrupted)
    out = tmp_path / "out.json"
    assert main(["predict", *videos, "--checkpoint", small[1], "--json", str(out), *FAST]) == 130
    result = json.loads(out.read_text())
    assert result["complete"] is False
    assert [video["path"] for video in result["videos"]] == videos[:1]
    assert capsys.readouterr().err.endswith("slowfast-ext predict: interrupted\n")
    assert list(tmp_path.glob("*.tmp*")) == []


def test_scores_that_are_no_numbers_are_an_error_not_a_prediction(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(InferenceEngine, "video", lambda *arguments: torch.full((CLASSES,), torch.nan))
    video = str(write_video(tmp_path / "video.mp4", 3))
    assert main(["predict", video, "--checkpoint", small[1], *FAST]) == 1
    assert f"'{video}': the network's results are not finite numbers" in capsys.readouterr().err


def test_reduced_precision_stays_close_to_float32(small, tmp_path):
    results = []
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / f"{dtype}.json"
        argv = ["predict", str(real_clip("carphone_pristine")), "--checkpoint", small[1], "--json", str(out)]
        assert main([*argv, "--dtype", dtype, "--top-k", "99", *FAST]) == 0
        predictions = json.loads(out.read_text())["videos"][0]["predictions"]
        results.append({entry["index"]: entry["probability"] for entry in predictions})
    assert results[0].keys() == results[1].keys() == set(range(CLASSES))  # top-k beyond the classes shows them all
    assert results[0] != results[1]
    assert results[1] == pytest.approx(results[0], abs=0.03)


def test_arguments_are_checked_before_any_work(small, tmp_path, capsys, labels):
    video = write_video(tmp_path / "video.mp4", 3)
    (tmp_path / "nothing").mkdir()
    checkpoint = ["--checkpoint", small[1]]
    assert "no video in the folder" in _error(capsys, [tmp_path / "nothing", *checkpoint])
    assert "must be a file in an existing" in _error(capsys, [video, *checkpoint, "--json", tmp_path / "no" / "x.json"])
    assert "must be a file in an existing" in _error(capsys, [video, *checkpoint, "--json", tmp_path])
    assert "must be auto, cpu or cuda, got 'gpu'" in _error(capsys, [video, *checkpoint, "--device", "gpu"])
    assert "must be auto, cpu or cuda, got 'meta'" in _error(capsys, [video, *checkpoint, "--device", "meta"])
    assert "must be available, got 'cuda:99'" in _error(capsys, [video, *checkpoint, "--device", "cuda:99"])
    assert "missing.txt" in _error(capsys, [video, *checkpoint, "--labels", tmp_path / "missing.txt"])
    assert "missing.pth" in _error(capsys, [video, "--checkpoint", tmp_path / "missing.pth"])
    assert "did you mean" in _error(capsys, [video, *checkpoint, "--config", "slowfast_r50_4x16"])


def test_labels_must_fit_the_classes(small, tmp_path, capsys):
    video = write_video(tmp_path / "video.mp4", 3)
    path = tmp_path / "labels.txt"
    argv = [video, "--checkpoint", small[1], "--labels", path]
    path.write_text("one\ntwo\n")
    assert f"each of the {CLASSES} classes of '{small[1]}', got 2" in _error(capsys, argv)
    path.write_text("one\n\ntwo\n")
    assert "must have a class name in each line, got none in line 2" in _error(capsys, argv)
    path.write_bytes(b"caf\xe9\n" * CLASSES)
    assert "must be UTF-8 text" in _error(capsys, argv)


def test_a_checkpoint_must_fill_the_network_of_the_config(small, labels, tmp_path, capsys):
    argv = [write_video(tmp_path / "video.mp4", 3), "--checkpoint", small[1], "--config", ZOO_NAME]
    assert f"as many classes as asked for: {ZOO_NAME} has 400, got {CLASSES}" in _error(capsys, argv)
    assert f"must hold all weights of {ZOO_NAME}" in _error(capsys, [*argv, "--labels", labels])


@pytest.mark.parametrize(("frame_sampling", "protocol"), [("strided", "mmaction2"), ("linspace", "pyslowfast")])
def test_views_follow_the_network_and_the_code_base_it_comes_from(frame_sampling, protocol):
    pathways = slow_pathway(18), fast_pathway(18)
    config = SlowFastConfig(*pathways, 4, 4, 7, frame_sampling=frame_sampling, clip_len=64, test_clips=2, test_crops=1)
    unset = argparse.Namespace(num_clips=None, num_crops=None, crop_size=None)
    expected = ViewPlan(clip_len=64, num_clips=2, num_crops=1, protocol=protocol)
    assert view_plan(config, unset) == expected


@pytest.mark.parametrize("option", ["--top-k", "--num-clips", "--max-views", "--crop-size"])
def test_counts_below_one_are_usage_errors(option, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["predict", "video.mp4", "--checkpoint", "x.pth", option, "0"])
    assert caught.value.code == 2
    assert f"{option}: must be at least 1, got 0" in capsys.readouterr().err
