"""The classification head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import SlowFastConfig


class SlowFastHead(nn.Module):
    """Average both pathways, concatenate ``[fast, slow]`` (mmaction2's order), drop out, classify.

    ``config.head_pooling`` decides what is averaged:

    - ``"global"``: the features, over the whole map. Returns logits.
    - ``"sliding"``: the features in a window that slides with stride 1, classified at each position; then the logits.
    - ``"sliding_softmax"``: as before, but the probabilities. Returns the logarithm of the average probability, so that
      ``softmax`` of the result is exactly that average, and cross-entropy its negative log-likelihood.

    The sliding window spans all frames and ``config.head_window`` positions; a smaller map is an error, as it is in the
    systems this pooling comes from. With a map of the window's size all three agree up to a constant of the logits.
    """

    def __init__(self, config: SlowFastConfig):
        super().__init__()
        self.pooling = config.head_pooling
        self.window = config.head_window
        self.dropout = nn.Dropout(config.dropout)
        self.fc_cls = nn.Linear(config.fast.channels[-1] + config.slow.channels[-1], config.num_classes)
        self.init_weights()

    def init_weights(self):
        nn.init.normal_(self.fc_cls.weight, std=0.01)
        nn.init.zeros_(self.fc_cls.bias)

    def forward(self, features: tuple[Tensor, Tensor]) -> Tensor:
        """``(slow, fast)``, each Tensor[N, C, T, H, W] of its own C and T -> logits Tensor[N, num_classes]."""
        slow, fast = features
        if self.pooling == "global":
            pooled = torch.cat([fast.mean((2, 3, 4)), slow.mean((2, 3, 4))], 1)
            return self.fc_cls(self.dropout(pooled))
        pooled = torch.cat([self._slide(fast), self._slide(slow)], 1)
        logits = self.fc_cls(self.dropout(pooled.flatten(2).transpose(1, 2)))  # N, positions, classes
        if self.pooling == "sliding":
            return logits.mean(1)
        positions = logits.new_full((), logits.shape[1])  # a tensor, which a trace does not take for a constant
        return logits.log_softmax(2).logsumexp(1) - positions.log()

    def _slide(self, x: Tensor) -> Tensor:
        """Tensor[N, C, T, H, W] -> Tensor[N, C, H - window + 1, W - window + 1]."""
        if x.shape[3] < self.window[0] or x.shape[4] < self.window[1]:
            raise ValueError(
                f"SlowFastHead: the feature map must be at least as large as the sliding window {self.window}, "
                f"got {tuple(x.shape[3:])} (a position is 32 x 32 pixels); use larger crops or head_pooling='global'"
            )
        return F.avg_pool2d(x.mean(2), self.window, stride=1)

    def extra_repr(self) -> str:
        return f"pooling={self.pooling!r}" + ("" if self.pooling == "global" else f", window={self.window}")
