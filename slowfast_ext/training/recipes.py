"""How the networks of the zoo were trained, as data."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from ..models import ZOO, SlowFastConfig, get_config
from .network import model_section


@dataclass(frozen=True)
class Recipe:
    """What differs between the training runs of the zoo; :func:`zoo_config` has what they share.

    Args:
        videos: trained on video files, not on folders of frames.
        videos_per_gpu: clips in a batch of one process; the rate is for eight processes.
        workers_per_gpu: decoding processes.
        test_videos_per_gpu: videos in a batch at test time, ``None`` for as many as in training.
        max_testing_views: views of a video that are run at a time, ``None`` for all.
        learning_rate, weight_decay: of SGD.
        epochs: length of the schedule. Multigrid stretches it by its ``epoch_factor``.
        steps: epochs at which the rate is divided by ten; ``None`` for a cosine over all epochs.
        precise_bn_interval: epochs between two recomputations of the batch statistics over 200 batches.
        multigrid: clips change shape with the epoch.
        evaluation_interval, evaluation_start: epochs between two validations, and of the first one.
        checkpoint_interval: epochs between two checkpoints.
    """

    videos: bool = False
    videos_per_gpu: int = 8
    workers_per_gpu: int = 2
    test_videos_per_gpu: int | None = 1
    max_testing_views: int | None = None
    learning_rate: float = 0.1
    weight_decay: float = 1e-4
    epochs: int = 256
    steps: tuple[int, ...] | None = None
    precise_bn_interval: int | None = None
    multigrid: bool = False
    evaluation_interval: int = 5
    evaluation_start: int | None = None
    checkpoint_interval: int = 4


_STEPS = (94, 154, 196)
RECIPES = {
    "slowfast_r50_4x16x1_256e_kinetics400_rgb": Recipe(),
    "slowfast_r50_video_4x16x1_256e_kinetics400_rgb": Recipe(videos=True),
    "slowfast_prebn_r50_4x16x1_256e_kinetics400_rgb": Recipe(
        workers_per_gpu=4, test_videos_per_gpu=None, precise_bn_interval=1
    ),
    "slowfast_r50_8x8x1_256e_kinetics400_rgb": Recipe(),
    "slowfast_r50_8x8x1_256e_kinetics400_rgb_steplr": Recipe(steps=_STEPS),
    "slowfast_multigrid_r50_8x8x1_358e_kinetics400_rgb": Recipe(
        workers_per_gpu=4,
        test_videos_per_gpu=None,
        epochs=239,
        steps=_STEPS,
        precise_bn_interval=3,
        multigrid=True,
        evaluation_interval=3,
        checkpoint_interval=3,
    ),
    "slowfast_prebn_r50_8x8x1_256e_kinetics400_rgb_steplr": Recipe(steps=_STEPS, precise_bn_interval=5),
    "slowfast_r101_r50_4x16x1_256e_kinetics400_rgb": Recipe(max_testing_views=10),
    "slowfast_r101_8x8x1_256e_kinetics400_rgb": Recipe(max_testing_views=10),
    "slowfast_r152_r50_4x16x1_256e_kinetics400_rgb": Recipe(max_testing_views=8),
    "slowfast_r50_16x8x1_22e_sthv1_rgb": Recipe(
        videos_per_gpu=4,
        learning_rate=0.06,
        weight_decay=1e-6,
        epochs=22,
        steps=(14, 18),
        evaluation_interval=1,
        evaluation_start=18,
        checkpoint_interval=1,
    ),
}

# Turning the camera, pushing and pulling to the left are other classes than to the right (Something-Something V1).
_STHV1_FLIP_LABELS = {2: 4, 4: 2, 30: 41, 41: 30, 52: 66, 66: 52}
# The rates of the recipes are for eight processes.
_PROCESSES = 8


def zoo_config(name: str) -> dict[str, Any]:
    """The whole configuration of a zoo name with mmaction2's keys, as :func:`read_config` would give it.

    Raises:
        ValueError: not a zoo name; the message has the nearest ones.
    """
    name = name.replace("_perbn_", "_prebn_")
    if name not in RECIPES:
        matches = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(matches)}?" if matches else ""
        raise ValueError(f"train: config must be a zoo name, or a .py or .json file, got {name!r}{hint}")
    recipe, network = RECIPES[name], get_config(name)
    pretrained = next(row.pretrained for row in ZOO if row.name == name)
    data = _sthv1_data(network) if "sthv1" in name else _kinetics_data(network, recipe.videos)
    data = {"videos_per_gpu": recipe.videos_per_gpu, "workers_per_gpu": recipe.workers_per_gpu, **data}
    if recipe.test_videos_per_gpu is not None:
        data["test_dataloader"] = {"videos_per_gpu": recipe.test_videos_per_gpu}
    config = {
        "model": model_section(network, recipe.max_testing_views),
        "data": data,
        "optimizer": {
            "type": "SGD",
            "lr": recipe.learning_rate,
            "momentum": 0.9,
            "weight_decay": recipe.weight_decay,
        },
        "optimizer_config": {"grad_clip": {"max_norm": 40, "norm_type": 2}},
        "lr_config": _lr_config(recipe, by_iteration=pretrained is not None),
        "total_epochs": recipe.epochs,
        "auto_scale_lr": {"base_batch_size": _PROCESSES * recipe.videos_per_gpu},
        "evaluation": _evaluation(recipe, with_class_mean="sthv1" not in name),
        "checkpoint_config": {"interval": recipe.checkpoint_interval},
        "log_config": {"interval": 20, "hooks": [{"type": "TextLoggerHook"}]},
        # Weights of another run to start from: a file, which --load-from names.
        "load_from": None,
    }
    if recipe.precise_bn_interval is not None:
        config["precise_bn"] = {"num_iters": 200, "interval": recipe.precise_bn_interval}
    if recipe.multigrid:
        config["multigrid"] = {
            "long_cycle": True,
            "short_cycle": True,
            "epoch_factor": 1.5,
            "long_cycle_factors": [[0.25, 0.7071], [0.5, 0.7071], [0.5, 1], [1, 1]],
            "short_cycle_factors": [0.5, 0.7071],
            "default_s": (224, 224),
        }
    return config


def starting_weights(name: str) -> str | None:
    """The zoo name whose published weights the training of ``name`` starts from."""
    return next((row.pretrained for row in ZOO if row.name == name), None)


def _lr_config(recipe: Recipe, by_iteration: bool) -> dict[str, Any]:
    if recipe.steps is None:
        regular = {"policy": "CosineAnnealing", "min_lr": 0}
    else:
        regular = {"policy": "step", "step": list(recipe.steps)}
    # Something-Something V1: 16343 training videos in batches of 32.
    warmup = {"warmup_iters": 510} if by_iteration else {"warmup_by_epoch": True, "warmup_iters": 34}
    return {**regular, "warmup": "linear", "warmup_ratio": 0.1, **warmup}


def _evaluation(recipe: Recipe, with_class_mean: bool) -> dict[str, Any]:
    metrics = ["top_k_accuracy", "mean_class_accuracy"] if with_class_mean else ["top_k_accuracy"]
    start = {} if recipe.evaluation_start is None else {"start": recipe.evaluation_start}
    return {"interval": recipe.evaluation_interval, **start, "metrics": metrics}


def _kinetics_data(network: SlowFastConfig, videos: bool) -> dict[str, Any]:
    def part(subset: str, pipeline: list[dict]) -> dict[str, Any]:
        form = "videos" if videos else "rawframes"
        return {
            "type": "VideoDataset" if videos else "RawframeDataset",
            "ann_file": f"data/kinetics400/kinetics400_{subset}_list_{form}.txt",
            "data_prefix": f"data/kinetics400/{form}_{subset}",
            "pipeline": pipeline,
        }

    resize = {"type": "Resize", "scale": (-1, 256)}
    training = [resize, {"type": "RandomResizedCrop"}, _exact(224), {"type": "Flip", "flip_ratio": 0.5}]
    validation = [resize, {"type": "CenterCrop", "crop_size": 224}]
    test = [resize, {"type": "ThreeCrop", "crop_size": network.test_crop_size}]
    return {
        "train": part("train", _pipeline(network, videos, training, collect_label=True)),
        "val": part("val", _pipeline(network, videos, validation, num_clips=1, test_mode=True)),
        "test": part("val", _pipeline(network, videos, test, num_clips=network.test_clips, test_mode=True)),
    }


def _sthv1_data(network: SlowFastConfig) -> dict[str, Any]:
    def part(subset: str, pipeline: list[dict]) -> dict[str, Any]:
        return {
            "type": "RawframeDataset",
            "ann_file": f"data/sthv1/sthv1_{subset}_list_rawframes.txt",
            "data_prefix": "data/sthv1/rawframes",
            "filename_tmpl": "{:05}.jpg",
            "pipeline": pipeline,
        }

    flip = {"type": "Flip", "flip_ratio": 0.5, "flip_label_map": _STHV1_FLIP_LABELS}
    training = [{"type": "RandomResizedCrop"}, _exact(224), flip]
    validation = [{"type": "Resize", "scale": (-1, 256)}, {"type": "CenterCrop", "crop_size": network.test_crop_size}]
    test = _pipeline(network, False, validation, num_clips=network.test_clips, test_mode=True)
    return {
        "train": part("train", _pipeline(network, False, training, collect_label=True)),
        "val": part("val", test),
        "test": part("val", test),
    }


def _exact(size: int) -> dict[str, Any]:
    return {"type": "Resize", "scale": (size, size), "keep_ratio": False}


def _pipeline(
    network: SlowFastConfig,
    videos: bool,
    spatial: list[dict],
    *,
    num_clips: int = 1,
    test_mode: bool = False,
    collect_label: bool = False,
) -> list[dict[str, Any]]:
    sample = {
        "type": "SampleFrames",
        "clip_len": network.clip_len,
        "frame_interval": network.frame_interval,
        "num_clips": num_clips,
    }
    if test_mode:
        sample["test_mode"] = True
    decode = (
        [{"type": "DecordInit"}, sample, {"type": "DecordDecode"}] if videos else [sample, {"type": "RawFrameDecode"}]
    )
    statistics = {name: list(value) for name, value in dataclasses.asdict(network.normalization).items()}
    return [
        *decode,
        *spatial,
        {"type": "Normalize", **statistics, "to_bgr": False},
        {"type": "FormatShape", "input_format": "NCTHW"},
        {"type": "Collect", "keys": ["imgs", "label"], "meta_keys": []},
        {"type": "ToTensor", "keys": ["imgs", "label"] if collect_label else ["imgs"]},
    ]
