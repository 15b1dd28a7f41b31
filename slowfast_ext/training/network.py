"""The ``model`` section of a configuration, and the network that it describes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..models import Normalization, PathwayConfig, SlowFastConfig
from ..models.config import BLOCKS_PER_STAGE
from .sections import Section

# Names of batch norm in mmaction2's norm_cfg, and how the statistics are formed here.
_NORMS = {"BN": "batch", "BN3d": "batch", "SyncBN": "sync", "SubBatchBN3D": "sub_batch", "SubBatchBN3d": "sub_batch"}


@dataclass(frozen=True)
class ModelSettings:
    """What the ``model`` section says.

    Args:
        network: the network.
        norm: where batch norm takes its statistics: "batch", of a process; "sync", of all processes; "sub_batch",
            of ``norm_splits`` parts of a process's batch.
        norm_splits: parts of the batch; with multigrid the long cycle decides.
        slow_pretrained, fast_pretrained: files of 2-D ResNets that a pathway starts from.
        label_smoothing: share of the label that is spread over all classes.
        average_clips: ``prob``, ``score`` or ``None``: how the views of a video are averaged in tests.
        max_testing_views: views that are run at a time in tests, ``None`` for all.
    """

    network: SlowFastConfig
    norm: str = "batch"
    norm_splits: int = 1
    slow_pretrained: str | None = None
    fast_pretrained: str | None = None
    label_smoothing: float = 0.0
    average_clips: str | None = "prob"
    max_testing_views: int | None = None


def model_section(network: SlowFastConfig, max_testing_views: int | None = None) -> dict[str, Any]:
    """The ``model`` section, with mmaction2's keys, of a network; :func:`read_model` is the inverse."""
    backbone = {
        "type": "ResNet3dSlowFast",
        "resample_rate": network.resample_rate,
        "speed_ratio": network.speed_ratio,
        "channel_ratio": network.slow.base_channels // network.fast.base_channels,
        "slow_pathway": {
            **_pathway_section(network.slow),
            "lateral": True,
            "fusion_kernel": network.fusion_kernel,
            "lateral_norm": network.lateral_norm,
        },
        "fast_pathway": {**_pathway_section(network.fast), "lateral": False},
    }
    head = {
        "type": "SlowFastHead",
        "in_channels": network.slow.channels[-1] + network.fast.channels[-1],
        "num_classes": network.num_classes,
        "spatial_type": "avg",
        "dropout_ratio": network.dropout,
    }
    test = {"average_clips": "prob"}
    if max_testing_views is not None:
        test["max_testing_views"] = max_testing_views
    return {"type": "Recognizer3D", "backbone": backbone, "cls_head": head, "test_cfg": test}


def read_model(section: Section, clip: dict[str, Any]) -> ModelSettings:
    """Read and check a ``model`` section.

    Args:
        section: is closed.
        clip: what the data say of the clips: fields of :class:`SlowFastConfig`, ``normalization`` among them.
    """
    section.fixed("type", "Recognizer3D")
    section.fixed("train_cfg", None)
    backbone, head, test = section.section("backbone"), section.section("cls_head"), section.section("test_cfg", None)
    section.close()

    backbone.fixed("type", "ResNet3dSlowFast")
    backbone.fixed("pretrained", None)
    rate = backbone.count("resample_rate", 8)
    ratio = backbone.count("speed_ratio", 8)
    channel_ratio = backbone.number("channel_ratio", 8, exclusive=True)
    norm, splits = _read_norm(backbone.section("norm_cfg", None))
    slow_section, fast_section = backbone.section("slow_pathway"), backbone.section("fast_pathway")
    backbone.close()
    slow_section.fixed("lateral", True)
    fusion_kernel = slow_section.count("fusion_kernel", 5)
    lateral_norm = slow_section.take("lateral_norm", False, bool)
    fast_section.fixed("lateral", False)
    slow, slow_pretrained = _read_pathway(slow_section, 64, 1, (0, 0, 1, 1))
    fast, fast_pretrained = _read_pathway(fast_section, 8, 5, (1, 1, 1, 1))
    if slow.base_channels != channel_ratio * fast.base_channels:
        raise ValueError(
            f"config: {backbone.path('channel_ratio')} must be the channels of slow_pathway over those of fast_pathway "
            f"({slow.base_channels} / {fast.base_channels}), got {channel_ratio}"
        )

    head.fixed("type", "SlowFastHead")
    head.fixed("spatial_type", "avg")
    expected = slow.channels[-1] + fast.channels[-1]
    head.choice("in_channels", (expected,), expected)
    num_classes = head.count("num_classes")
    dropout = head.number("dropout_ratio", 0.8)
    head.fixed("init_std", 0.01)
    smoothing = head.number("label_smooth_eps", 0.0)
    loss = head.section("loss_cls", None)
    if loss is not None:
        loss.fixed("type", "CrossEntropyLoss")
        loss.fixed("loss_weight", 1.0)
        loss.close()
    head.close()

    average, views = "prob", None
    if test is not None:
        average = test.choice("average_clips", ("prob", "score", None), "prob")
        views = test.count("max_testing_views", None)
        test.close()
    network = SlowFastConfig(
        slow,
        fast,
        resample_rate=rate,
        speed_ratio=ratio,
        fusion_kernel=fusion_kernel,
        lateral_norm=lateral_norm,
        num_classes=num_classes,
        dropout=dropout,
        **clip,
    )
    return ModelSettings(network, norm, splits, slow_pretrained, fast_pretrained, smoothing, average, views)


