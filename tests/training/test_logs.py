import json

import pytest

from slowfast_ext.training.curves import read_curves
from slowfast_ext.training.distributed import Processes
from slowfast_ext.training.logs import RunLog, read_log

LINE = {"epoch": 1, "iter": 20, "lr": 0.1, "data_time": 0.25, "loss": 1.23456789, "memory": 812, "time": 0.5}


@pytest.fixture
def log(tmp_path):
    log = RunLog(tmp_path, Processes(), {"seed": 3})
    yield log
    log.close()


def test_a_line_of_training_has_the_time_to_the_end(log, tmp_path):
    log.train(LINE, 40, 3725.9, 20)
    text = next(tmp_path.glob("*.log")).read_text()
    expected = "lr: 1.000e-01, eta: 1:02:05, time: 0.500, data_time: 0.2500, loss: 1.2346, memory: 812"
    assert f"- INFO - Epoch [1][20/40]\t{expected}\n" in text
    assert read_log(next(tmp_path.glob("*.json")))[1] == {"mode": "train", **LINE, "loss": 1.23457}


def test_processes_other_than_the_main_one_write_nothing(tmp_path):
    log = RunLog(tmp_path, Processes(rank=1, world_size=2), {})
    log.info("hidden")
    log.train(LINE, 40, 1, 20)
    log.validation({"epoch": 1, "iter": 3, "lr": 0.1, "top1_acc": 0.5}, 20)
    log.progress(0, 1, 40, 0).update()
    log.close()
    assert not list(tmp_path.iterdir())


def test_a_log_that_cannot_be_written_is_told_once_and_ends_nothing(log, capsys, monkeypatch):
    class Full:
        def write(self, text):
            raise OSError("No space left on device")

        flush = close = lambda self: None

    log._json.close()
    monkeypatch.setattr(log, "_json", Full())
    for _ in range(2):
        log.train(LINE, 40, 1, 20)
    assert capsys.readouterr().err.count("the log cannot be written: No space left on device") == 1


def test_a_last_line_that_a_killed_run_left_incomplete_is_dropped(tmp_path):
    path = tmp_path / "x.log.json"
    path.write_text('{"mode": "train"}\n{"mode": "va')
    assert read_log(path) == [{"mode": "train"}]
    path.write_text('{"mode": "va\n{"mode": "train"}\n')
    with pytest.raises(ValueError, match="line 1 must be JSON"):
        read_log(path)


def test_curves_of_a_resumed_run_have_each_epoch_once(tmp_path):
    def write(name, *places):
        lines = [{"seed": 1}]
        for epoch, iteration, loss in places:
            lines.append({"mode": "train", "epoch": epoch, "iter": iteration, "lr": 0.1, "loss": loss})
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))

    write("1.log.json", (1, 2, 9.0), (1, 4, 8.0), (2, 2, 7.0), (2, 4, 6.0))
    write("2.log.json", (2, 2, 5.0), (2, 4, 4.0), (3, 2, 3.0))
    assert read_curves(tmp_path)["train/loss"] == ([0.5, 1.0, 1.5, 2.0, 2.5], [9.0, 8.0, 5.0, 4.0, 3.0])
