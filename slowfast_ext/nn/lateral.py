"""The lateral connection without a concatenation."""

import torch
from torch import Tensor

from .block import FusedBlock, compute_dtype


class FusedLateral(FusedBlock):
    """Twin of ``cat([slow, relu(bn(conv(fast)))], 1)``: the convolution writes into its channels of the result.

    Args:
        plain: a block with children ``conv`` and ``bn`` (or None) and the flag ``relu``.
    """

    def fused_forward(self, slow: Tensor, fast: Tensor) -> Tensor:
        """Tensor[N, Cs, T, H, W], Tensor[N, Cf, T', H, W] -> Tensor[N, Cs + K, T, H, W]."""
        recording = torch.is_grad_enabled() and (slow.requires_grad or fast.requires_grad)
        if recording or slow.dtype != compute_dtype(self.conv.weight):  # the operator writes without gradients
            return torch.cat([slow, self._convolve("", fast)], 1)
        slow_channels = slow.shape[1]
        fused = torch.empty(
            (slow.shape[0], slow_channels + self.conv.out_channels, *slow.shape[2:]),
            dtype=slow.dtype,
            device=slow.device,
            memory_format=torch.channels_last_3d,
        )
        fused[:, :slow_channels].copy_(slow)
        self._convolve("", fast, out=fused[:, slow_channels:])
        return fused
