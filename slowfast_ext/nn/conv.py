"""Convolution, batch norm and ReLU as one operator."""

from torch import Tensor

from .block import FusedBlock


class FusedConvBNReLU3d(FusedBlock):
    """Twin of a block that is ``relu(bn(conv(x)))``.

    Args:
        plain: a block with children ``conv`` and ``bn`` (or None) and the flag ``relu``.
    """

    def fused_forward(self, x: Tensor) -> Tensor:
        """Tensor[N, C, T, H, W] -> Tensor[N, K, T', H', W']."""
        return self._convolve("", x)
