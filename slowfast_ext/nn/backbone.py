"""Both pathways, their features joined where they are made."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .block import FusedBlock, call_reason, compute_dtype
from .lateral import FusedLateral
from .stem import FusedStem


class FusedSlowFastBackbone(FusedBlock):
    """Twin of the two-pathway backbone: no concatenation, and no copy of the frames of the slow pathway.

    Each lateral connection gets a tensor into whose first channels the last block before it, or the stem, writes, and
    into whose others it writes itself. Blocks keep their hooks; where a block or lateral connection is not fused, or a
    hook gives another tensor, that junction concatenates. In training the last block before a lateral connection
    computes both, in one tensor; without a forward pass for training all junctions concatenate.

    Args:
        plain: a block with children ``slow_path`` and ``fast_path``, which have ``conv1``, ``stages`` and (the slow
            one) ``laterals``; with methods ``check_clip``, ``split`` and ``linspace_frames``, and ``config``.
    """

    nested = True
    own = (*FusedBlock.own, "slow_frames")

    def __init__(self, plain: nn.Module):
        super().__init__(plain)
        self.slow_frames: dict[tuple[int, torch.device], Tensor] = {}  # by frames of the clip: indices on the device

    @classmethod
    def _children_reason(cls, module: nn.Module) -> str | None:
        return None

    def _state_reason(self) -> str | None:
        if torch.is_grad_enabled():
            return "gradients may be recorded, the blocks are fused one by one (torch.inference_mode() turns that off)"
        return None

    def fused_forward(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        """Tensor[N, 3, T, H, W] -> (slow, fast), each Tensor[N, C, T', H / 32, W / 32] of its own C and T'."""
        type(self.plain).check_clip(self, clip)
        slow_path, fast_path = self.slow_path, self.fast_path
        x, fast, selection = self._frames(clip)
        producer, fast = slow_path.conv1, fast_path.conv1(fast)
        for lateral, slow_stage, fast_stage in zip(slow_path.laterals, slow_path.stages, fast_path.stages, strict=True):
            joined = _join(producer, x, selection, lateral, fast)
            producer, x = _last_block(slow_stage, joined)
            selection = {}
            fast = fast_stage(fast)
        return producer(x), fast

    def _training_reason(self) -> str | None:
        return self._children_reason(self)

    def training_forward(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`fused_forward`."""
        type(self.plain).check_clip(self, clip)
        slow_path, fast_path = self.slow_path, self.fast_path
        x, fast = type(self.plain).split(self, clip)
        producer, fast = slow_path.conv1, fast_path.conv1(fast)
        for lateral, slow_stage, fast_stage in zip(slow_path.laterals, slow_path.stages, fast_path.stages, strict=True):
            producer, x = _last_block(slow_stage, _join_in_training(producer, x, lateral, fast))
            fast = fast_stage(fast)
        return producer(x), fast

    def _frames(self, clip: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The inputs of the slow and the fast stem, and as a keyword which frames the slow one selects."""
        stem = self.slow_path.conv1
        views = self.config.frame_sampling == "strided"
        if views or not isinstance(stem, FusedStem) or call_reason(stem) is not None:  # a hook sees the frames
            return *type(self.plain).split(self, clip), {}
        key = (clip.shape[2], clip.device)
        if torch.compiler.is_compiling():
            frames = type(self.plain).linspace_frames(self, *key)
        elif key in self.slow_frames:
            frames = self.slow_frames[key]
        else:
            with torch.inference_mode(False):
                frames = type(self.plain).linspace_frames(self, *key)
            self.slow_frames[key] = frames
        return clip, clip, {"frames": frames}  # linspace shows the fast pathway all frames


def _last_block(stage: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    """The module whose result is that of ``stage``, and its input, after what lies before it has run."""
    if type(stage) is not nn.Sequential or call_reason(stage) is not None:
        return stage, x
    *blocks, last = stage
    for block in blocks:
        x = block(x)
    return last, x


def _join(producer: nn.Module, x: Tensor, selection: dict[str, Tensor], lateral: nn.Module, fast: Tensor) -> Tensor:
    """``lateral(producer(x), fast)``; the two write into one tensor where both are fused."""
    fused = isinstance(producer, FusedBlock) and producer.takes_out and isinstance(lateral, FusedLateral)
    if (
        not fused
        or call_reason(lateral) is not None  # a hook may give it other slow features
        or compute_dtype(next(producer.parameters())) != compute_dtype(lateral.conv.weight)
    ):
        return lateral(producer(x, **selection), fast)
    room = lateral.room(producer.out_channels, fast)
    place = room[:, : producer.out_channels]
    slow = producer(x, **selection, out=place)
    return lateral(slow, fast, out=room) if slow is place else lateral(slow, fast)


def _join_in_training(producer: nn.Module, x: Tensor, lateral: nn.Module, fast: Tensor) -> Tensor:
    """``lateral(producer(x), fast)``; the producer computes both where it trains and the lateral connection can."""
    if (
        not (isinstance(producer, FusedBlock) and producer.takes_lateral and producer.trains_now())
        or not (isinstance(lateral, FusedLateral) and lateral.joins_in_training())
        or compute_dtype(next(producer.parameters())) != compute_dtype(lateral.conv.weight)
    ):
        return lateral(producer(x), fast)
    if not torch.compiler.is_compiling():
        producer.last_forward = lateral.last_forward = "fused"
    return producer.training_forward(x, lateral=lateral.part, fast=fast)