def read_normalization(section: Section) -> Normalization:
    """From the ``Normalize`` step of a pipeline; is closed."""
    mean, std = section.numbers("mean", length=3), section.numbers("std", length=3)
    section.fixed("to_bgr", False)
    section.close()
    if min(std) <= 0:
        raise ValueError(f"config: {section.path('std')} must be positive, got {std}")
    return Normalization(mean, std)


def _pathway_section(pathway: PathwayConfig) -> dict[str, Any]:
    inflate = [stage[0] > 1 for stage in pathway.temporal_kernels]
    return {
        "type": "resnet3d",
        "depth": pathway.depth,
        "pretrained": None,
        "base_channels": pathway.base_channels,
        "conv1_kernel": (pathway.stem_temporal_kernel, 7, 7),
        "dilations": (1, 1, 1, 1),
        "conv1_stride_t": 1,
        "pool1_stride_t": 1,
        "inflate": tuple(map(int, inflate)),
        "norm_eval": False,
    }


def _read_pathway(
    section: Section, channels: int, kernel: int, inflate: tuple[int, ...]
) -> tuple[PathwayConfig, str | None]:
    section.fixed("type", "resnet3d")
    depth = section.choice("depth", tuple(BLOCKS_PER_STAGE))
    pretrained = section.take("pretrained", None, str)
    if pretrained is not None and "://" in pretrained:
        raise ValueError(f"config: {section.path('pretrained')} must be a file, not fetched, got {pretrained!r}")
    base_channels = section.count("base_channels", channels)
    conv1_kernel = section.numbers("conv1_kernel", (kernel, 7, 7), length=3)
    if conv1_kernel[1:] != (7, 7):
        raise ValueError(f"config: {section.path('conv1_kernel')} must end in 7, 7, got {conv1_kernel}")
    section.choice("dilations", ((1, 1, 1, 1), [1, 1, 1, 1]), (1, 1, 1, 1))
    for name in ("conv1_stride_t", "pool1_stride_t"):
        section.fixed(name, 1)
    stages = section.numbers("inflate", inflate, length=4)
    section.fixed("inflate_style", "3x1x1")
    section.fixed("norm_eval", False)
    section.fixed("zero_init_residual", True)
    section.close()
    return PathwayConfig(
        depth, base_channels, conv1_kernel[0], tuple(3 if stage else 1 for stage in stages)
    ), pretrained


def _read_norm(section: Section | None) -> tuple[str, int]:
    if section is None:
        return "batch", 1
    norm = _NORMS[section.choice("type", tuple(_NORMS), "BN3d")]
    section.fixed("requires_grad", True)
    splits = section.count("num_splits", 1) if norm == "sub_batch" else 1
    section.close()
    return norm, splits
