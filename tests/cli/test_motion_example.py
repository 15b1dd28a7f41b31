"""``examples/motion`` as a user runs it: videos are written, a network learns them, is tested, and labels one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import pytest
import torch

import slowfast_ext
from slowfast_ext.cli import main
from slowfast_ext.data import read_annotations
from slowfast_ext.training.logs import read_log

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "motion"
CONFIG = str(EXAMPLE / "slowfast_motion.py")


@pytest.fixture
def one_thread():
    """Threads that wait for each other on busy processors make a network of this size many times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with ``data/motion`` in it, smaller than the example's own."""
    folder = tmp_path_factory.mktemp("motion")
    command = [sys.executable, EXAMPLE / "make_videos.py", "data/motion", "--train", "32", "--val", "8"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return folder


def test_both_forms_of_the_lists_name_the_same_videos(folder):
    data = folder / "data" / "motion"
    labels = (data / "labels.txt").read_text().splitlines()
    for subset, videos in (("train", 32), ("val", 8)):
        text, objects = (read_annotations(data / f"{subset}{suffix}") for suffix in (".txt", ".json"))
        assert [(entry.path, entry.labels) for entry in text] == [(entry.path, entry.labels) for entry in objects]
        assert len(text) == videos * len(labels)
        assert {label for entry in text for label in entry.labels} == set(range(len(labels)))
    with av.open(str(data / text[0].path)) as video:
        assert (video.streams.video[0].codec_context.name, video.streams.video[0].frames) == ("h264", 24)


def test_a_small_network_learns_motion_from_scratch(folder, one_thread, monkeypatch, capsys):
    """In six epochs of twelve batches far above chance, one in six; the example itself goes on for longer."""
    monkeypatch.chdir(folder)
    shorter = ("total_epochs=6", "lr_config.warmup_iters=8", "evaluation.interval=3")
    assert main(["train", CONFIG, "--work-dir", "run", "--validate", "--seed", "0", "--cfg-options", *shorter]) == 0
    capsys.readouterr()
    assert main(["test", CONFIG, "run/latest.pth", "--eval", "top_k_accuracy", "--out", "result.json"]) == 0
    metrics = dict(line.split(": ") for line in capsys.readouterr().out.splitlines() if "_acc" in line)
    assert float(metrics["top1_acc"]) > 0.6
    results = json.loads(Path("result.json").read_text())
    assert len(results) == 48

    arguments = ["--checkpoint", "run/latest.pth", "--labels", "data/motion/labels.txt", "--json", "labels.json"]
    assert main(["predict", "data/motion/val/0000_4.mp4", *arguments]) == 0
    best = json.loads(Path("labels.json").read_text())["videos"][0]["predictions"][0]
    assert results[4].index(max(results[4])) == best["index"]
    assert best["probability"] == pytest.approx(max(results[4]), abs=1e-4)


def test_two_processes_learn_what_one_does(folder, one_thread, monkeypatch):
    """Half of each batch in each process; without dropout, whose draws are each process's own."""
    monkeypatch.chdir(folder)
    for subset, videos in (("train", 96), ("val", 24)):
        lines = Path(f"data/motion/{subset}.txt").read_text().splitlines(keepends=True)
        Path(f"{subset}.txt").write_text("".join(lines[:videos]))
    shorter = ("total_epochs=2", "log_config.interval=1", "evaluation.interval=2", "model.cls_head.dropout_ratio=0.0",
               "data.train.ann_file=train.txt", "data.val.ann_file=val.txt")  # fmt: skip

    def command(work_dir, *overrides):
        return ["train", CONFIG, "--work-dir", work_dir, "--validate", "--seed", "0", "--cfg-options", *overrides]

    assert main(command("one", *shorter)) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += ["-m", "slowfast_ext", *command("two", *shorter, "data.videos_per_gpu=8"), "--sync-bn"]
    package = str(Path(slowfast_ext.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]

    one, two = (read_log(next(Path(work_dir).glob("*.log.json"))) for work_dir in ("one", "two"))
    steps, validation = one[1:-1], one[-1]
    assert [(line["epoch"], line["iter"], line["lr"]) for line in two[1:]] == [
        (line["epoch"], line["iter"], line["lr"]) for line in one[1:]
    ]
    # The losses of two batches are 0.05 apart, those of the same one, after 11 updates in float32, below 0.001.
    assert [line["loss"] for line in two[1:-1]] == pytest.approx([line["loss"] for line in steps], abs=2e-3)
    assert len(steps) == 12
    assert two[-1]["mode"] == "val"
    assert two[-1]["top1_acc"] == pytest.approx(validation["top1_acc"], abs=1.01 / 24)  # one video may be on the edge
