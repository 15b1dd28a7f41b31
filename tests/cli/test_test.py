"""``slowfast-ext test`` on real files."""

import json
import os
import pickle
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peer_networks import peer_weights, pyslowfast_name
from sample_videos import write_video
from small_networks import lively_model
from small_recipe import CONFIG
from tolerances import tolerance
from torch import nn

import slowfast_ext
from slowfast_ext.cli import main
from slowfast_ext.data import ViewPlan, normalize, read_views
from slowfast_ext.evaluation.result_files import PartFile, read_results
from slowfast_ext.evaluation.testing import VideoScores
from slowfast_ext.models import UNIFORM
from slowfast_ext.training import read_config, read_settings

VIEWS = 6  # 2 clips x 3 crops
VIDEOS = ("0.mp4", "1.mp4", "broken.mp4", "2.mp4", "3.mp4")
LABELS = (0, 1, 0, 1, 0)
PARTS = 2 * 18 * 64  # products summed into a score: layers of a pathway times their widest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Videos, one of them broken, a configuration, and weights for it."""
    folder = tmp_path_factory.mktemp("test")
    for index in range(4):
        write_video(folder / f"{index}.mp4", 12 + 4 * index)
    (folder / "broken.mp4").write_bytes(b"no video")
    lines = "".join(f"{name} {label}\n" for name, label in zip(VIDEOS, LABELS, strict=True))
    (folder / "val.txt").write_text(lines)
    (folder / "readable.txt").write_text(lines.replace("broken.mp4 0\n", ""))
    (folder / "train.txt").write_text(lines)
    (folder / "my.py").write_text(CONFIG.replace("ROOT", str(folder)))
    torch.manual_seed(0)
    model = lively_model(read_settings(read_config(folder / "my.py")).model.network)
    torch.save({"state_dict": model.state_dict()}, folder / "weights.pth")
    return folder


def _test(folder, *arguments, weights="weights.pth"):
    return main(["test", str(folder / "my.py"), str(folder / weights), *map(str, arguments)])


def _model(folder):
    model = slowfast_ext.models.build_model(read_settings(read_config(folder / "my.py")).model.network)
    return slowfast_ext.load_checkpoint(folder / "weights.pth", model).eval()


def _logits(model, path, size=32, protocol="mmaction2"):
    """Of each view, with plain PyTorch."""
    plan = ViewPlan(8, 1, num_clips=2, num_crops=3, short_side=size, crop_size=size, protocol=protocol)
    statistics = model.config.normalization
    with torch.inference_mode():
        return model(normalize(read_views(path, plan)[:], statistics.mean, statistics.std))


def _assert_close(scores, expected):
    spread = max(1.0, expected.std().item())
    torch.testing.assert_close(torch.as_tensor(scores), expected, **tolerance(torch.float32, PARTS, scale=spread))


@pytest.mark.parametrize("options", [(), ("--no-engine",), ("--no-accelerate",), ("--no-accelerate", "--fuse-conv-bn")])
def test_scores_are_those_of_the_plain_network_in_the_order_of_the_list(folder, tmp_path, monkeypatch, capsys, options):
    out, norms = tmp_path / "result.json", []
    real = slowfast_ext.cli.test.prepare

    def prepare(model, **settings):
        norms.append(sum(isinstance(module, nn.BatchNorm3d) for module in model.modules()))
        return real(model, **settings)

    monkeypatch.setattr(slowfast_ext.cli.test, "prepare", prepare)
    assert _test(folder, "--out", out, "--eval", "top_k_accuracy", "mean_class_accuracy", *options) == 1
    assert (norms == [0]) == ("--fuse-conv-bn" in options)
    entries = json.loads(out.read_text())
    model = _model(folder)
    expected = {name: _logits(model, folder / name).softmax(1).mean(0) for name in VIDEOS if name != "broken.mp4"}
    for name, entry in zip(VIDEOS, entries, strict=True):
        if name == "broken.mp4":
            assert entry["path"] == str(folder / name)
            assert "not a video" in entry["error"] or "text" in entry["error"]
        else:
            _assert_close(entry, expected[name])
    captured = capsys.readouterr()
    hits = [
        int(expected[name].argmax()) == label for name, label in zip(VIDEOS, LABELS, strict=True) if name in expected
    ]
    assert f"top1_acc: {sum(hits) / 4:.4f}\ntop5_acc: 1.0000\nmean_class_accuracy: " in captured.out
    assert f"error: '{folder / 'broken.mp4'}': " in captured.err
    assert "1 of 5 videos could not be read" in captured.err
    assert not list(tmp_path.glob("*.part*"))


