"""``slowfast-ext train`` on real files: lists, decoding processes, checkpoints, logs."""

import json
import multiprocessing
import re
import shutil
import signal

import pytest
import torch
from sample_videos import write_video
from small_recipe import CONFIG

import slowfast_ext
from slowfast_ext.cli import main
from slowfast_ext.cli.configuration import resolve
from slowfast_ext.training import format_config, read_config
from slowfast_ext.training.step import TrainingStep


@pytest.fixture
def folder(tmp_path):
    """Two classes of videos, one of which is broken, and a configuration."""
    for index in range(5):
        write_video(tmp_path / f"{index}.mp4", 12)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "train.txt").write_text("".join(f"{index}.mp4 {index % 2}\n" for index in range(5)) + "broken.mp4 1\n")
    (tmp_path / "val.txt").write_text("0.mp4 0\nbroken.mp4 0\n1.mp4 1\n")
    (tmp_path / "my.py").write_text(CONFIG.replace("ROOT", str(tmp_path)))
    return tmp_path


def _train(folder, *arguments):
    return main(["train", str(folder / "my.py"), "--work-dir", str(folder / "run"), *arguments])


def _lines(folder):
    paths = sorted((folder / "run").glob("*.log.json"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def test_real_videos_are_trained_on_and_validated(folder):
    try:
        assert (
            _train(folder, "--validate", "--seed", "1", "--deterministic", "--cfg-options", "log_config.interval=1")
            == 0
        )
    finally:
        torch.use_deterministic_algorithms(False)
    lines = _lines(folder)
    assert [(line["epoch"], line["iter"]) for line in lines if line.get("mode") == "train"] == [
        (epoch, iteration) for epoch in (1, 2) for iteration in (1, 2, 3)
    ]
    assert [line["epoch"] for line in lines if line.get("mode") == "val"] == [1, 2]
    text = next((folder / "run").glob("*.log")).read_text()
    assert re.search(r"WARNING - cannot read '.*broken\.mp4': .*; another video takes its place", text)
    assert "1 videos cannot be read and are left out" in text
    assert read_config(folder / "run" / "my.py")["log_config"] == {"interval": 1}
    # What was written is a whole configuration of its own, and the checkpoint a whole network.
    assert main(["train", str(folder / "run" / "my.py"), "--work-dir", str(folder / "again"), "--resume-from",
                 str(folder / "run" / "epoch_2.pth")]) == 0  # fmt: skip
    model = slowfast_ext.load_checkpoint(folder / "run" / "latest.pth")
    assert model.config.num_classes == 2


def test_the_last_and_the_best_weights_are_tested_when_training_is_done(folder, capsys):
    """``best`` are those of the first epoch: the second, with a rate of nearly 0, can only be equal."""
    (folder / "val.txt").write_text("0.mp4 0\n1.mp4 1\n")
    options = ("--validate", "--seed", "1", "--test-last", "--test-best")
    assert _train(folder, *options, "--cfg-options", "lr_config.policy=step", "lr_config.step=[1]",
                  "lr_config.gamma=1e-9") == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert re.findall("test of .*/run/(.*)", printed) == ["epoch_2.pth", "best_top1_acc_epoch_1.pth"]
    assert printed.count("mean_class_accuracy: ") >= 2
    again = folder / "again.pkl"
    for what, checkpoint in (("last", "epoch_2.pth"), ("best", "best_top1_acc_epoch_1.pth")):
        assert main(["test", str(folder / "my.py"), str(folder / "run" / checkpoint), "--out", str(again)]) == 0
        assert again.read_bytes() == (folder / "run" / f"{what}_pred.pkl").read_bytes()


def test_a_loader_process_that_dies_changes_nothing(folder, monkeypatch):
    """Its videos are read again by another process; the weights are those of a run in which it lived."""
    step, killed = TrainingStep.__call__, []

    def kill_and_step(self, *arguments, **options):
        if not killed:  # one, once: a video whose second try fails as well would be replaced by another
            killed.append(multiprocessing.active_children()[0])
            killed[0].kill()
        return step(self, *arguments, **options)

    options = ("--seed", "1", "--deterministic", "--cfg-options", "data.workers_per_gpu=2")
    weights = []
    try:
        for patched in (False, True):
            if patched:
                monkeypatch.setattr(TrainingStep, "__call__", kill_and_step)
            shutil.rmtree(folder / "run", ignore_errors=True)
            assert _train(folder, *options) == 0
            weights.append(torch.load(folder / "run" / "epoch_2.pth", weights_only=True)["state_dict"])
    finally:
        torch.use_deterministic_algorithms(False)
    assert killed
    assert all(value.equal(weights[1][name]) for name, value in weights[0].items())


def _error(capsys, folder, *arguments):
    assert _train(folder, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err


def test_wrong_arguments_are_one_line_before_any_work(folder, capsys):
    assert "did you mean momentum?" in _error(capsys, folder, "--cfg-options", "optimizer.momentun=0.9")
    assert "must be KEY=VALUE" in _error(capsys, folder, "--cfg-options", "lr")
    assert "--resume-from must be auto or an existing file" in _error(capsys, folder, "--resume-from", "no.pth")
    assert "--launcher pytorch: the environment must have" in _error(capsys, folder, "--launcher", "pytorch")
    assert "--test-best must be given with --validate" in _error(capsys, folder, "--test-best")
    assert "must have data.test, got none" in _error(capsys, folder, "--test-last", "--cfg-options", "data.test=none")
    assert not (folder / "run").exists()
    (folder / "train.txt").write_text("0.mp4 0\n1.mp4 2\n")
    assert f"{folder / 'train.txt'}, line 2: label must be in [0, 2), got 2" in _error(capsys, folder)
    (folder / "train.txt").write_text("\n")
    assert "the list must name at least one video" in _error(capsys, folder)
    assert main(["train", "slowfast_r50_4x16"]) == 2
    assert re.search("did you mean .*slowfast_r50_4x16x1_256e_kinetics400_rgb", capsys.readouterr().err)


def test_a_run_that_cannot_go_on_ends_with_status_one(folder, capsys):
    for index in range(5):
        (folder / f"{index}.mp4").unlink()
    assert _train(folder) == 1
    assert "the loader must give a batch, got an error: " in capsys.readouterr().err


@pytest.mark.parametrize(("stopped", "status"), [(None, 0), (signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_the_exit_status_says_how_a_run_ended(folder, monkeypatch, stopped, status):
    monkeypatch.setattr(slowfast_ext.cli.train, "train", lambda *arguments, **options: stopped)
    assert _train(folder) == status


def test_the_weights_that_a_recipe_begins_with_are_named(capsys):
    assert main(["train", "slowfast_r50_16x8x1_22e_sthv1_rgb", "--resume-from", "no.pth"]) == 2
    assert "began with" not in capsys.readouterr().err
    assert main(["train", "slowfast_r50_16x8x1_22e_sthv1_rgb", "--accumulate", "0"]) == 2
    expected = "the published run began with the weights of slowfast_r50_8x8x1_256e_kinetics400_rgb: --load-from FILE"
    assert expected in capsys.readouterr().err


def test_a_path_into_mmaction2_that_does_not_exist_stands_for_the_zoo():
    name = "slowfast_r50_4x16x1_256e_kinetics400_rgb"
    config, found = resolve(f"configs/recognition/slowfast/{name}.py", ["data.videos_per_gpu=4"])
    assert found == name
    assert config["data"]["videos_per_gpu"] == 4
    assert "videos_per_gpu=4" in format_config(config)


def test_fused_blocks_are_trained_on_request_and_their_checkpoint_is_anybodys(folder):
    assert _train(folder, "--seed", "1", "--accelerate", "--amp", "bf16", "--validate") == 0
    text = next((folder / "run").glob("*.log")).read_text()
    assert re.search(r"accelerated: (\d+) of \1 candidates fused; operators run in", text)
    assert [line["epoch"] for line in _lines(folder) if line.get("mode") == "val"] == [1, 2]
    # Plain blocks go on where they stopped.
    assert _train(folder, "--resume-from", "auto", "--cfg-options", "total_epochs=3") == 0
    assert _lines(folder)[-1]["epoch"] == 3
