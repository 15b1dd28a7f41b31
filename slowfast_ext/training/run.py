"""A training run from its configuration: everything that is checked and made before the first step."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import signal
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..accelerate import accelerate, explain
from ..checkpoints import load_checkpoint
from ..checkpoints.read import read_checkpoint
from ..checkpoints.settings import CONFIG_ENTRY
from ..models import build_model, inflate_from_2d
from .batch_norm import convert_batch_norm
from .batches import DataSource, TrainingBatches
from .checkpoint_files import CheckpointFolder, read_sound, write_file
from .compilation import compile_network, require_compiler
from .config_file import format_config
from .curves import plot_curves, require_matplotlib
from .distributed import Processes, choose_seed, start_processes
from .logs import RunLog
from .loop import Trainer, epochs_of
from .multigrid import long_cycle
from .randomness import seed_everything, use_deterministic_algorithms
from .schedules import LearningRate
from .settings import LoaderSettings, TrainingSettings, read_settings
from .step import TrainingStep
from .validation import Validation


@dataclass(frozen=True)
class RunOptions:
    """What the command line says about a run. Where the configuration has a key of the same name, this counts.

    Args:
        work_dir: folder of all results; by default the configuration's, else ``work_dirs/<name of the configuration>``.
        resume_from: checkpoint of a run to go on with, or ``auto`` for the newest sound one in ``work_dir``, if any.
        load_from: checkpoint whose weights the run starts from.
        validate: validate as the configuration says.
        seed: of all random numbers; by default a random one.
        diff_seed: another seed in each process.
        deterministic: the same numbers from the same seed, at some cost in speed.
        launcher: see :func:`start_processes`.
        amp: see :class:`TrainingStep`.
        accumulate: batches an update.
        scale_lr: multiply the learning rate by the videos of an update over ``auto_scale_lr.base_batch_size``.
        sync_bn: batch statistics over all processes.
        accelerate: train the fused blocks, see :func:`slowfast_ext.accelerate`.
        compile: mode of :func:`torch.compile` for the training passes, one of ``COMPILE_MODES``.
        plot: draw ``curves.png`` at the end.
    """

    work_dir: str | None = None
    resume_from: str | None = None
    load_from: str | None = None
    validate: bool = False
    seed: int | None = None
    diff_seed: bool = False
    deterministic: bool = False
    launcher: str | None = None
    amp: str | None = None
    accumulate: int = 1
    scale_lr: bool = False
    sync_bn: bool = False
    accelerate: bool = False
    compile: str | None = None
    plot: bool = False


def train(
    config: dict[str, Any],
    name: str,
    options: RunOptions,
    metrics: Callable[[Tensor, Tensor, Sequence[str]], dict[str, float]],
    source: DataSource | None = None,
    finish: Callable[[Processes, Path], None] | None = None,
) -> signal.Signals | None:
    """Train a network.

    Args:
        config: with mmaction2's keys, see :func:`read_settings`.
        name: of the configuration, which is written to ``<name>.py`` in the folder of the run.
        options: see there.
        metrics: scores, labels and names of metrics to values; the validation's.
        source: of samples and batches.
        finish: what all processes do together when the last epoch is done; called with them and the folder of the run.

    Returns:
        ``None`` when the last epoch is done; the signal that stopped the run before, after a checkpoint.

    Raises:
        ValueError, OSError, ImportError: something is wrong, before any work.
        TrainingError: the run could not go on.
    """
    source = source or DataSource()
    settings = read_settings(config)
    options = _with_config(options, settings)
    _check(options, settings)
    processes = start_processes(options.launcher)
    if options.compile:
        require_compiler(processes.device)
    work_dir = Path(options.work_dir or Path("work_dirs") / name)
    if processes.is_main:
        prepare_folder(work_dir)
        write_file(work_dir / f"{name}.py", format_config(config).encode())
    if options.deterministic:
        use_deterministic_algorithms()
    elif settings.cudnn_benchmark:
        torch.backends.cudnn.benchmark = True
    checkpoints = CheckpointFolder(work_dir, settings.checkpoint.interval, settings.checkpoint.keep)
    # Read by one process for all: the folder may be on its machine only, and damage must be judged once.
    resumed, remarks = processes.from_main(_resumed(options.resume_from, checkpoints) if processes.is_main else None)
    if options.seed is None and resumed is not None:
        options = dataclasses.replace(options, seed=resumed["meta"]["seed"])
    meta = _meta(config, name, settings, choose_seed(options.seed, processes), work_dir)
    log = RunLog(work_dir, processes, meta, settings.tensorboard)
    try:
        for remark in remarks:
            log.warning(remark)
        stopped = _train(settings, options, metrics, source, processes, checkpoints, resumed, meta, log)
    finally:
        log.close()
    if finish is not None and stopped is None:
        finish(processes, work_dir)
    processes.close()  # not after an error: the others may be waiting for this one, and it for them
    return stopped


def prepare_folder(folder: Path) -> None:
    """Make the folder of a run and see that it can be written.

    Raises:
        OSError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        raise type(error)(f"train: work_dir must be a writable folder, got '{folder}': {error.strerror}") from error


