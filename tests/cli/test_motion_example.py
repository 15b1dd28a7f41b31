"""``examples/motion`` as a user runs it: videos are written, a network learns them, is tested, and labels one."""

import json
import subprocess
import sys
from pathlib import Path

import av
import pytest
import torch

from slowfast_ext.cli import main
from slowfast_ext.data import read_annotations

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "motion"


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
    config = str(EXAMPLE / "slowfast_motion.py")
    shorter = ("total_epochs=6", "lr_config.warmup_iters=8", "evaluation.interval=3")
    assert main(["train", config, "--work-dir", "run", "--validate", "--seed", "0", "--cfg-options", *shorter]) == 0
    capsys.readouterr()
    assert main(["test", config, "run/latest.pth", "--eval", "top_k_accuracy", "--out", "result.json"]) == 0
    metrics = dict(line.split(": ") for line in capsys.readouterr().out.splitlines() if "_acc" in line)
    assert float(metrics["top1_acc"]) > 0.6
    results = json.loads(Path("result.json").read_text())
    assert len(results) == 48

    arguments = ["--checkpoint", "run/latest.pth", "--labels", "data/motion/labels.txt", "--json", "labels.json"]
    assert main(["predict", "data/motion/val/0000_4.mp4", *arguments]) == 0
    best = json.loads(Path("labels.json").read_text())["videos"][0]["predictions"][0]
    assert results[4].index(max(results[4])) == best["index"]
    assert best["probability"] == pytest.approx(max(results[4]), abs=1e-4)
