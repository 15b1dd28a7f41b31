"""Two processes with gloo, as torchrun starts them, against one process on the concatenated batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from run_synthetic import main

import slowfast_ext
from slowfast_ext.training import distributed
from slowfast_ext.training.checkpoint_files import CheckpointFolder, read_sound
from slowfast_ext.training.distributed import start_processes
from slowfast_ext.training.logs import read_log

PROGRAM = Path(__file__).with_name("run_synthetic.py")
PACKAGE = Path(slowfast_ext.__file__).parents[1]
# Dropout draws other numbers in each process. A small rate keeps float32 from drifting apart.
COMMON = ("model.cls_head.dropout_ratio=0.0", "optimizer.lr=0.01", "total_epochs=2")


def _start(work_dir, *arguments, **environment):
    """Two processes, with the variables that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(PACKAGE), str(PROGRAM.parent)]),
        "OMP_NUM_THREADS": "1",
        "TORCHELASTIC_RUN_ID": "test",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **environment,
    }
    return [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(work_dir), *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**common, "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in ("0", "1")
    ]


def _finish(processes, status=0):
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == status, errors[-3000:]


def _logged(work_dir, mode, *names):
    lines = read_log(next(work_dir.glob("*.log.json")))
    return [[line[name] for name in names] for line in lines if line.get("mode") == mode]


def _assert_same_weights(one, other):
    """Six updates in float32; sums over the batch run in another order."""
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(other["state_dict"][name], value, rtol=1e-4, atol=2e-5, msg=name)


@pytest.fixture
def one_process(tmp_path):
    def run(*overrides):
        threads = torch.get_num_threads()
        assert main(str(tmp_path / "one"), *COMMON, "data.videos_per_gpu=4", *overrides) is None
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
        return read_sound(tmp_path / "one" / "epoch_2.pth")

    return run


@pytest.mark.parametrize("blocks", [(), ("--accelerate",)], ids=["plain", "fused"])
def test_synchronised_batch_norm_in_two_processes_is_one_process_on_both_batches(blocks, tmp_path, one_process):
    run = _start(tmp_path / "two", "--sync-bn", *blocks, *COMMON, "evaluation.gpu_collect=True")
    expected = one_process()
    _finish(run)
    found = read_sound(tmp_path / "two" / "epoch_2.pth")
    _assert_same_weights(expected, found)
    one, two = (
        _logged(tmp_path / folder, "val", "epoch", "top1_acc", "mean_class_accuracy") for folder in ("one", "two")
    )
    assert one == two
    for name in ("loss", "top1_acc", "grad_norm"):  # of the whole batch, whichever process has it
        one, two = (_logged(tmp_path / folder, "train", name) for folder in ("one", "two"))
        assert np.allclose(one, two, rtol=1e-3, atol=1e-4)
        assert one
    assert found["training"]["progress"]["iteration"] == 6
    one, other = found["training"]["random_states"]
    assert one["torch"].equal(other["torch"])


@pytest.mark.parametrize("blocks", [(), ("--accelerate",)], ids=["plain", "fused"])
def test_batch_norm_in_two_processes_is_sub_batch_norm_in_one_also_after_a_stop(blocks, tmp_path, one_process):
    """SIGTERM to one of them stops both, at the same step; then they go on."""
    arguments = (tmp_path / "two", "--diff-seed", *blocks, *COMMON, "evaluation.start=9")
    run = _start(*arguments, STOP_RANK="1")
    expected = one_process(
        "model.backbone.norm_cfg.type=SubBatchBN3d", "model.backbone.norm_cfg.num_splits=2", "evaluation.start=9"
    )
    _finish(run, status=7)
    assert CheckpointFolder(tmp_path / "two").candidates()[0].path.name == "epoch_1_iter_1.pth"
    _finish(_start(*arguments))
    found = read_sound(tmp_path / "two" / "epoch_2.pth")
    # The statistics of the main process are those of the first part; weights are one.
    for name, (mean, variance) in expected["training"]["split_statistics"].items():
        channels = mean.numel() // 2
        expected["state_dict"][f"{name}.running_mean"] = mean[:channels]
        expected["state_dict"][f"{name}.running_var"] = variance[:channels]
    _assert_same_weights(expected, found)
    one, other = found["training"]["random_states"]
    assert not one["torch"].equal(other["torch"])


def test_a_seed_that_nobody_gave_is_the_main_process_s():
    class Other(distributed.Processes):
        def from_main(self, value):
            return 7

    assert distributed.choose_seed(None, Other()) == 7
    assert distributed.choose_seed(3, distributed.Processes()) == 3


@pytest.mark.parametrize("through_gpus", [False, True])
def test_large_values_travel_through_the_group_of_the_devices_where_that_is_wanted(monkeypatch, through_gpus):
    def all_gather(values, value, group):
        values[:] = [value, group]

    monkeypatch.setattr(distributed.dist, "all_gather_object", all_gather)
    processes = distributed.Processes(world_size=2, control="control")
    assert processes.gather(7, through_gpus=through_gpus) == [7, None if through_gpus else "control"]


def test_a_launcher_whose_variables_are_missing_is_told(monkeypatch):
    for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for launcher, name in (("pytorch", "RANK"), ("slurm", "SLURM_PROCID"), ("mpi", "OMPI_COMM_WORLD_RANK")):
        with pytest.raises(ValueError, match=f"--launcher {launcher}: the environment must have .*{name}"):
            start_processes(launcher)


def test_processes_of_torchrun_do_not_train_each_by_itself(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--launcher must be pytorch under torchrun, got none"):
        start_processes("none")