def _train(
    settings: TrainingSettings,
    options: RunOptions,
    metrics: Callable[[Tensor, Tensor, Sequence[str]], dict[str, float]],
    source: DataSource,
    processes: Processes,
    checkpoints: CheckpointFolder,
    resumed: dict[str, Any] | None,
    meta: dict[str, Any],
    log: RunLog,
) -> signal.Signals | None:
    seed, work_dir = meta["seed"], checkpoints.folder
    log.info(f"{processes.world_size} process(es) on {processes.device.type}, seed {seed}, work_dir {work_dir}")
    # The network and what is loaded into it are the same in all processes; afterwards their random numbers may differ.
    seed_everything(seed)
    model = build_model(settings.model.network)
    if resumed is None:
        _load_weights(model, settings, options.load_from, log)
    model = model.to(processes.device)
    norm = "sync" if options.sync_bn else settings.model.norm
    model = convert_batch_norm(model, norm, settings.model.norm_splits)
    if options.accelerate:
        model = accelerate(model.to(memory_format=torch.channels_last_3d), mode="training")
        log.info(f"accelerated: {explain(model).summary}")

    settings = _with_scaled_rate(settings, options, processes, log)
    multigrid, schedule = settings.multigrid, settings.schedule
    phases = ()
    if multigrid:
        frames = settings.train.clip.sampling.clip_len
        phases = long_cycle(multigrid, frames, settings.epochs, schedule.steps, schedule.gamma)
    batches = TrainingBatches(source, settings, processes, seed, phases)
    for epoch in [phase.start for phase in phases if phase.start < phase.end] or [0]:
        batches.count(epoch)
    precise_batches = _precise_batches(settings, source, processes, seed)
    validation = Validation(source, settings, processes) if options.validate else None

    network = compile_network(model, options.compile) if options.compile else model
    if processes.control is not None:
        device_ids = [processes.device.index] if processes.device.type == "cuda" else None
        network = DistributedDataParallel(network, device_ids=device_ids)
        # Each process keeps its own batch statistics. As an argument this has another name in each version of torch.
        network.broadcast_buffers = False
    step = TrainingStep(
        network,
        settings.optimizer,
        settings.model.network.normalization,
        settings.model.label_smoothing,
        options.amp,
    )
    trainer = Trainer(
        model,
        step,
        batches,
        LearningRate(settings.optimizer, schedule, settings.epochs, phases),
        log,
        checkpoints,
        settings,
        epochs_of(settings),
        processes,
        meta,
        accumulate=options.accumulate,
        precise_batches=precise_batches,
        validation=validation,
        metrics=lambda scores, labels: metrics(scores, labels, settings.evaluation.metrics),
    )
    seed_everything(seed + processes.rank if options.diff_seed else seed)
    try:
        if resumed is not None:
            _warn_of_changes(resumed["meta"], meta, log)
            for remark in trainer.load_state(resumed):
                log.warning(remark)
            progress = trainer.progress
            log.info(f"resumed after epoch {progress.epoch}, iteration {progress.position} of the next")
        stopped = trainer.run()
    finally:
        for part in (batches, precise_batches, validation):
            if part is not None:
                part.close()
    if options.plot and processes.is_main:
        plot_curves(work_dir, work_dir / "curves.png")
        log.info(f"curves: {work_dir / 'curves.png'}")
    return stopped


def _with_config(options: RunOptions, settings: TrainingSettings) -> RunOptions:
    """The options, with what only the configuration says."""
    fields = {name: getattr(options, name) for name in ("work_dir", "resume_from", "load_from", "seed")}
    return dataclasses.replace(
        options, **{name: getattr(settings, name) if value is None else value for name, value in fields.items()}
    )


