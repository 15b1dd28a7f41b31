"""The network that a set of weights describes."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from torch import Tensor

from ..models import UNIFORM, PathwayConfig, SlowFastConfig
from ..models.config import BASIC_BLOCK_DEPTHS, BLOCKS_PER_STAGE

# How the networks of each code base see their input and pool their features, unless the file says otherwise.
_FAIR = {"frame_sampling": "linspace", "normalization": UNIFORM}
_BEHAVIOUR = {
    "mmaction2": {},
    "pyslowfast": {**_FAIR, "head_pooling": "sliding_softmax"},
    "caffe2": {**_FAIR, "head_pooling": "sliding_softmax"},
    "pytorchvideo": {**_FAIR, "head_pooling": "sliding"},
}


@dataclasses.dataclass(frozen=True)
class Description:
    """A network, and which of its properties the file does not record, so that they are only likely."""

    config: SlowFastConfig
    assumed: tuple[str, ...]


def describe(weights: dict[str, Tensor], source: str, recorded: dict[str, Any]) -> Description:
    """Read the architecture off names and shapes.

    Args:
        weights: tensors under mmaction2's names.
        source: the code base that wrote them, as :func:`~slowfast_ext.checkpoints.keys.recognise` returns it.
        recorded: fields of :class:`SlowFastConfig` that the file states. They win over the habits of its code base, but
            not over the weights.

    Raises:
        ValueError: the weights are of no network that this library can build.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    slow, fast = _pathway(shapes, "slow_path"), _pathway(shapes, "fast_path")
    lateral = "backbone.slow_path.conv1_lateral"
    fusion_kernel = _shape(shapes, f"{lateral}.conv.weight", 5)[2]
    found: dict[str, Any] = {
        "slow": slow,
        "fast": fast,
        "fusion_kernel": fusion_kernel,
        "lateral_norm": f"{lateral}.bn.weight" in shapes,
    }
    if "cls_head.fc_cls.weight" in shapes:
        found["num_classes"] = _shape(shapes, "cls_head.fc_cls.weight", 2)[0]
    likely = _likely(source, slow, fusion_kernel, found.get("num_classes"))
    config = SlowFastConfig(**{**likely, **_BEHAVIOUR[source], **recorded, **found})
    return Description(config, tuple(name for name in likely if name not in recorded))


def _likely(source: str, slow: PathwayConfig, fusion_kernel: int, num_classes: int | None) -> dict[str, Any]:
    """Frame rates and clip length, which leave no trace in the weights, after the published networks.

    4x16 networks have fusion kernel 5, 8x8 ones 7; the depth-101 networks of FAIR are 8x8 or 16x8 with kernel 5. Those
    with 174 classes (Something-Something), and pytorchvideo's with both pathways of depth 101 and temporal kernels in
    only 6 blocks of the third stage, take 64 frames.
    """
    rate = 8 if fusion_kernel == 5 and (source == "mmaction2" or slow.depth == 50) else 4
    partial_stage = slow.depth == 101 and slow.temporal_kernels[2] == (3,) * 6 + (1,) * 17
    clip_len = 64 if num_classes == 174 or (partial_stage and source == "pytorchvideo") else 32
    return {"resample_rate": rate, "speed_ratio": rate, "clip_len": clip_len}


def _pathway(shapes: dict[str, tuple[int, ...]], name: str) -> PathwayConfig:
    prefix = f"backbone.{name}"
    stem = _shape(shapes, f"{prefix}.conv1.conv.weight", 5)
    blocks = [0] * 4
    for match in filter(None, map(re.compile(rf"{prefix}\.layer([1-4])\.(\d+)\.").match, shapes)):
        stage, block = int(match[1]) - 1, int(match[2])
        blocks[stage] = max(blocks[stage], block + 1)
    basic = f"{prefix}.layer1.0.conv3.conv.weight" not in shapes
    depth = next(
        (
            depth
            for depth, per_stage in BLOCKS_PER_STAGE.items()
            if per_stage == tuple(blocks) and (depth in BASIC_BLOCK_DEPTHS) == basic
        ),
        None,
    )
    if depth is None:
        raise ValueError(
            f"load_checkpoint: the {name} must have the stages of a ResNet-18, 34, 50, 101 or 152, "
            f"got {tuple(blocks)} {'basic blocks' if basic else 'bottlenecks'}"
        )
    kernels = tuple(
        tuple(_shape(shapes, f"{prefix}.layer{stage}.{block}.conv1.conv.weight", 5)[2] for block in range(count))
        for stage, count in enumerate(blocks, 1)
    )
    return PathwayConfig(depth, base_channels=stem[0], stem_temporal_kernel=stem[2], temporal_kernels=kernels)


def _shape(shapes: dict[str, tuple[int, ...]], name: str, rank: int) -> tuple[int, ...]:
    shape = shapes.get(name)
    if shape is None or len(shape) != rank:
        raise ValueError(f"load_checkpoint: {name} must be in the checkpoint with {rank} dimensions, got {shape}")
    return shape
