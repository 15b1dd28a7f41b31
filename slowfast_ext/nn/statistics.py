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
    """Count a batch in each batch norm of a block, and move its running statistics; in three launches for all of them,
    unless they differ in momentum."""
    if not moving:
        return
    torch._foreach_add_([bn.num_batches_tracked for bn, _ in moving], 1)
    momenta = [1 / int(bn.num_batches_tracked) if bn.momentum is None else bn.momentum for bn, _ in moving]
    running = [(state.running_mean, state.running_var) for _, state in moving]
    if len(set(momenta)) == 1:
        update_running_statistics(running, moments, momenta[0])
        return
    for one, moment, momentum in zip(running, moments, momenta, strict=True):
        update_running_statistics([one], [moment], momentum)
