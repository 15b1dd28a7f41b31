"""Where a batch norm in training takes its statistics, and how its running ones move."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..ops.batch_norm_relu import BatchNormSettings, update_running_statistics

# Class of a batch norm -> what its statistics are, in training; slowfast_ext.accelerate adds to it.
NORMS: dict[type[nn.Module], Callable[[nn.Module], NormState]] = {}


class NormState(NamedTuple):
    """Where a batch norm takes its statistics, and the buffers that follow them.

    Attributes:
        settings: for this forward pass.
        running_mean, running_var (Tensor[splits * C]): are read or written.
    """

    settings: BatchNormSettings
    running_mean: Tensor
    running_var: Tensor


def _plain_state(bn: nn.BatchNorm3d) -> NormState:
    return NormState(BatchNormSettings(bn.training, bn.eps), bn.running_mean, bn.running_var)


def synchronised_state(bn: nn.BatchNorm3d) -> NormState:
    """Of a batch norm whose statistics are those of all processes."""
    group = None
    if bn.training and dist.is_available() and dist.is_initialized():
        group = getattr(bn, "process_group", None) or dist.group.WORLD
        group = group if dist.get_world_size(group) > 1 else None
    return NormState(BatchNormSettings(bn.training, bn.eps, group=group), bn.running_mean, bn.running_var)


def sub_batch_state(bn: nn.BatchNorm3d) -> NormState:
    """Of a batch norm with ``splits`` groups of clips, whose statistics are ``split_mean`` and ``split_var``."""
    if not bn.training:
        return _plain_state(bn)
    return NormState(BatchNormSettings(True, bn.eps, bn.splits), bn.split_mean, bn.split_var)


NORMS[nn.BatchNorm3d] = _plain_state
NORMS[nn.SyncBatchNorm] = synchronised_state


@torch.no_grad()
def move_statistics(moving: Sequence[tuple[nn.Module, NormState]], moments: Sequence[tuple]) -> None:
    """As :func:`update_running_statistics` for each batch norm of a block, in three launches for all of them."""
    if not moving:
        return
    torch._foreach_add_([bn.num_batches_tracked for bn, _ in moving], 1)
    alike = len({bn.momentum for bn, _ in moving}) == 1 and all(isinstance(count, int) for _, _, count in moments)
    if moving[0][0].momentum is None or not alike:
        for (bn, state), (mean, variance, count) in zip(moving, moments, strict=True):
            momentum = 1 / int(bn.num_batches_tracked) if bn.momentum is None else bn.momentum
            update_running_statistics(state.running_mean, state.running_var, mean, variance, count, momentum)
    elif all(count > 0 for _, _, count in moments):
        unbiased = torch._foreach_mul([variance for _, variance, _ in moments], [n / (n - 1) for _, _, n in moments])
        running = [statistic for _, state in moving for statistic in (state.running_mean, state.running_var)]
        batch = [
            one.view(-1) for (mean, _, _), variance in zip(moments, unbiased, strict=True) for one in (mean, variance)
        ]
        batch = [one.to(statistic.dtype) for one, statistic in zip(batch, running, strict=True)]
        torch._foreach_lerp_(running, batch, moving[0][0].momentum)
