"""Backbone and head as one network."""

from __future__ import annotations

from torch import Tensor, nn

from .config import SlowFastConfig
from .head import SlowFastHead
from .slowfast import SlowFastBackbone


class SlowFastRecognizer(nn.Module):
    """A SlowFast network from normalised clips to class scores. State-dict keys are mmaction2's.

    Attributes:
        config (SlowFastConfig): the architecture and the clips it was trained on.
        backbone (SlowFastBackbone): ``(slow, fast)`` feature maps.
        cls_head, head (SlowFastHead): the classifier, under mmaction2's name and a short one.
    """

    def __init__(self, config: SlowFastConfig):
        super().__init__()
        self.config = config
        self.backbone = SlowFastBackbone(config)
        self.cls_head = SlowFastHead(config)

    @property
    def head(self) -> SlowFastHead:
        return self.cls_head

    def forward(self, clip: Tensor) -> Tensor:
        """Tensor[N, 3, T, H, W], normalised and floating point -> logits Tensor[N, num_classes]."""
        return self.cls_head(self.backbone(clip))