def _check(options: RunOptions, settings: TrainingSettings) -> None:
    """What can be known to be wrong before anything is made."""
    if options.accumulate < 1:
        raise ValueError(f"--accumulate must be at least 1, got {options.accumulate}")
    if options.compile == "reduce-overhead" and options.accumulate > 1:
        raise ValueError(
            "--accumulate must be 1 with --compile reduce-overhead, whose gradients lie in memory that the next batch "
            f"overwrites (or use --compile default), got {options.accumulate}"
        )
    if options.seed is not None and not 0 <= options.seed < 2**31:
        raise ValueError(f"--seed must be in [0, 2**31), got {options.seed}")
    if options.scale_lr and settings.base_batch_size is None:
        raise ValueError("--scale-lr must have auto_scale_lr.base_batch_size in the configuration, got none")
    if options.validate and settings.val is None:
        raise ValueError("--validate must have data.val in the configuration, got none")
    if options.sync_bn and settings.model.norm == "sub_batch":
        raise ValueError("--sync-bn must not be given with SubBatchBN3d in the configuration, got both")
    if options.resume_from not in (None, "auto") and not Path(options.resume_from).is_file():
        raise FileNotFoundError(f"--resume-from must be auto or an existing file, got '{options.resume_from}'")
    if options.load_from is not None and not Path(options.load_from).is_file():
        raise FileNotFoundError(f"--load-from must be an existing file, got '{options.load_from}'")
    if options.plot:
        require_matplotlib()


def _resumed(resume_from: str | None, checkpoints: CheckpointFolder) -> tuple[dict[str, Any] | None, list[str]]:
    """The content of the checkpoint to go on from, or ``None`` for a new run; and what to say of it."""
    checkpoints.remove_leftovers()
    if resume_from is None:
        return None, []
    if resume_from != "auto":
        return read_sound(Path(resume_from)), []
    path, content, remarks = checkpoints.newest_sound()
    if remarks:
        remarks.append(f"going back to {path}" if path else "no other checkpoint: a new run")
    return content, remarks


def _load_weights(model: nn.Module, settings: TrainingSettings, load_from: str | None, log: RunLog) -> None:
    """2-D networks into the pathways, then the weights of ``load_from``."""
    for pathway, path in (
        (model.backbone.slow_path, settings.model.slow_pretrained),
        (model.backbone.fast_path, settings.model.fast_pretrained),
    ):
        if path is not None:
            report = inflate_from_2d(pathway, read_checkpoint(path).tensors)
            log.info(
                f"{path}: {len(report.loaded)} entries inflated, {len(report.kept)} kept, {len(report.unused)} unused"
            )
    if load_from is not None:
        load_checkpoint(load_from, model, num_classes=settings.model.network.num_classes)
        report = model.load_report
        log.info(str(report))
        for mismatch in report.mismatched:
            if mismatch.name == "cls_head.fc_cls.weight":
                log.info(
                    f"the classifier is new: {mismatch.model_shape[0]} classes, "
                    f"the checkpoint has {mismatch.file_shape[0]}"
                )


def _with_scaled_rate(settings: TrainingSettings, options: RunOptions, processes: Processes, log: RunLog):
    """Goyal et al., "Accurate, Large Minibatch SGD" (arXiv 1706.02677): the rate grows with the batch."""
    if not options.scale_lr:
        return settings
    videos = settings.train_loader.videos_per_gpu * processes.world_size * options.accumulate
    lr = settings.optimizer.lr * videos / settings.base_batch_size
    log.info(f"learning rate {settings.optimizer.lr} for {settings.base_batch_size} videos, {lr} for {videos}")
    return dataclasses.replace(settings, optimizer=dataclasses.replace(settings.optimizer, lr=lr))


def _precise_batches(settings, source, processes: Processes, seed: int) -> TrainingBatches | None:
    """Batches of full-size clips in an order of their own, decoded by one process."""
    precise = settings.precise_bn
    if precise is None:
        return None
    loader = LoaderSettings(settings.train_loader.videos_per_gpu, 1)
    batches = TrainingBatches(source, settings, processes, seed, loader=loader, stream=1)
    if batches.count(0) < precise.num_iters:
        raise ValueError(
            f"config: precise_bn.num_iters must be at most the {batches.count(0)} batches of an epoch, "
            f"got {precise.num_iters}"
        )
    return batches


def _warn_of_changes(before: dict[str, Any], now: dict[str, Any], log: RunLog) -> None:
    for key, what in (("config", "configuration"), ("seed", "seed")):
        if before.get(key) != now[key]:
            log.warning(f"the {what} differs from that of the run that wrote the checkpoint; this one's counts")


def _meta(config: dict[str, Any], name: str, settings: TrainingSettings, seed: int, work_dir: Path) -> dict[str, Any]:
    try:
        version = importlib.metadata.version("slowfast-ext")
    except importlib.metadata.PackageNotFoundError:  # run from the source tree
        version = None
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    environment = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "host": platform.node(),
        "cpus": os.cpu_count(),
    }
    return {
        "slowfast_ext_version": version,
        "env_info": "\n".join(f"{key}: {value}" for key, value in environment.items()),
        "seed": seed,
        "config_name": f"{name}.py",
        "work_dir": str(work_dir),
        "config": format_config(config),
        CONFIG_ENTRY: json.dumps(settings.model.network.to_dict()),
    }
