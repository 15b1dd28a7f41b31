"""Precise batch norm: running statistics that are a mean over many batches instead of a moving average."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..models import SubBatchNorm3d


@torch.no_grad()
def update_statistics(model: nn.Module, clips: Iterable[Tensor], count: int) -> None:
    """Set the running statistics of all batch norms to the mean over ``count`` batches of mean and unbiased variance.

    The weights stay fixed, as the moving average of training cannot have it. Each process uses its own batches; nothing
    is exchanged (other than by synchronised batch norm).
    Wu and Johnson, "Rethinking 'Batch' in BatchNorm" (arXiv 2105.07576), section 3.

    Args:
        model: whose ``forward`` takes a clip; its modes and momenta are restored.
        clips: at least ``count`` normalised Tensor[N, 3, T, H, W].

    Raises:
        ValueError: fewer batches; the statistics are then as they were.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return
    sums = [(torch.zeros_like(norm.running_mean), torch.zeros_like(norm.running_var)) for norm in norms]
    before = [{name: value.clone() for name, value in norm.state_dict().items()} for norm in norms]
    seen = 0
    with ExitStack() as restoring:
        restoring.callback(model.train, model.training)
        for norm in norms:
            restoring.callback(setattr, norm, "momentum", norm.momentum)
            norm.momentum = 1.0
            if isinstance(norm, SubBatchNorm3d):  # the statistics of whole batches are wanted
                restoring.callback(norm.set_splits, norm.splits)
                norm.set_splits(1)
        model.train()
        for clip in clips:
            model(clip)
            seen += 1
            for norm, (mean, variance) in zip(norms, sums, strict=True):
                if isinstance(norm, SubBatchNorm3d):
                    norm.aggregate()
                mean.add_(norm.running_mean)
                variance.add_(norm.running_var)
            if seen == count:
                break
        for norm, (mean, variance), old in zip(norms, sums, before, strict=True):
            if seen < count:
                norm.load_state_dict(old)
                continue
            norm.running_mean.copy_(mean / count)
            norm.running_var.copy_(variance / count)
    if seen < count:
        raise ValueError(f"precise BN: the training loader must have at least {count} batches, got {seen}")
