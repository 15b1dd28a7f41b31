"""Runs that are ended at any moment and go on as if they had not been."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from run_synthetic import main
from synthetic import SOURCE, InProcessLoader, SyntheticDataset, small_configuration

import slowfast_ext
from slowfast_ext.evaluation import evaluate
from slowfast_ext.training import DataSource, RunOptions, TrainingError, train
from slowfast_ext.training.checkpoint_files import CheckpointFolder, read_sound
from slowfast_ext.training.logs import read_log

PROGRAM = Path(__file__).with_name("run_synthetic.py")
PACKAGE = Path(slowfast_ext.__file__).parents[1]
STEPS = 3 * 6 + 3 * 6  # batches of training and of validation in a run
OVERRIDES = ("optimizer.lr=0.02",)


def _start(work_dir, *overrides):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(PACKAGE), str(PROGRAM.parent)]),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), str(work_dir), *overrides],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def _kill_at(work_dir, batch, delay):
    """Kill a run some seconds after it has told of so many batches; its exit status."""
    run = _start(work_dir, *OVERRIDES)
    for line in run.stderr:
        batch -= line.startswith("batch")
        if batch == 0:
            time.sleep(delay)
            run.kill()
            break
    run.stderr.read()
    return run.wait(60)


def _final(work_dir):
    content = read_sound(work_dir / "epoch_3.pth")
    return content["state_dict"], content["optimizer"], content["training"]


def _assert_same_end(one, other):
    for expected, found in zip(_final(one), _final(other), strict=True):
        _assert_identical(expected, found)


def _assert_identical(expected, found):
    if isinstance(expected, torch.Tensor):
        assert expected.equal(found)
    elif isinstance(expected, dict):
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            _assert_identical(value, found[key])
    elif isinstance(expected, list | tuple):
        for one, other in zip(expected, found, strict=True):
            _assert_identical(one, other)
    else:
        assert expected == found


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What a run gives that nothing disturbs."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    threads = torch.get_num_threads()
    assert main(str(folder), *OVERRIDES) is None
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    return folder


def test_a_run_killed_at_random_steps_ends_with_the_same_bits(tmp_path, uninterrupted):
    for _ in range(2):
        moment = random.randrange(1, STEPS // 2), random.uniform(0, 0.04)  # a step takes about 0.03 s
        assert _kill_at(tmp_path, *moment) == -signal.SIGKILL, moment
    assert main(str(tmp_path), *OVERRIDES) is None
    _assert_same_end(uninterrupted, tmp_path)
    assert not list(tmp_path.glob(".*"))
    best = [path.name for path in tmp_path.glob("best_*")]
    assert best == [path.name for path in uninterrupted.glob("best_*")]


@pytest.mark.parametrize("position", [1, 4, 6])
def test_a_run_that_gets_sigterm_writes_a_checkpoint_and_goes_on_with_the_same_bits(tmp_path, uninterrupted, position):
    class Stopping(InProcessLoader):
        def __iter__(self):
            for number, batch in enumerate(super().__iter__(), start=1):
                if not self.dataset.test and self.dataset.epoch == 1 and number == position:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

    source = DataSource(SyntheticDataset, Stopping)
    assert main(str(tmp_path), *OVERRIDES, source=source) == signal.SIGTERM
    assert CheckpointFolder(tmp_path).candidates()[0].path.name == f"epoch_1_iter_{position}.pth"
    assert "stopped by SIGTERM; --resume-from auto goes on" in next(tmp_path.glob("*.log")).read_text()
    assert main(str(tmp_path), *OVERRIDES) is None
    _assert_same_end(uninterrupted, tmp_path)


def test_a_second_ctrl_c_does_not_wait_for_a_checkpoint(tmp_path):
    class Impatient(InProcessLoader):
        def __iter__(self):
            for batch in super().__iter__():
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
                yield batch

    source = DataSource(SyntheticDataset, Impatient)
    with pytest.raises(KeyboardInterrupt):
        train(small_configuration(), "small", RunOptions(str(tmp_path), seed=5), evaluate, source)
    assert not list(tmp_path.glob("*.pth"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_stopped_behind_a_validation_does_not_repeat_it(tmp_path):
    def metrics(*arguments):
        if not asked:
            asked.append(os.kill(os.getpid(), signal.SIGTERM))
        return evaluate(*arguments)

    asked, options = [], RunOptions(str(tmp_path), seed=5, resume_from="auto", validate=True)
    for stopped in (signal.SIGTERM, None):
        assert train(small_configuration(total_epochs=2), "small", options, metrics, SOURCE) == stopped
    entries = [entry for path in sorted(tmp_path.glob("*.json")) for entry in read_log(path)]
    assert [entry["epoch"] for entry in entries if entry.get("mode") == "val"] == [1, 2]


def test_a_run_that_accumulates_goes_on_at_an_update(tmp_path):
    class Stopping(InProcessLoader):
        def __iter__(self):
            for number, batch in enumerate(super().__iter__(), start=1):
                if number == 3:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

    config, options = small_configuration(total_epochs=1), {"work_dir": str(tmp_path), "seed": 5, "resume_from": "auto"}
    source = DataSource(SyntheticDataset, Stopping)
    assert train(config, "small", RunOptions(**options), evaluate, source) == signal.SIGTERM
    assert (tmp_path / "epoch_0_iter_3.pth").exists()
    train(config, "small", RunOptions(**options, accumulate=2), evaluate, SOURCE)
    assert "resumed after epoch 0, iteration 2 of the next" in "".join(
        path.read_text() for path in tmp_path.glob("*.log")
    )
    assert read_sound(tmp_path / "epoch_1.pth")["training"]["progress"]["iteration"] == 6


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before_with_a_warning(tmp_path, uninterrupted):
    assert main(str(tmp_path), *OVERRIDES, "total_epochs=2") is None
    newest = tmp_path / "epoch_2.pth"
    newest.write_bytes(newest.read_bytes()[:1000])
    # The cosine of another length would be another schedule; the first epoch of this test has no part in it.
    assert main(str(tmp_path), *OVERRIDES) is None
    text = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert "WARNING - train: checkpoint" in text
    assert "epoch_2.pth' must be sound, got a truncated or damaged file" in text
    assert f"going back to {tmp_path / 'epoch_1.pth'}" in text
    assert "the configuration differs from that of the run that wrote the checkpoint" in text
    _final(tmp_path)


def test_a_full_disk_is_told_and_the_run_goes_on(tmp_path, full_disk, capsys):
    """The work is in memory; the end of the run, without a checkpoint of it, is an error."""
    config = small_configuration(total_epochs=1)
    resumed = RunOptions(str(tmp_path), seed=5, resume_from="auto")
    train(config, "small", resumed, evaluate, SOURCE)
    before = (tmp_path / "epoch_1.pth").read_bytes()
    config["total_epochs"] = 2
    with contextlib.ExitStack() as later:

        class Filling(InProcessLoader):
            """The disk is full by the time of the first batch."""

            def __iter__(self):
                later.enter_context(full_disk())
                yield from super().__iter__()

        with pytest.raises(TrainingError, match="the last checkpoint must be written, got: No space left on device"):
            train(config, "small", resumed, evaluate, DataSource(SyntheticDataset, Filling))
    assert "No space left on device; the ones before are untouched" in capsys.readouterr().out
    assert (tmp_path / "epoch_1.pth").read_bytes() == before
    assert not (tmp_path / "epoch_2.pth").exists()
    assert not list(tmp_path.glob(".*"))
    train(config, "small", resumed, evaluate, SOURCE)
    assert (tmp_path / "epoch_2.pth").exists()


def test_a_folder_that_cannot_be_written_is_told_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    loaded = []
    source = DataSource(lambda *arguments: loaded.append(arguments), InProcessLoader)
    with pytest.raises(OSError, match="work_dir must be a writable folder"):
        train(small_configuration(), "small", RunOptions(str(tmp_path / "file" / "run")), evaluate, source)
    assert not loaded


def test_a_checkpoint_of_another_network_is_not_resumed(tmp_path):
    train(small_configuration(total_epochs=1), "small", RunOptions(str(tmp_path), seed=1), evaluate, SOURCE)
    config = small_configuration(total_epochs=1)
    config["model"]["cls_head"]["num_classes"] = 4
    with pytest.raises(ValueError, match="must be of the configuration's network, got another one; --load-from"):
        train(config, "small", RunOptions(str(tmp_path), resume_from="auto"), evaluate, SOURCE)


def test_a_run_without_a_seed_goes_on_with_the_one_it_had(tmp_path):
    options = RunOptions(str(tmp_path / "run"), resume_from="auto")
    config = small_configuration(total_epochs=2)
    train(config, "small", options, evaluate, SOURCE)
    (tmp_path / "run" / "epoch_2.pth").rename(tmp_path / "expected.pth")
    train(config, "small", options, evaluate, SOURCE)
    expected, found = read_sound(tmp_path / "expected.pth"), read_sound(tmp_path / "run" / "epoch_2.pth")
    assert found["meta"]["seed"] == expected["meta"]["seed"]
    _assert_identical(expected["state_dict"], found["state_dict"])


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    options = RunOptions(str(tmp_path), seed=1, resume_from="auto")
    train(small_configuration(total_epochs=1), "small", options, evaluate, SOURCE)
    content = read_sound(tmp_path / "epoch_1.pth")
    training = content["training"]
    training["progress"].update(epoch=0, position=2, iteration=2)  # of two processes, which share an epoch
    training["random_states"] *= 2
    torch.save(content, tmp_path / "epoch_0_iter_2.pth")
    (tmp_path / "epoch_1.pth").unlink()
    train(small_configuration(total_epochs=1), "small", options, evaluate, SOURCE)
    text = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert "the checkpoint is of 2 processes, this run has 1: iterations are converted" in text
    assert "resumed after epoch 0, iteration 4 of the next" in text
    assert read_sound(tmp_path / "epoch_1.pth")["training"]["progress"]["iteration"] == 6


def test_the_logs_of_a_resumed_run_go_on_where_it_was(tmp_path):
    options = RunOptions(str(tmp_path / "run"), seed=1, resume_from="auto")
    train(small_configuration(total_epochs=1), "small", options, evaluate, SOURCE)
    train(small_configuration(total_epochs=2), "small", options, evaluate, SOURCE)
    entries = [entry for path in sorted((tmp_path / "run").glob("*.json")) for entry in read_log(path)]
    places = [(entry["epoch"], entry["iter"]) for entry in entries if entry.get("mode") == "train"]
    assert places == [(epoch, iteration) for epoch in (1, 2) for iteration in (2, 4, 6)]
