"""The processes of a run, and what they tell each other."""

from __future__ import annotations

import os
import random
import subprocess
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

LAUNCHERS = ("none", "pytorch", "slurm", "mpi")


@dataclass(frozen=True)
class Processes:
    """This process among those of the run. Without a launcher it is the only one.

    Args:
        rank, world_size: over all machines.
        local_rank: on this machine; the number of its GPU.
        device: where its network lives.
        control: group for messages that must not wait for the device; ``None`` for a single process.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    control: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any, *, through_gpus: bool = False) -> list[Any]:
        """``value`` of every process, by rank, in every process. Plain objects only: it travels pickled.

        Args:
            through_gpus: over the links between GPUs where there are GPUs, which pays for large values and takes memory
                of theirs.
        """
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=None if through_gpus else self.control)
        return values

    def from_main(self, value: Any) -> Any:
        """The main process's ``value``, in every process."""
        if self.control is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def maximum(self, value: int) -> int:
        """The largest ``value`` of any process."""
        if self.control is None:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return int(tensor)

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """Mean over the processes, in place."""
        if self.control is not None:
            dist.all_reduce(tensor)
            tensor /= self.world_size
        return tensor

    def close(self) -> None:
        if self.control is not None:
            dist.destroy_process_group()


def start_processes(launcher: str | None) -> Processes:
    """Join the other processes of the run: NCCL where there are GPUs, one each, else gloo.

    Args:
        launcher: who started this process, and hence where it is said who it is. ``pytorch``: ``torchrun``; ``slurm``:
            ``srun``; ``mpi``: Open MPI; ``none``: nobody. ``None``: ``pytorch`` under ``torchrun``, else ``none``.

    Raises:
        ValueError: the launcher's environment variables are not there, or there are fewer GPUs than processes.
    """
    if launcher is None:
        launcher = "pytorch" if under_torchrun() else "none"
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if launcher == "none":
        if under_torchrun() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("--launcher must be pytorch under torchrun, got none: each process would train by itself")
        return Processes(device=torch.device("cuda", 0) if gpus else torch.device("cpu"))
    rank, world_size, local_rank = _READERS[launcher]()
    if gpus and local_rank >= gpus:
        raise ValueError(f"--launcher: processes on a machine must be at most its {gpus} GPUs, got number {local_rank}")
    device = torch.device("cuda", local_rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", rank=rank, world_size=world_size, device_id=device)
    else:
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
    return Processes(rank, world_size, local_rank, device, dist.new_group(backend="gloo"))


def under_torchrun() -> bool:
    """Whether ``torchrun``, or ``torch.distributed.launch``, started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def choose_seed(seed: int | None, processes: Processes) -> int:
    """``seed``, or a random one of 31 bits that all processes share."""
    return processes.from_main(random.SystemRandom().randrange(2**31) if seed is None else seed)


def _from_torchrun() -> tuple[int, int, int]:
    _require("pytorch", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])


def _from_slurm() -> tuple[int, int, int]:
    _require("slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_NODELIST")
    if "MASTER_ADDR" not in os.environ:
        nodes = os.environ["SLURM_STEP_NODELIST"]
        answer = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
        if answer.returncode or not answer.stdout.split():
            raise ValueError(
                f"--launcher slurm: scontrol must name the hosts of {nodes}, got {answer.stderr.strip()!r}"
            )
        os.environ["MASTER_ADDR"] = answer.stdout.split()[0]
    os.environ.setdefault("MASTER_PORT", "29500")
    return int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_LOCALID"])


def _from_mpi() -> tuple[int, int, int]:
    names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
    _require("mpi", *names, "MASTER_ADDR")
    os.environ.setdefault("MASTER_PORT", "29500")
    return tuple(int(os.environ[name]) for name in names)


def _require(launcher: str, *names: str) -> None:
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise ValueError(f"--launcher {launcher}: the environment must have {', '.join(names)}, got none of {missing}")


_READERS = {"pytorch": _from_torchrun, "slurm": _from_slurm, "mpi": _from_mpi}
