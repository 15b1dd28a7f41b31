"""The lateral connection without a concatenation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from .block import call_reason, compute_dtype
from .conv import FusedConvolutions
from .training import Part, train_block


class FusedLateral(FusedConvolutions):
    """Twin of ``cat([slow, relu(bn(conv(fast)))], 1)``: one operator call writes both parts of the result.

    Args:
        plain: a block with children ``conv``, a k x 1 x 1 convolution with k odd and strided in time only, and ``bn``
            (or None), and the flag ``relu``.
    """

    @classmethod
    def _children_reason(cls, module: nn.Module) -> str | None:
        reason = super()._children_reason(module)
        if reason is not None:
            return reason
        conv, taps = module.conv, module.conv.kernel_size[0]
        geometry = (conv.kernel_size[1:], conv.stride[1:], conv.padding)
        if taps % 2 == 0 or geometry != ((1, 1), (1, 1), (taps // 2, 0, 0)):
            return f"conv has kernel {conv.kernel_size}, stride {conv.stride} and padding {conv.padding}"
        return None

    @property
    def part(self) -> Part:
        """What is done to the fast features, as training takes it."""
        return self._trained_part("")

    def joins_in_training(self) -> bool:
        """Whether the block in front may compute this lateral connection too, instead of a call of this module."""
        bare = self.bn is None and not self.relu
        return (
            self.trains
            and call_reason(self) is None
            and self._children_reason(self) is None
            and (bare or self._training_reason() is None)
        )

    def training_forward(self, slow: Tensor, fast: Tensor) -> Tensor:
        """As :meth:`fused_forward`, with a concatenation; a block takes the lateral connection behind it without."""
        slow = slow.contiguous(memory_format=torch.channels_last_3d)
        return torch.cat([slow, train_block(fast, [self.part], compute_dtype(self.conv.weight))], 1)

    def room(self, slow_channels: int, fast: Tensor) -> Tensor:
        """Uninitialised memory for the result Tensor[N, slow_channels + K, T, H, W] with these fast features."""
        frames = (fast.shape[2] - 1) // self.conv.stride[0] + 1
        shape = (fast.shape[0], slow_channels + self.conv.out_channels, frames, *fast.shape[3:])
        dtype = compute_dtype(self.conv.weight)
        return torch.empty(shape, dtype=dtype, device=fast.device, memory_format=torch.channels_last_3d)

    def fused_forward(self, slow: Tensor, fast: Tensor, out: Tensor | None = None) -> Tensor:
        """Tensor[N, Cs, T, H, W], Tensor[N, Cf, T', H, W] -> Tensor[N, Cs + K, T, H, W].

        ``out`` is of this shape, and ``slow`` its first channels, already in place.
        """
        if slow.dtype != compute_dtype(self.conv.weight):  # a concatenation would be in the wider dtype
            return torch.cat([slow, self._convolve("", fast)], 1)
        weight, bias = self._folded("")
        convolution = {"stride": self.conv.stride[0], "relu": self.relu}
        if out is None:
            return ops.lateral_fuse(slow, fast, weight, bias, **convolution)
        ops.lateral_fuse_into(fast, weight, bias, **convolution, out=out[:, slow.shape[1] :])
        return out
