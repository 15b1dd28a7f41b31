"""The classification head as one operator."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from .block import DTYPES, FusedBlock, backend_reason, call_reason, compute_dtype, recording_reason


class FusedHead(FusedBlock):
    """Twin of a head that averages both pathways' features and classifies ``[fast, slow]``: one operator call.

    Args:
        plain: a block with children ``dropout`` and ``fc_cls`` and the attributes ``pooling`` ("global", "sliding" or
            "sliding_softmax") and ``window``.
    """

    @classmethod
    def _children_reason(cls, module: nn.Module) -> str | None:
        for name, known in (("dropout", nn.Dropout), ("fc_cls", nn.Linear)):
            child = getattr(module, name)
            if type(child) is not known:
                return f"{name} is a {type(child).__name__}, not a {known.__name__}"
            reason = call_reason(child)
            if reason is not None:
                return f"{name} {reason}"
        weight = module.fc_cls.weight
        if weight.dtype not in DTYPES:
            return f"fc_cls has weights in {weight.dtype}"
        return backend_reason(weight.device, weight.dtype)

    def _state_reason(self) -> str | None:
        if self.dropout.training:
            return "dropout is in training mode"
        return recording_reason(self.fc_cls.weight, self.fc_cls.bias)

    def fused_forward(self, features: tuple[Tensor, Tensor]) -> Tensor:
        """``(slow, fast)``, each Tensor[N, C, T, H, W] of its own C and T -> logits Tensor[N, num_classes]."""
        slow, fast = features
        window = None if self.pooling == "global" else self.window
        small = window is not None and any(x.shape[3] < window[0] or x.shape[4] < window[1] for x in features)
        if small or slow.dtype != fast.dtype:
            return self._plain_forward(features)  # which says what is wrong, or promotes
        weight, bias = self.fc_cls.weight, self.fc_cls.bias
        bias = None if bias is None else bias.to(torch.float64 if slow.dtype == torch.float64 else torch.float32)
        softmax = self.pooling == "sliding_softmax"
        logits = ops.pool_head(slow, fast, weight, bias, window=window, softmax_positions=softmax)
        # Autocast keeps logarithms of probabilities in float32 on CUDA, though not on a CPU.
        wide = softmax and weight.is_cuda and torch.is_autocast_enabled("cuda")
        return logits if wide else logits.to(compute_dtype(weight))
