"""A configuration, checked and typed: what the training loop works from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .network import ModelSettings, read_model
from .pipeline import ClipSettings, read_pipeline
from .sections import Section


@dataclass(frozen=True)
class DatasetSettings:
    """A list of videos and the clips that are cut out of them.

    Args:
        videos: files, else folders of frames.
        ann_file, data_prefix: the list, and the folder that its paths start from.
        clip: see :class:`ClipSettings`.
        filename_tmpl, start_index: of frames: name as a format of their number, number of the first.
        with_offset: the list gives the first frame of each entry.
    """

    videos: bool
    ann_file: str
    data_prefix: str
    clip: ClipSettings
    filename_tmpl: str = "img_{:05}.jpg"
    start_index: int = 1
    with_offset: bool = False


@dataclass(frozen=True)
class LoaderSettings:
    """Batches of one process: videos in one, and decoding processes."""

    videos_per_gpu: int
    workers_per_gpu: int


@dataclass(frozen=True)
class OptimizerSettings:
    """SGD. ``clip_norm`` is the L2 norm to which gradients are scaled down, ``None`` to leave them."""

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    clip_norm: float | None = None


@dataclass(frozen=True)
class ScheduleSettings:
    """The learning rate, constant within an epoch, with a linear warm-up at the start; see :mod:`.schedules`.

    Args:
        policy: ``cosine`` or ``step``.
        min_lr: the regular rate is never below; the cosine ends there.
        steps, gamma: epochs at which the rate is multiplied by ``gamma``.
        warmup: epochs (``warmup_by_epoch``) or iterations of the warm-up; 0 for none.
        warmup_ratio: of the regular rate, where the warm-up starts.
    """

    policy: str
    min_lr: float = 0.0
    steps: tuple[int, ...] = ()
    gamma: float = 0.1
    warmup: int = 0
    warmup_by_epoch: bool = False
    warmup_ratio: float = 0.1


@dataclass(frozen=True)
class PreciseBNSettings:
    """After each ``interval`` epochs the running statistics are recomputed over ``num_iters`` batches."""

    num_iters: int
    interval: int


@dataclass(frozen=True)
class MultigridSettings:
    """See :mod:`.multigrid`. Factors of the long cycle are (frames, side)."""

    short_cycle: bool
    epoch_factor: float
    long_cycle_factors: tuple[tuple[float, float], ...]
    short_cycle_factors: tuple[float, ...]
    default_size: int


@dataclass(frozen=True)
class EvaluationSettings:
    """Validation after each ``interval`` epochs, from epoch ``start`` on; ``save_best`` names the metric to keep by.
    With ``gpu_collect`` the scores of the processes travel through their GPUs."""

    interval: int = 1
    start: int | None = None
    metrics: tuple[str, ...] = ("top_k_accuracy", "mean_class_accuracy")
    save_best: str | None = "auto"
    gpu_collect: bool = False


@dataclass(frozen=True)
class CheckpointSettings:
    """When weights are written.

    Args:
        interval: every epoch is written as ``epoch_{N}.pth``; the multiples of this stay, the others only until they
            are older than the two newest.
        keep: newest ``epoch_{N}.pth`` that stay, -1 for all.
        iterations: iterations between two passing ``epoch_{N}_iter_{M}.pth``, which bound what a killed run loses; 0
            for none.
    """

    interval: int = 1
    keep: int = -1
    iterations: int = 1000


@dataclass(frozen=True)
class TrainingSettings:
    """Everything that a configuration says; ``test`` is what its checkpoints are tested on after training."""

    model: ModelSettings
    train: DatasetSettings
    train_loader: LoaderSettings
    val: DatasetSettings | None
    val_loader: LoaderSettings
    test: DatasetSettings | None
    test_loader: LoaderSettings
    optimizer: OptimizerSettings
    schedule: ScheduleSettings
    epochs: int
    base_batch_size: int | None = None
    precise_bn: PreciseBNSettings | None = None
    multigrid: MultigridSettings | None = None
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    log_interval: int = 20
    tensorboard: bool = False
    cudnn_benchmark: bool = False
    load_from: str | None = None
    resume_from: str | None = None
    work_dir: str | None = None
    seed: int | None = None


# Metrics of mmaction2's configurations, and the values that each gives.
_METRIC_VALUES = {"top_k_accuracy": ("top1_acc", "top5_acc"), "mean_class_accuracy": ("mean_class_accuracy",)}


def read_settings(config: dict[str, Any]) -> TrainingSettings:
    """Check a configuration with mmaction2's keys.

    Raises:
        ValueError: an unknown key, with the nearest known one; a missing or wrong value.
    """
    root = Section(config)
    data = root.section("data")
    train = _read_dataset(data.section("train"), "train")
    val = data.section("val", None)
    val = None if val is None else _read_dataset(val, "val")
    test = data.section("test", None)
    test = None if test is None else _read_dataset(test, "test")
    loader = LoaderSettings(data.count("videos_per_gpu", 1), data.count("workers_per_gpu", 1))
    loaders = {
        name: _read_loader(data.section(f"{name}_dataloader", None), loader) for name in ("train", "val", "test")
    }
    data.close()

    clip = _network_clip(train.clip, test.clip if test else None)
    model = read_model(root.section("model"), clip)
    for name, dataset in (("train", train), ("val", val), ("test", test)):
        if dataset is not None and dataset.clip.sampling.clip_len % model.network.resample_rate:
            raise ValueError(
                f"config: clip_len of data.{name} must be a multiple of resample_rate {model.network.resample_rate}, "
                f"got {dataset.clip.sampling.clip_len}"
            )
    if train.clip.sampling.num_clips != 1:
        raise ValueError(f"config: num_clips of data.train must be 1, got {train.clip.sampling.num_clips}")
    epochs = _read_epochs(root)
    settings = TrainingSettings(
        model=model,
        train=train,
        train_loader=loaders["train"],
        val=val,
        val_loader=loaders["val"],
        test=test,
        test_loader=loaders["test"],
        optimizer=_read_optimizer(root.section("optimizer"), root.section("optimizer_config", None)),
        schedule=_read_schedule(root.section("lr_config")),
        epochs=epochs,
        base_batch_size=_read_base_batch(root.section("auto_scale_lr", None)),
        precise_bn=_read_precise_bn(root.section("precise_bn", None)),
        multigrid=_read_multigrid(root.section("multigrid", None)),
        evaluation=_read_evaluation(root.section("evaluation", None)),
        checkpoint=_read_checkpoint(root.section("checkpoint_config", None)),
        **_read_log(root.section("log_config", None)),
        cudnn_benchmark=root.take("cudnn_benchmark", False, bool),
        load_from=root.take("load_from", None, str),
        resume_from=root.take("resume_from", None, str),
        work_dir=root.take("work_dir", None, str),
        seed=root.count("seed", None, minimum=0),
    )
    _read_runtime(root)
    root.close()
    if settings.multigrid and settings.schedule.policy != "step":
        raise ValueError(f"config: lr_config.policy must be step with multigrid, got {settings.schedule.policy}")
    if settings.multigrid and settings.schedule.warmup and not settings.schedule.warmup_by_epoch:
        raise ValueError("config: lr_config.warmup_by_epoch must be True with multigrid, got False")
    return settings


def _read_dataset(section: Section, name: str) -> DatasetSettings:
    videos = section.choice("type", ("RawframeDataset", "VideoDataset")) == "VideoDataset"
    pipeline = read_pipeline(section.sections("pipeline"), section.path("pipeline"), videos=videos)
    random = name == "train"
    if pipeline.test_mode == random or pipeline.transform.is_random != random:
        expected = "random clips (RandomResizedCrop)" if random else "test_mode=True and CenterCrop or ThreeCrop"
        raise ValueError(
            f"config: {section.path('pipeline')} must have {expected}, got test_mode={pipeline.test_mode} "
            f"with the crop {pipeline.transform.crop}"
        )
    section.fixed("modality", "RGB")
    section.fixed("multi_class", False)
    section.choice("test_mode", (False, True), name != "train")
    fields = {}
    if not videos:
        fields["filename_tmpl"] = section.take("filename_tmpl", "img_{:05}.jpg", str)
        fields["with_offset"] = section.take("with_offset", False, bool)
        fields["start_index"] = section.count("start_index", 1, minimum=0)
    settings = DatasetSettings(
        videos,
        section.take("ann_file", kind=str),
        section.take("data_prefix", "", str),
        pipeline,
        **fields,
    )
    section.close()
    return settings


def _read_loader(section: Section | None, default: LoaderSettings) -> LoaderSettings:
    if section is None:
        return default
    settings = LoaderSettings(
        section.count("videos_per_gpu", default.videos_per_gpu),
        section.count("workers_per_gpu", default.workers_per_gpu),
    )
    section.close()
    return settings


def _network_clip(train: ClipSettings, test: ClipSettings | None) -> dict[str, Any]:
    """What a network remembers of its clips: those it was trained on, and the views it is tested with."""
    fields = {
        "clip_len": train.sampling.clip_len,
        "frame_interval": train.sampling.frame_interval,
        "normalization": train.normalization,
    }
    if test is not None:
        fields["test_clips"] = test.sampling.num_clips
        fields["test_crops"] = 3 if test.transform.crop == "three" else 1
        fields["test_crop_size"] = test.transform.crop_size
        fields["test_short_side"] = test.transform.short_side
    return fields


def _read_epochs(root: Section) -> int:
    runner = root.section("runner", None)
    if runner is None:
        return root.count("total_epochs")
    runner.fixed("type", "EpochBasedRunner")
    epochs = runner.count("max_epochs")
    runner.close()
    return root.count("total_epochs", epochs)


def _read_optimizer(section: Section, config: Section | None) -> OptimizerSettings:
    section.fixed("type", "SGD")
    clip_norm = None
    if config is not None:
        grad_clip = config.section("grad_clip", None)
        config.close()
        if grad_clip is not None:
            clip_norm = grad_clip.number("max_norm", exclusive=True)
            grad_clip.choice("norm_type", (2, 2.0), 2)
            grad_clip.close()
    momentum = section.number("momentum", 0.0)
    nesterov = section.take("nesterov", False, bool)
    if nesterov and not momentum:
        raise ValueError("config: optimizer.momentum must be above 0 with nesterov, got 0")
    settings = OptimizerSettings(
        section.number("lr", exclusive=True), momentum, section.number("weight_decay", 0.0), nesterov, clip_norm
    )
    section.close()
    return settings


def _read_schedule(section: Section) -> ScheduleSettings:
    policy = {"CosineAnnealing": "cosine", "cosine": "cosine", "step": "step", "Step": "step"}[
        section.choice("policy", ("CosineAnnealing", "cosine", "step", "Step"))
    ]
    fields: dict[str, Any] = {"min_lr": section.number("min_lr", 0.0)}
    if policy == "step":
        steps = section.numbers("step")
        if list(steps) != sorted(set(steps)) or any(not isinstance(step, int) or step < 1 for step in steps):
            raise ValueError(f"config: {section.path('step')} must be epochs that rise, got {list(steps)}")
        fields.update(steps=steps, gamma=section.number("gamma", 0.1, exclusive=True))
    section.fixed("by_epoch", True)
    if section.choice("warmup", (None, "linear"), None) == "linear":
        fields["warmup"] = section.count("warmup_iters")
        fields["warmup_by_epoch"] = section.take("warmup_by_epoch", False, bool)
        fields["warmup_ratio"] = section.number("warmup_ratio", 0.1, exclusive=True)
    section.close()
    return ScheduleSettings(policy, **fields)


def _read_base_batch(section: Section | None) -> int | None:
    if section is None:
        return None
    size = section.count("base_batch_size")
    section.close()
    return size


def _read_precise_bn(section: Section | None) -> PreciseBNSettings | None:
    if section is None:
        return None
    settings = PreciseBNSettings(section.count("num_iters", 200), section.count("interval", 1))
    section.close()
    return settings


def _read_multigrid(section: Section | None) -> MultigridSettings | None:
    if section is None:
        return None
    size = section.numbers("default_s", (224, 224), length=2)
    if size[0] != size[1]:
        raise ValueError(f"config: {section.path('default_s')} must be a square, got {size}")
    long_factors = section.take("long_cycle_factors", kind=(list, tuple))
    if not long_factors or any(not isinstance(pair, list | tuple) or len(pair) != 2 for pair in long_factors):
        raise ValueError(
            f"config: {section.path('long_cycle_factors')} must be pairs (frames, side), got {long_factors}"
        )
    section.fixed("long_cycle", True)
    settings = MultigridSettings(
        section.take("short_cycle", True, bool),
        section.number("epoch_factor", 1.5, exclusive=True),
        tuple(tuple(pair) for pair in long_factors),
        section.numbers("short_cycle_factors", (0.5, 0.7071)),
        int(size[0]),
    )
    section.close()
    return settings


def _read_evaluation(section: Section | None) -> EvaluationSettings:
    if section is None:
        return EvaluationSettings()
    metrics = section.take("metrics", ["top_k_accuracy", "mean_class_accuracy"], (list, tuple))
    if not metrics or any(metric not in _METRIC_VALUES for metric in metrics):
        raise ValueError(f"config: {section.path('metrics')} must be among {list(_METRIC_VALUES)}, got {list(metrics)}")
    collect = section.take("gpu_collect", False, bool)
    named = [name for metric in metrics for name in _METRIC_VALUES[metric]]
    best = section.choice("save_best", ("auto", None, *named), "auto")
    settings = EvaluationSettings(
        section.count("interval", 1), section.count("start", None), tuple(metrics), best, collect
    )
    section.close()
    return settings


def _read_checkpoint(section: Section | None) -> CheckpointSettings:
    if section is None:
        return CheckpointSettings()
    keep = section.take("max_keep_ckpts", -1, int)
    if keep == 0 or keep < -1:
        raise ValueError(f"config: {section.path('max_keep_ckpts')} must be at least 1, or -1 for all, got {keep}")
    settings = CheckpointSettings(section.count("interval", 1), keep, section.count("iterations", 1000, minimum=0))
    section.close()
    return settings


def _read_log(section: Section | None) -> dict[str, Any]:
    if section is None:
        return {}
    interval, tensorboard = section.count("interval", 20), False
    for hook in section.sections("hooks", []):
        kind = hook.choice("type", ("TextLoggerHook", "TensorboardLoggerHook"))
        tensorboard |= kind == "TensorboardLoggerHook"
        hook.close()
    section.close()
    return {"log_interval": interval, "tensorboard": tensorboard}


def _read_runtime(root: Section) -> None:
    """Keys of mmaction2's default_runtime.py, allowed with what happens here in any case.

    The device decides on the backend; decoding processes never inherit the state of this one, however they are started.
    """
    dist_params = root.section("dist_params", None)
    if dist_params is not None:
        dist_params.choice("backend", ("nccl", "gloo"), "nccl")
        dist_params.close()
    root.fixed("log_level", "INFO")
    root.fixed("workflow", [("train", 1)], [["train", 1]])
    root.fixed("find_unused_parameters", False)
    root.fixed("opencv_num_threads", 0)
    root.fixed("mp_start_method", "fork", "spawn", "forkserver")
