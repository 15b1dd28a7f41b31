"""Batch norm over part of a batch, and over the batches of all processes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class SubBatchNorm3d(nn.BatchNorm3d):
    """Batch norm with the statistics of ``splits`` parts of the batch, for batches larger than the recipe's.

    Part j of n are the samples j, j + n, j + 2n, ...; all share the affine parameters. Each part has running statistics
    of its own; :meth:`aggregate` makes one of them, which evaluation uses. State-dict keys are those of batch norm.
    Wu et al., "A Multigrid Method for Efficiently Training Video Models", section 3.

    Attributes:
        splits: parts; the batch must be a multiple.
        split_mean, split_var (Tensor[splits * C]): running statistics of the parts, not in the state dict.
    """

    def __init__(self, num_features: int, splits: int = 1, **kwargs):
        super().__init__(num_features, **kwargs)
        self.splits = splits
        self.register_buffer("split_mean", self.running_mean.repeat(splits), persistent=False)
        self.register_buffer("split_var", self.running_var.repeat(splits), persistent=False)

    @classmethod
    def from_batch_norm(cls, norm: nn.BatchNorm3d, splits: int) -> SubBatchNorm3d:
        """With the parameters (the same objects) and the statistics of ``norm``."""
        result = cls(norm.num_features, splits, eps=norm.eps, momentum=norm.momentum).to(norm.weight.device)
        result.weight, result.bias = norm.weight, norm.bias
        result.running_mean, result.running_var = norm.running_mean, norm.running_var
        result.num_batches_tracked = norm.num_batches_tracked
        result.set_splits(splits)
        return result

    def set_splits(self, splits: int) -> None:
        """Change the number of parts; each begins with the aggregated statistics."""
        self.splits = splits
        self.split_mean, self.split_var = self.running_mean.repeat(splits), self.running_var.repeat(splits)

    def aggregate(self) -> None:
        """Running statistics of the whole: mean of the means; mean of the variances plus variance of the means."""
        means, variances = self.split_mean.view(self.splits, -1), self.split_var.view(self.splits, -1)
        self.running_mean.copy_(means.mean(0))
        self.running_var.copy_(variances.mean(0) + means.var(0, unbiased=False))

    def forward(self, x: Tensor) -> Tensor:
        """Tensor[N, C, T, H, W] -> the same shape."""
        if not self.training:
            return super().forward(x)
        if x.shape[0] % self.splits:
            raise ValueError(f"SubBatchNorm3d: the batch must be a multiple of {self.splits}, got {x.shape[0]}")
        self.num_batches_tracked.add_(1)
        grouped = x.reshape(x.shape[0] // self.splits, -1, *x.shape[2:])
        weight, bias = self.weight.repeat(self.splits), self.bias.repeat(self.splits)
        y = F.batch_norm(grouped, self.split_mean, self.split_var, weight, bias, True, self.momentum, self.eps)
        return y.view(x.shape)


class SyncBatchNorm3d(nn.BatchNorm3d):
    """Batch norm over the batches of all processes, for CPUs, which torch's own does not serve.

    Needs a process group, and sums in the precision of the input.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Tensor[N, C, T, H, W] -> the same shape."""
        if not self.training:
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        local = torch.cat([x.new_full((1,), x.numel() // x.shape[1]), x.sum((0, 2, 3, 4))])
        total = all_reduce(local)
        count, mean = total[0].detach(), total[1:] / total[0].detach()
        centred = x - mean.view(1, -1, 1, 1, 1)
        variance = all_reduce(centred.square().sum((0, 2, 3, 4))) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return centred * scale.view(1, -1, 1, 1, 1) + self.bias.view(1, -1, 1, 1, 1)