def test_views_are_averaged_as_asked_for(folder, tmp_path, capsys):
    logits = _logits(_model(folder), folder / "1.mp4")
    options = (f"data.test.ann_file={folder / 'readable.txt'}", "data.test_dataloader.videos_per_gpu=3")
    listed = ("--cfg-options", *options)
    options = ("--average-clips", "score", "--max-testing-views", 4, "--eval", "top_k_accuracy")
    assert _test(folder, "--out", tmp_path / "s.pkl", *options, "--eval-options", "topk=2,1", *listed) == 0
    assert re.search(r"^top2_acc: 1\.0000\ntop1_acc: 0\.\d{4}$", capsys.readouterr().out, re.MULTILINE)
    (_, scores, *_) = pickle.loads((tmp_path / "s.pkl").read_bytes())
    assert scores.dtype == np.float32
    _assert_close(scores, logits.mean(0))
    assert _test(folder, "--out", tmp_path / "n.json", "--average-clips", "none", *listed) == 0
    each = json.loads((tmp_path / "n.json").read_text())
    assert len(each) == 4 * VIEWS
    _assert_close(each[VIEWS : 2 * VIEWS], logits)
    assert _test(folder, "--average-clips", "none", "--eval", "top_k_accuracy", *listed) == 2
    assert "metrics must have one score a video, got average_clips none with 6 views" in capsys.readouterr().err


def test_an_interrupted_test_goes_on_where_it_was(folder, tmp_path, monkeypatch, capsys):
    assert _test(folder, "--out", tmp_path / "whole.json") == 1
    out, add, added = tmp_path / "result.json", PartFile.add, []

    def interrupted(self, index, scores):
        if len(added) == 2:
            self._file.write('{"index": 3, "sco')  # cut short, as a killed process leaves it
            raise KeyboardInterrupt
        added.append(index)
        add(self, index, scores)

    monkeypatch.setattr(PartFile, "add", interrupted)
    assert _test(folder, "--out", out) == 130
    assert (tmp_path / "result.json.part0").exists()
    assert not out.exists()
    monkeypatch.setattr(PartFile, "add", lambda self, index, scores: (added.append(index), add(self, index, scores)))
    assert _test(folder, "--out", out, "--average-clips", "score") == 2
    assert "must be of the same test to go on with it, got one with another average-clips" in capsys.readouterr().err
    assert _test(folder, "--out", out) == 1
    assert added == [0, 1, 3, 4]
    assert out.read_text() == (tmp_path / "whole.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.json", "whole.json"]


