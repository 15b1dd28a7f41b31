"""Weights with the batch norm folded in, kept for as long as nothing they were made from changes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import fold_batch_norm


def fold(conv: nn.Conv3d, bn: nn.BatchNorm3d | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weight in ``dtype`` and channels_last_3d, rounded once, and bias as ``conv3d_bn_relu`` takes them."""
    weight, bias = fold_batch_norm(conv.weight, conv.bias, bn)
    return weight.to(dtype=dtype, memory_format=torch.channels_last_3d), bias


class FoldedWeights:
    """Folded weight and bias of one convolution and its batch norm, computed when first asked for and after a change.

    What counts as a change: another tensor or storage in the place of a parameter or running statistic (``.to()``,
    ``.half()``, ``p.data = ...``, a new ``nn.Parameter``), an in-place edit of one (an optimiser's step,
    ``load_state_dict``, training), another ``eps``, another dtype asked for. An in-place edit *through* ``p.data`` is
    hidden from torch's version counters, hence from this cache: edit under ``torch.no_grad()`` instead.

    Parameters created under ``torch.inference_mode()`` have no version counter; they are folded anew at each call.
    Copies and pickles of a cache are empty.
    """

    def __init__(self):
        self._entry = None

    def __reduce__(self):
        return FoldedWeights, ()

    def get(self, conv: nn.Conv3d, bn: nn.BatchNorm3d | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight in ``dtype`` (channels_last_3d) and bias. Without gradients for the module's parameters."""
        if torch.compiler.is_compiling():
            return fold(conv, bn, dtype)  # a cached constant would outlive a change of the parameters
        # Batch norm does not count its updates of the running statistics as versions, but those of its step counter.
        sources = (conv.weight, conv.bias)
        if bn is not None:
            sources += (bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.num_batches_tracked)
        try:
            state = [None if tensor is None else (tensor._version, tensor.data_ptr()) for tensor in sources]
        except RuntimeError:  # inference tensors; wrappers of torch.func, which have no storage
            return fold(conv, bn, dtype)
        state.append((dtype, None if bn is None else bn.eps))
        entry = self._entry  # read and written as one, for threads of DataParallel
        if entry is not None and entry[1] == state and all(a is b for a, b in zip(entry[0], sources, strict=True)):
            return entry[3]
        with torch.inference_mode(False), torch.no_grad():  # inference tensors could not be saved for a backward
            folded = fold(conv, bn, dtype)
        # With the storages alive no later one can have the same address.
        storages = [None if tensor is None else tensor.untyped_storage() for tensor in sources]
        self._entry = (sources, state, storages, folded)
        return folded

    def clear(self) -> None:
        """Forget the folded copies."""
        self._entry = None
