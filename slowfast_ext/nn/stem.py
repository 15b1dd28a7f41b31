"""The first layer of a pathway with its pooling, as one operator."""

from __future__ import annotations

from torch import Tensor, nn

from .. import ops
from .block import call_reason, compute_dtype
from .conv import FusedConvolutions
from .training import Part, train_block


class FusedStem(FusedConvolutions):
    """Twin of ``maxpool(relu(bn(conv(x))))``: one operator call where :func:`~slowfast_ext.ops.stem` knows the
    geometry, else one for the convolution, and the pooling.

    Args:
        plain: a block with children ``conv``, ``bn`` (or None) and ``maxpool``, and the flag ``relu``.
    """

    takes_out = True
    takes_lateral = True

    @classmethod
    def _children_reason(cls, module: nn.Module) -> str | None:
        maxpool = module.maxpool
        if type(maxpool) is not nn.MaxPool3d:
            return f"maxpool is a {type(maxpool).__name__}, not a MaxPool3d"
        if maxpool.return_indices:
            return "maxpool returns indices"
        reason = call_reason(maxpool)
        return super()._children_reason(module) if reason is None else f"maxpool {reason}"

    @property
    def out_channels(self) -> int:
        return self.conv.out_channels

    def fused_forward(self, x: Tensor, frames: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Tensor[N, 3, T, H, W] -> Tensor[N, K, T', H / 4, W / 4], of the frames of these indices if given."""
        reason = "it has no ReLU" if not self.relu else ops.stem_reason_against(self.conv, self.maxpool)
        self._note_layer_by_layer(reason)
        if reason is not None:
            return self.maxpool(self._convolve("", x if frames is None else x.index_select(2, frames)))
        return ops.stem(x, *self._folded(""), frames=frames, out=out)

    def training_forward(
        self, x: Tensor, frames: Tensor | None = None, lateral: Part | None = None, fast: Tensor | None = None
    ) -> Tensor:
        """As :meth:`fused_forward`; with the lateral connection behind the stem, if given, in one tensor."""
        x = x if frames is None else x.index_select(2, frames)
        dtype = compute_dtype(self.conv.weight)
        return train_block(x, [self._trained_part("")], dtype, pool=self.maxpool, lateral=lateral, fast=fast)

    def _plain_forward(self, x: Tensor, frames: Tensor | None = None) -> Tensor:
        return super()._plain_forward(x if frames is None else x.index_select(2, frames))
