"""What a whole SlowFast network is, as data: architecture, and the input it was trained on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

# Blocks of the four residual stages (He et al., "Deep Residual Learning", table 1).
BLOCKS_PER_STAGE = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
BASIC_BLOCK_DEPTHS = (18, 34)


@dataclass(frozen=True)
class Normalization:
    """Per-channel mean and standard deviation, RGB, on the 0 to 255 scale: ``(pixel - mean) / std``."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


# mmaction2's choice, the ImageNet statistics; and that of PySlowFast and pytorchvideo, 0.45 and 0.225 times 255.
IMAGENET = Normalization((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
UNIFORM = Normalization((114.75, 114.75, 114.75), (57.375, 57.375, 57.375))


@dataclass(frozen=True)
class PathwayConfig:
    """One pathway: a 3-D ResNet.

    Args:
        depth: 18 or 34 (basic blocks), 50, 101 or 152 (bottlenecks).
        base_channels: output channels of the stem; stage ``s`` has ``base_channels * 2**s`` (times 4 for bottlenecks).
        stem_temporal_kernel: the stem is ``(this, 7, 7)``.
        temporal_kernels: for each of the four stages the temporal kernel of its blocks, one odd number for the stage or
            one a block (a bottleneck has it in its first convolution, a basic block in both).
    """

    depth: int
    base_channels: int
    stem_temporal_kernel: int
    temporal_kernels: tuple[int | tuple[int, ...], ...]

    def __post_init__(self):
        if self.depth not in BLOCKS_PER_STAGE:
            raise ValueError(f"PathwayConfig: depth must be one of {sorted(BLOCKS_PER_STAGE)}, got {self.depth}")
        if self.base_channels < 1:
            raise ValueError(f"PathwayConfig: base_channels must be positive, got {self.base_channels}")
        if len(self.temporal_kernels) != 4:
            raise ValueError(f"PathwayConfig: temporal_kernels must have 4 stages, got {self.temporal_kernels}")
        # Stored one a block, so that equal networks have equal configurations.
        kernels = tuple(
            (stage,) * blocks if isinstance(stage, int) else tuple(stage)
            for stage, blocks in zip(self.temporal_kernels, BLOCKS_PER_STAGE[self.depth], strict=True)
        )
        if tuple(map(len, kernels)) != BLOCKS_PER_STAGE[self.depth]:
            raise ValueError(
                f"PathwayConfig: temporal_kernels must have {BLOCKS_PER_STAGE[self.depth]} blocks a stage "
                f"for depth {self.depth}, got {tuple(map(len, kernels))}"
            )
        for kernel in (self.stem_temporal_kernel, *(kernel for stage in kernels for kernel in stage)):
            if kernel < 1 or kernel % 2 == 0:
                raise ValueError(f"PathwayConfig: temporal kernels must be odd and positive, got {kernel}")
        object.__setattr__(self, "temporal_kernels", kernels)

    @property
    def expansion(self) -> int:
        """Output channels of a block over its inner channels."""
        return 1 if self.depth in BASIC_BLOCK_DEPTHS else 4

    @property
    def channels(self) -> tuple[int, ...]:
        """Output channels of the stem and of the four stages."""
        return self.base_channels, *(self.base_channels * 2**stage * self.expansion for stage in range(4))


def slow_pathway(depth: int) -> PathwayConfig:
    """The published slow pathway: no temporal filtering before the last two stages."""
    return PathwayConfig(depth, base_channels=64, stem_temporal_kernel=1, temporal_kernels=(1, 1, 3, 3))


def fast_pathway(depth: int) -> PathwayConfig:
    """The published fast pathway: an eighth of the channels, temporal filtering everywhere."""
    return PathwayConfig(depth, base_channels=8, stem_temporal_kernel=5, temporal_kernels=(3, 3, 3, 3))


@dataclass(frozen=True)
class SlowFastConfig:
    """A SlowFast network and the clips it was trained on.

    Args:
        slow, fast: the two pathways.
        resample_rate: the slow pathway sees one in this many frames of the clip (tau).
        speed_ratio: frames of the fast pathway over frames of the slow one (alpha); divides ``resample_rate``.
        fusion_kernel: temporal kernel of the lateral convolutions, odd.
        lateral_norm: lateral convolutions are followed by batch norm and ReLU.
        frame_sampling: which frames the slow pathway sees. ``"strided"``: 0, r, 2r, ... (mmaction2). ``"linspace"``:
            from the first to the last frame, positions rounded down (PySlowFast, pytorchvideo).
        num_classes: width of the classifier.
        dropout: probability in front of the classifier.
        head_pooling: ``"global"``: average over the whole map, then classify (mmaction2). ``"sliding"``: classify every
            position of a sliding window and average the logits (pytorchvideo). ``"sliding_softmax"``: average
            the probabilities (PySlowFast); the network then returns the logarithm of that average.
        head_window: height and width of the sliding window, in positions of the last feature map.
        zero_init_residual: every residual branch starts as zero (its last batch norm has weight 0).
        normalization: what was subtracted from and divided out of the pixels.
        clip_len, frame_interval: frames a clip, and their spacing in the video.
        test_clips, test_crops: views of a video at test time: clips spread over it times crops of each (1 or 3).
        test_short_side, test_crop_size: pixels to which frames are resized, and side of the square crop.
    """

    slow: PathwayConfig
    fast: PathwayConfig
    resample_rate: int
    speed_ratio: int
    fusion_kernel: int
    lateral_norm: bool = False
    frame_sampling: str = "strided"
    num_classes: int = 400
    dropout: float = 0.5
    head_pooling: str = "global"
    head_window: tuple[int, int] = (7, 7)
    zero_init_residual: bool = True
    normalization: Normalization = IMAGENET
    clip_len: int = 32
    frame_interval: int = 2
    test_clips: int = 10
    test_crops: int = 3
    test_short_side: int = 256
    test_crop_size: int = 256

    def __post_init__(self):
        for name in ("resample_rate", "speed_ratio", "fusion_kernel", "num_classes", "clip_len", "frame_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"SlowFastConfig: {name} must be positive, got {getattr(self, name)}")
        if self.resample_rate % self.speed_ratio:
            raise ValueError(
                f"SlowFastConfig: resample_rate must be a multiple of speed_ratio ({self.speed_ratio}), "
                f"got {self.resample_rate}"
            )
        if self.fusion_kernel % 2 == 0:
            raise ValueError(f"SlowFastConfig: fusion_kernel must be odd, got {self.fusion_kernel}")
        _check_choice("frame_sampling", self.frame_sampling, ("strided", "linspace"))
        if self.frame_sampling == "linspace" and self.resample_rate != self.speed_ratio:
            raise ValueError("SlowFastConfig: linspace sampling needs resample_rate equal to speed_ratio")
        _check_choice("head_pooling", self.head_pooling, ("global", "sliding", "sliding_softmax"))
        if not 0 <= self.dropout < 1:
            raise ValueError(f"SlowFastConfig: dropout must be in [0, 1), got {self.dropout}")

    def slow_frames(self, frames: int) -> list[int]:
        """Which of ``frames`` frames the slow pathway sees."""
        count = frames // self.resample_rate
        if self.frame_sampling == "strided":
            return [index * self.resample_rate for index in range(count)]
        return [index * (frames - 1) // max(count - 1, 1) for index in range(count)]

    def to_dict(self) -> dict:
        """Plain dicts, lists and numbers, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> SlowFastConfig:
        """The inverse of :meth:`to_dict`; ValueError or TypeError if ``values`` describes no network."""
        values = _tuples(values)
        for name in ("slow", "fast"):
            values[name] = PathwayConfig(**values[name])
        values["normalization"] = Normalization(**values["normalization"])
        return cls(**values)


def _tuples(value):
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _check_choice(name: str, value: str, choices: tuple[str, ...]):
    if value not in choices:
        raise ValueError(f"SlowFastConfig: {name} must be one of {choices}, got {value!r}")
