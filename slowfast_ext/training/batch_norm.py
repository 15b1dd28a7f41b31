"""Where the batch norms of a model take their statistics."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from ..models import SubBatchNorm3d, SyncBatchNorm3d


def convert_batch_norm(model: nn.Module, norm: str, splits: int = 1) -> nn.Module:
    """Change where the batch norms of ``model`` take their statistics, in place; parameters stay the same objects.

    Args:
        norm: "batch": of the process's batch, nothing changes. "sync": of the batches of all processes, if there are
            several. "sub_batch": of ``splits`` parts of the process's batch.
    """
    if norm == "sync" and dist.is_initialized() and dist.get_world_size() > 1:
        if next(model.parameters()).is_cuda:
            return nn.SyncBatchNorm.convert_sync_batchnorm(model)
        for module in model.modules():
            if type(module) is nn.BatchNorm3d:
                module.__class__ = SyncBatchNorm3d
    elif norm == "sub_batch":
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if type(child) is nn.BatchNorm3d:
                    setattr(parent, name, SubBatchNorm3d.from_batch_norm(child, splits))
    return model


def sub_batch_norms(model: nn.Module) -> dict[str, SubBatchNorm3d]:
    """By name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SubBatchNorm3d)}
