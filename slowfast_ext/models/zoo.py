"""The published model zoo as data: 12 rows, 11 configurations, and the networks behind them."""

from __future__ import annotations

import dataclasses
import difflib
import os
from dataclasses import dataclass

from .config import SlowFastConfig, fast_pathway, slow_pathway
from .recognizer import SlowFastRecognizer


@dataclass(frozen=True)
class ZooRow:
    """One row of mmaction2 0.24's SlowFast table.

    Args:
        name: configuration name; two rows share one.
        network: the network and its test views.
        dataset: what it was trained and tested on.
        source: resolution of the training videos ("short-side 256", "short-side 320", "height 100").
        gpus: GPUs x nodes of the training run ("8x4").
        top1, top5: published accuracy on the validation set, per cent.
        memory_mib: published training memory of one GPU.
        videos_per_second: published test speed of one GPU, where given.
        pretrained: configuration whose weights the training starts from.
    """

    name: str
    network: SlowFastConfig
    dataset: str
    source: str
    gpus: str
    top1: float
    top5: float
    memory_mib: int
    videos_per_second: float | None = None
    pretrained: str | None = None


def _network(slow_depth: int = 50, fast_depth: int = 50, *, rate: int, lateral_norm: bool = False) -> SlowFastConfig:
    """4x16 is ``rate=8``, 8x8 is ``rate=4``: the fusion kernel goes with it."""
    return SlowFastConfig(
        slow_pathway(slow_depth),
        fast_pathway(fast_depth),
        resample_rate=rate,
        speed_ratio=rate,
        fusion_kernel={8: 5, 4: 7}[rate],
        lateral_norm=lateral_norm,
    )


_R50_4X16, _R50_8X8 = _network(rate=8), _network(rate=4)
_R50_8X8_NORM = _network(rate=4, lateral_norm=True)
_R50_16X8_STHV1 = dataclasses.replace(_R50_8X8, num_classes=174, clip_len=64, test_clips=1, test_crops=1)


def _kinetics(name: str, network: SlowFastConfig, source: int, *published, suffix: str = "") -> ZooRow:
    full_name = f"slowfast_{name}_kinetics400_rgb{suffix}"
    return ZooRow(full_name, network, "Kinetics-400", f"short-side {source}", *published)


ZOO = (
    _kinetics("r50_4x16x1_256e", _R50_4X16, 256, "8x4", 74.75, 91.73, 6203),
    _kinetics("r50_video_4x16x1_256e", _R50_4X16, 256, "8", 73.95, 91.50, 6203),
    _kinetics("r50_4x16x1_256e", _R50_4X16, 320, "8x2", 76.0, 92.54, 6203, 1.6),
    _kinetics("prebn_r50_4x16x1_256e", _R50_4X16, 320, "8x2", 76.34, 92.67, 6203),
    _kinetics("r50_8x8x1_256e", _R50_8X8, 320, "8x3", 76.94, 92.8, 9062, 1.3),
    _kinetics("r50_8x8x1_256e", _R50_8X8_NORM, 320, "8x4", 76.34, 92.61, 9062, suffix="_steplr"),
    _kinetics("multigrid_r50_8x8x1_358e", _R50_8X8_NORM, 320, "8x2", 76.07, 92.21, 9062),
    _kinetics("prebn_r50_8x8x1_256e", _R50_8X8_NORM, 320, "8x4", 76.58, 92.85, 9062, suffix="_steplr"),
    _kinetics("r101_r50_4x16x1_256e", _network(101, 50, rate=8), 256, "8x1", 76.69, 93.07, 16628),
    _kinetics("r101_8x8x1_256e", _network(101, 101, rate=4), 256, "8x4", 77.90, 93.51, 25994),
    _kinetics("r152_r50_4x16x1_256e", _network(152, 50, rate=8), 256, "8x1", 77.13, 93.20, 10077),
    ZooRow(
        "slowfast_r50_16x8x1_22e_sthv1_rgb",
        _R50_16X8_STHV1,
        "Something-Something V1",
        "height 100",
        "8",
        49.67,
        79.00,
        9293,
        pretrained="slowfast_r50_8x8x1_256e_kinetics400_rgb",
    ),
)
_NETWORKS = {row.name: row.network for row in ZOO}


def list_models() -> list[str]:
    """The configuration names of the zoo, in the order of its table."""
    return list(_NETWORKS)


def get_config(name: str | os.PathLike) -> SlowFastConfig:
    """The network of a zoo name, or of a path to a configuration file of that name (the file is not read).

    The table's own links misspell ``prebn`` as ``perbn``; both are understood.

    Raises:
        ValueError: the name is not in the zoo; the message suggests the nearest names.
    """
    stem = os.fspath(name).replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".py").replace("_perbn_", "_prebn_")
    if stem not in _NETWORKS:
        nearest = difflib.get_close_matches(stem, _NETWORKS, n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(nearest)}?" if nearest else "; see list_models()"
        raise ValueError(f"create_model: name must be one of the {len(_NETWORKS)} zoo names, got {stem!r}{hint}")
    return _NETWORKS[stem]


def build_model(name: str | os.PathLike | SlowFastConfig, num_classes: int | None = None) -> SlowFastRecognizer:
    """A freshly initialised network of a zoo name, a configuration path or a configuration."""
    config = name if isinstance(name, SlowFastConfig) else get_config(name)
    if num_classes is not None:
        config = dataclasses.replace(config, num_classes=num_classes)
    return SlowFastRecognizer(config)