def test_processes_share_the_list_without_counting_twice(folder, tmp_path, capsys):
    assert _test(folder, "--out", tmp_path / "one.json", "--eval", "top_k_accuracy") == 1
    alone = capsys.readouterr().out
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # With what torchrun gives them.
    command = [sys.executable, "-m", "slowfast_ext", "test", folder / "my.py", folder / "weights.pth", "--eval",
               "top_k_accuracy", "--out", tmp_path / "two.json", "--launcher", "pytorch"]  # fmt: skip
    environment = {
        **os.environ, "PYTHONPATH": str(Path(slowfast_ext.__file__).parents[1]), "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**environment, "RANK": r, "LOCAL_RANK": r})
        for r in ("0", "1")
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert outputs == [alone.replace("one.json", "two.json"), ""]
    one, two = (read_results(tmp_path / name) for name in ("one.json", "two.json"))
    for a, b in zip(one, two, strict=True):
        if isinstance(a, dict):
            assert a == b
        else:
            _assert_close(a, torch.as_tensor(b))
    assert not list(tmp_path.glob("*.part*"))


def test_weights_of_another_code_base_are_tested_by_its_habits(folder, tmp_path, capsys):
    model = _model(folder)
    torch.save({"model_state": peer_weights(model, pyslowfast_name)}, folder / "peer.pyth")
    # The network pools over windows of 7 x 7 positions, which crops of 224 pixels have.
    (folder / "one.txt").write_text("1.mp4 1\n")
    options = (f"data.test.ann_file={folder / 'one.txt'}", "data.test.pipeline.3.scale=(-1,224)")
    options = ("--cfg-options", *options, "data.test.pipeline.4.crop_size=224")
    assert _test(folder, "--out", tmp_path / "r.json", *options, weights="peer.pyth") == 0
    assert "as the weights are of PySlowFast: " in capsys.readouterr().err
    twin = slowfast_ext.load_checkpoint(folder / "peer.pyth").eval()
    assert twin.config.frame_sampling == "linspace"
    assert twin.config.normalization == UNIFORM
    expected = _logits(twin, folder / "1.mp4", 224, "pyslowfast").softmax(1).mean(0)
    _assert_close(json.loads((tmp_path / "r.json").read_text())[0], expected)


def test_wrong_arguments_are_one_line_before_any_work(folder, tmp_path, capsys):
    def error(*arguments, **options):
        assert _test(folder, *arguments, **options) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1
        return captured.err

    evaluate = ("--eval", "top_k_accuracy")
    assert "at least one of --out and --eval must be given, got neither" in error()
    assert "--out must end in .json or .pkl or .yaml or .yml, got 'r.txt'" in error("--out", "r.txt")
    assert "--out must be a file in an existing, writable folder" in error("--out", tmp_path / "no" / "r.json")
    assert "CHECKPOINT must be an existing file" in error(*evaluate, weights="no.pth")
    assert "did you mean num_clips?" in error(*evaluate, "--cfg-options", "data.test.pipeline.1.num_clip=3")
    assert "the configuration must have data.test, got none" in error(*evaluate, "--cfg-options", "data.test=none")
    assert "--gpu-collect must be given on a machine with GPUs" in error(*evaluate, "--gpu-collect")
    assert "--tmpdir must be a writable folder, got" in error(*evaluate, "--tmpdir", folder / "my.py")
    for options, message in (
        (("topk",), "--eval-options must be topk=K,..., got 'topk'"),
        (("topl=1",), "got 'topl=1'; did you mean topk?"),
        (("topk=1,0",), "topk must be different whole numbers from 1 on, got [1, 0]"),
        (("topk=1.5",), "topk must be different whole numbers from 1 on, got 1.5"),
        (("topk=3", "--eval", "mean_class_accuracy"), "topk must come with --eval top_k_accuracy"),
    ):
        assert message in error(*evaluate, "--eval-options", *options)
    assert "--engine must be given without --no-engine" in error(*evaluate, "--engine", "--no-engine")
    assert "must hold all weights of the configured network" in error(
        *evaluate, "--cfg-options", "model.backbone.slow_pathway.lateral_norm=True"
    )
    assert "must hold all weights of the configured network" in error(
        *evaluate, "--cfg-options", "model.cls_head.num_classes=3"
    )
    assert "no/list.txt" in error(*evaluate, "--cfg-options", "data.test.ann_file=no/list.txt")


def test_too_little_memory_is_told_and_what_is_done_stays(folder, tmp_path, monkeypatch, capsys):
    def scarce(*arguments, **options):
        yield VideoScores(0, np.zeros(2, np.float32))
        raise torch.OutOfMemoryError

    monkeypatch.setattr(slowfast_ext.cli.test, "score_videos", scarce)
    assert _test(folder, "--out", tmp_path / "r.json") == 1
    assert "got too many at a time: --max-testing-views" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["r.json.part0"]


def test_a_test_without_out_goes_on_from_the_folder_of_tmpdir(folder, tmp_path, monkeypatch, capsys):
    asked = []

    def scores(engine, dataset, indices, **options):
        asked.append(indices)
        for index in indices:
            if len(asked) == 1 and index == 2:
                raise torch.OutOfMemoryError
            yield VideoScores(index, np.float32([1, 0]))

    monkeypatch.setattr(slowfast_ext.cli.test, "score_videos", scores)
    options = ("--eval", "top_k_accuracy", "--tmpdir", tmp_path / "new" / "parts")
    assert _test(folder, *options) == 1
    assert [path.name for path in (tmp_path / "new" / "parts").iterdir()] == ["scores.part0"]
    content = torch.load(folder / "weights.pth", weights_only=True)
    content["state_dict"]["cls_head.fc_cls.bias"] += 1
    torch.save(content, folder / "other.pth")
    (folder / "turned.txt").write_text("".join((folder / "val.txt").read_text().splitlines(keepends=True)[::-1]))
    for what, others, weights in (
        ("checkpoint", (), "other.pth"),
        ("list", ("--cfg-options", f"data.test.ann_file={folder / 'turned.txt'}"), "weights.pth"),
        ("clips", ("--cfg-options", "data.test.pipeline.1.out_of_bound_opt=repeat_last"), "weights.pth"),
        ("dtype", ("--dtype", "bfloat16"), "weights.pth"),
        ("engine", ("--no-engine",), "weights.pth"),
        ("network", ("--cfg-options", "model.cls_head.dropout_ratio=0.25"), "weights.pth"),
    ):
        assert _test(folder, *options, *others, weights=weights) == 2
        assert f"got one with another {what}; delete it" in capsys.readouterr().err
    assert _test(folder, *options) == 0
    assert asked == [[0, 1, 2, 3, 4], [2, 3, 4]]
    assert "top1_acc: 0.6000" in capsys.readouterr().out
    assert not list((tmp_path / "new" / "parts").iterdir())


def test_a_list_of_unreadable_videos_has_no_metrics(folder, tmp_path, capsys):
    (folder / "bad.txt").write_text("broken.mp4 0\n")
    listed = ("--cfg-options", f"data.test.ann_file={folder / 'bad.txt'}")
    assert _test(folder, "--out", tmp_path / "r.json", "--eval", "top_k_accuracy", *listed) == 1
    captured = capsys.readouterr()
    assert re.search("1 of 1 videos could not be read", captured.err)
    assert "acc" not in captured.out
