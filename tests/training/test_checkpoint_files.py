import os

import pytest
import torch

from slowfast_ext.training import checkpoint_files
from slowfast_ext.training.checkpoint_files import CheckpointFolder, read_sound, write_file


def _content(value=0.0):
    weights = {"weight": torch.full((1000,), value)}
    return {"meta": {"epoch": 1}, "state_dict": weights, "optimizer": {"state": {}}, "training": {"iteration": 3}}


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_read_back_and_latest_points_at_it(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save(_content(1), 1)
    folder.save(_content(2), 2)
    assert _names(tmp_path) == ["epoch_1.pth", "epoch_2.pth", "latest.pth"]
    assert os.readlink(tmp_path / "latest.pth") == "epoch_2.pth"
    assert read_sound(tmp_path / "latest.pth")["state_dict"]["weight"].eq(2).all()
    assert torch.load(tmp_path / "epoch_1.pth", weights_only=True)["training"] == {"iteration": 3}


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, full_disk):
    path = tmp_path / "file"
    write_file(path, b"old")
    with full_disk(), pytest.raises(OSError, match="No space left on device"):
        write_file(path, b"new, and longer")
    assert path.read_bytes() == b"old"
    assert _names(tmp_path) == ["file"]


def test_the_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls = []
    real = os.fsync, os.replace
    monkeypatch.setattr(checkpoint_files.os, "fsync", lambda fd: (calls.append("flush"), real[0](fd)))
    monkeypatch.setattr(checkpoint_files.os, "replace", lambda a, b: (calls.append("rename"), real[1](a, b)))
    write_file(tmp_path / "file", b"data")
    assert calls == ["flush", "rename", "flush"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "text"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path, damage):
    folder = CheckpointFolder(tmp_path)
    folder.save(_content(1), 1)
    path = folder.save(_content(2), 2)
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1  # among the weights, where only a checksum shows it
    path.write_bytes({"truncated": data[:-100], "empty": b"", "flipped": data, "text": b"not a checkpoint"}[damage])
    found, content, remarks = folder.newest_sound()
    assert found.name == "epoch_1.pth"
    assert content["state_dict"]["weight"].eq(1).all()
    assert len(remarks) == 1
    assert "epoch_2.pth' must be sound, got a truncated or damaged file" in remarks[0]


def test_a_checkpoint_of_something_else_is_told_from_one_of_a_run(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "epoch_1.pth")
    with pytest.raises(ValueError, match=r"must be of a training run of slowfast-ext.*--load-from"):
        read_sound(tmp_path / "epoch_1.pth")


def test_checkpoints_are_ordered_by_progress(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for name in (
        "epoch_9.pth",
        "epoch_10.pth",
        "epoch_10_iter_5.pth",
        "epoch_9_iter_70.pth",
        "best_top1_acc_epoch_11.pth",
    ):
        (tmp_path / name).write_bytes(b"")
    names = [candidate.path.name for candidate in folder.candidates()]
    assert names == ["epoch_10_iter_5.pth", "epoch_10.pth", "epoch_9_iter_70.pth", "epoch_9.pth"]


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    for name in (".epoch_1.pth.123.tmp", ".latest.123.tmp", ".hidden", "epoch_1.pth"):
        (tmp_path / name).write_bytes(b"")
    CheckpointFolder(tmp_path).remove_leftovers()
    assert _names(tmp_path) == [".hidden", "epoch_1.pth"]


def test_nothing_to_resume_from_is_no_error(tmp_path):
    assert CheckpointFolder(tmp_path).newest_sound() == (None, None, [])


def _saved(folder, *progress):
    for epochs, iterations in progress:
        folder.save(_content(), epochs, iterations)
    return [name for name in _names(folder.folder) if name != "latest.pth"]


def test_multiples_of_the_interval_stay_and_the_two_newest(tmp_path):
    names = _saved(CheckpointFolder(tmp_path, interval=3), *((epoch, 0) for epoch in range(1, 9)))
    assert names == ["epoch_3.pth", "epoch_6.pth", "epoch_7.pth", "epoch_8.pth"]


@pytest.mark.parametrize(
    ("keep", "expected"),
    [(1, ["epoch_5.pth"]), (2, ["epoch_4.pth", "epoch_5.pth"]), (-1, [f"epoch_{n}.pth" for n in range(1, 6)])],
)
def test_the_newest_are_kept(tmp_path, keep, expected):
    assert _saved(CheckpointFolder(tmp_path, keep=keep), *((epoch, 0) for epoch in range(1, 6))) == expected


def test_checkpoints_within_an_epoch_pass_away(tmp_path):
    folder = CheckpointFolder(tmp_path)
    assert _saved(folder, (0, 10), (0, 20), (0, 30)) == ["epoch_0_iter_20.pth", "epoch_0_iter_30.pth"]
    assert _saved(folder, (1, 0)) == ["epoch_1.pth"]
    assert _saved(folder, (1, 10)) == ["epoch_1.pth", "epoch_1_iter_10.pth"]


def test_the_best_replaces_the_best_of_its_metric(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save_best(_content(), "top1_acc", 1)
    folder.save_best(_content(), "top5_acc", 2)
    folder.save_best(_content(), "top1_acc", 3)
    assert _names(tmp_path) == ["best_top1_acc_epoch_3.pth", "best_top5_acc_epoch_2.pth"]
