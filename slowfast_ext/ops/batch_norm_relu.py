"""``relu(batch_norm(x) + residual)`` in training, forwards and backwards, in four passes over memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .batch_norm import (
    batch_norm_apply,
    batch_norm_apply_gradient,
    batch_norm_reduce_gradient,
    batch_norm_statistics,
)
from .common import accumulator_dtype, check


@dataclass(frozen=True)
class BatchNormSettings:
    """How a batch norm comes by its statistics.

    Attributes:
        batch: from the batch; else they are given, and constants to the gradient.
        eps: added to the variance.
        splits: groups of clips with statistics of their own, as in :mod:`slowfast_ext.ops.batch_norm`.
        group: processes whose batches count as one; None: each process by itself.
    """

    batch: bool = True
    eps: float = 1e-5
    splits: int = 1
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class BatchNormForward:
    """What :func:`batch_norm_forward` found out.

    Attributes:
        y (Tensor[N, C, T, H, W]): the result.
        mean, inverse_std (Tensor[splits, C]): what was subtracted and multiplied by.
        variance (Tensor[splits, C]): biased.
        count: elements of a channel in a group, in all processes; a 0-dimensional tensor with a process group.
    """

    y: Tensor
    mean: Tensor
    inverse_std: Tensor
    variance: Tensor
    count: int | Tensor


def batch_norm_relu(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    batch_statistics: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = True,
    splits: int = 1,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Batch norm in training, with the addition and the ReLU that follow it in a residual network.

    Equivalent to::

        y = F.batch_norm(x, running_mean, running_var, weight, bias, batch_statistics, momentum, eps)
        y = y if residual is None else y + residual
        return y.relu() if relu else y

    except that everything is summed in float32 and rounded once. It keeps ``x`` for the gradient, and of the result
    only what a residual hides from ``x``.

    Args:
        x (Tensor[N, C, T, H, W]): float32, float16, bfloat16, on a CPU also float64; any strides, fastest in
            channels_last_3d.
        weight, bias (Tensor[C]): any floating-point dtype; 1 and 0 if None.
        residual (Tensor[N, C, T, H, W]): added before the ReLU, in the dtype of ``x``.
        running_mean, running_var (Tensor[splits * C]): with ``batch_statistics`` they move by ``momentum`` towards the
            statistics of the batch (the variance unbiased), or stay out of it if None; else they are the statistics.
        batch_statistics, momentum, eps: as of :func:`torch.nn.functional.batch_norm`.
        relu: whether the ReLU is applied.
        splits: groups of clips with statistics of their own: clip n is in group n modulo ``splits``.
        group: processes whose batches count as one, as in :class:`torch.nn.SyncBatchNorm`.

    Returns:
        Tensor[N, C, T, H, W]: channels_last_3d, dtype of ``x``.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype or device.
        ValueError: there is a single element for a statistic, or there are no running statistics to use.

    Gradients for x, weight, bias and residual, once.
    """
    _check_arguments(x, weight, bias, residual, running_mean, running_var, splits)
    settings = BatchNormSettings(batch_statistics, eps, splits, group)
    if not batch_statistics and running_mean is None:
        raise ValueError("batch_norm_relu: running_mean and running_var must be given without batch_statistics")
    given = () if batch_statistics else (running_mean, running_var)
    y, mean, variance, count = _BatchNormReLU.apply(settings, relu, x, weight, bias, residual, *given)
    if batch_statistics and running_mean is not None:
        update_running_statistics([(running_mean, running_var)], [(mean, variance, count)], momentum)
    return y


def _check_arguments(x, weight, bias, residual, running_mean, running_var, splits) -> None:
    _check = partial(check, "batch_norm_relu")
    _check(x.dim() == 5, "x", "(N, C, T, H, W)", tuple(x.shape))
    both = (running_mean is None) == (running_var is None)
    _check(both, "running_var", "given exactly with running_mean", "one of them")
    channels = x.shape[1]
    vectors = {"weight": (weight, channels), "bias": (bias, channels)}
    vectors |= {"running_mean": (running_mean, channels * splits), "running_var": (running_var, channels * splits)}
    for name, (vector, size) in vectors.items():
        if vector is not None:
            _check(tuple(vector.shape) == (size,), name, f"({size},)", tuple(vector.shape))
            _check(vector.device == x.device, name, f"on the device of x, {x.device}", vector.device)
    if residual is not None:
        _check(tuple(residual.shape) == tuple(x.shape), "residual", tuple(x.shape), tuple(residual.shape))
        _check(residual.device == x.device, "residual", f"on the device of x, {x.device}", residual.device)


def check_batch(settings: BatchNormSettings, x: Tensor) -> None:
    """Raise ValueError where the variance of one element would be asked for, as torch does."""
    if settings.batch and x.numel() == x.shape[1] * settings.splits and settings.group is None:
        raise ValueError(
            f"batch_norm_relu: x must be more than one element a channel in training, got {tuple(x.shape)}"
            + (f" in {settings.splits} groups" if settings.splits > 1 else "")
        )


def batch_norm_forward(
    x: Tensor,
    settings: BatchNormSettings,
    weight: Tensor | None,
    bias: Tensor | None,
    given: tuple[Tensor, ...] | None = None,
    residual: Tensor | None = None,
    *,
    relu: bool,
    out: Tensor | None = None,
) -> BatchNormForward:
    """The forward passes, without gradients.

    Args:
        x, weight, bias, residual, relu, out: of :func:`~slowfast_ext.ops.batch_norm_apply`.
        given (Tensor[splits, C] each): mean, biased variance and inverse_std of the batch of this process, where the
            kernel that made ``x`` has computed them; or mean and variance to use as constants.
    """
    check_batch(settings, x)
    count = x.numel() // max(x.shape[1] * settings.splits, 1)
    if given is None and settings.group is None and _torch_serves(x, settings.splits) and x.numel():
        arguments = (x.contiguous(memory_format=torch.channels_last_3d), weight, bias, None, None)
        y, mean, inverse_std = torch.native_batch_norm(*arguments, True, 0.0, settings.eps)
        y = _finish(y, residual, relu, out)
        variance = inverse_std.square().reciprocal_().sub_(settings.eps).clamp_(min=0)
        return BatchNormForward(y, mean[None], inverse_std[None], variance[None], count)
    given = batch_norm_statistics(x, settings.splits, settings.eps) if given is None else given
    mean, variance, *inverse_std = given
    if settings.batch and settings.group is not None:
        mean, variance, count = _of_all_processes(mean, variance, count, settings.group)
        inverse_std = ()
    inverse_std = inverse_std[0] if inverse_std else (variance + settings.eps).rsqrt()
    y = batch_norm_apply(x, mean, inverse_std, weight, bias, residual, relu=relu, out=out)
    return BatchNormForward(y, mean, inverse_std, variance, count)


def batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    settings: BatchNormSettings,
    mean: Tensor,
    inverse_std: Tensor,
    count: int | Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None = None,
    *,
    relu: bool,
    residual: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The backward passes: gradients of x, residual (None unless asked for), weight and bias.

    Args:
        grad, x, mean, inverse_std, weight, bias, y, relu: of :func:`~slowfast_ext.ops.batch_norm_reduce_gradient`.
        count: elements of a channel in a group, in all processes.
        residual: whether the residual's gradient is wanted.
    """
    affine = (mean, inverse_std, weight, bias)
    if settings.batch and settings.group is None and _torch_serves(x, settings.splits) and x.numel():
        if relu:
            y = batch_norm_apply(x, *affine, relu=True) if y is None else y
            grad = torch.ops.aten.threshold_backward(grad, y, 0)
        arguments = (grad, x, weight, None, None, mean[0], inverse_std[0], True, settings.eps, [True, True, True])
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(*arguments)
        return grad_x, grad if residual else None, grad_weight, grad_bias
    *sums, passed = batch_norm_reduce_gradient(grad, x, *affine, y, relu=relu, residual=residual and relu)
    grad_bias, grad_weight = (total[0] if settings.splits == 1 else total.sum(0) for total in sums)
    constants = {}
    if settings.batch:
        if settings.group is not None:
            both = torch.stack(sums)
            dist.all_reduce(both, group=settings.group)
            sums, count = both.div_(count).unbind(), 1.0  # the operator takes no tensor for a count
        constants = {"sum_grad": sums[0], "sum_grad_normalized": sums[1], "count": count}
    if passed is not None:
        grad, y, relu = passed, None, False
    grad_x = batch_norm_apply_gradient(grad, x, *affine, y, relu=relu, **constants)
    return grad_x, grad if residual else None, grad_weight, grad_bias


@torch.no_grad()
def update_running_statistics(
    running: Sequence[tuple[Tensor, Tensor]],
    moments: Sequence[tuple[Tensor, Tensor, int | Tensor]],
    momentum: float,
) -> None:
    """Move running statistics by ``momentum`` towards those of a batch, of several batch norms at once.

    Args:
        running: mean and variance (Tensor[splits * C]) of each; are written.
        moments: mean, variance (Tensor[splits, C]) and count of :class:`BatchNormForward` of each. The variance is
            made unbiased; of no elements the running statistics stay.
    """
    pairs = [pair for pair in zip(running, moments, strict=True) if not _is_zero(pair[1][2])]
    if not pairs:
        return
    variances, factors = zip(*((variance, count / (count - 1)) for _, (_, variance, count) in pairs), strict=True)
    if any(isinstance(factor, Tensor) for factor in factors):
        unbiased = [variance * factor for variance, factor in zip(variances, factors, strict=True)]
    else:
        unbiased = torch._foreach_mul(variances, factors)
    targets = [statistic for both, _ in pairs for statistic in both]
    batch = [one for (_, (mean, _, _)), variance in zip(pairs, unbiased, strict=True) for one in (mean, variance)]
    batch = [one.flatten().to(statistic.dtype) for one, statistic in zip(batch, targets, strict=True)]
    torch._foreach_lerp_(targets, batch, momentum)


def _is_zero(count: int | Tensor) -> bool:
    return isinstance(count, int) and count == 0


def in_dtype_of_sums(x: Tensor, vector: Tensor | None) -> Tensor | None:
    """A parameter of batch norm as the operators take it."""
    return None if vector is None else vector.to(accumulator_dtype(x))


def _torch_serves(x: Tensor, splits: int) -> bool:
    """Whether torch's own batch norm is the fastest there is: on a CPU."""
    return x.device.type == "cpu" and splits == 1


def _finish(y: Tensor, residual: Tensor | None, relu: bool, out: Tensor | None) -> Tensor:
    """Addition and ReLU, in place or into ``out``."""
    if torch.compiler.is_compiling():  # torch 2.11 loses the gradient of a result that was changed in place
        y = y if residual is None else y + residual
        y = y.relu() if relu else y
        return y if out is None else out.copy_(y)
    if residual is not None and out is not None:
        y = torch.add(y, residual, out=out)
    else:
        y = y if residual is None else y.add_(residual)
        y = y if out is None else out.copy_(y)
    return y.relu_() if relu else y


def _of_all_processes(
    mean: Tensor, variance: Tensor, count: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and number of the elements of all processes. Chan et al., "Updating Formulae ... for Computing
    Sample Variances", 1979: the deviations within the processes and between them."""
    mine = torch.cat([mean.new_full((1,), count), mean.flatten(), variance.flatten()])
    every = mine.new_empty(dist.get_world_size(group), mine.numel())
    dist.all_gather(list(every.unbind()), mine, group=group)
    counts, means, variances = every[:, :1], *every[:, 1:].chunk(2, 1)
    total = counts.sum()
    shares = counts / total
    of_all = (shares * means).sum(0)
    spread = (shares * (variances + (means - of_all).square())).sum(0)
    return of_all.view_as(mean), spread.view_as(variance), total


class _BatchNormReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings, relu, x, weight, bias, residual, given_mean=None, given_variance=None):
        affine = (in_dtype_of_sums(x, weight), in_dtype_of_sums(x, bias))
        given = None
        if not settings.batch:
            given = tuple(in_dtype_of_sums(x, part).view(1, -1) for part in (given_mean, given_variance))
        inside = None if residual is None else residual.to(x.dtype)
        result = batch_norm_forward(x, settings, *affine, given, inside, relu=relu)
        ctx.settings, ctx.relu, ctx.count = settings, relu, result.count
        ctx.residual_dtype = None if residual is None else residual.dtype
        masked = relu and residual is not None  # else the sign can be computed from x
        ctx.save_for_backward(x, weight, bias, result.mean, result.inverse_std, result.y if masked else None)
        ctx.mark_non_differentiable(result.mean, result.variance)
        return result.y, result.mean, result.variance, result.count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        x, weight, bias, mean, inverse_std, y = ctx.saved_tensors
        affine = (in_dtype_of_sums(x, weight), in_dtype_of_sums(x, bias))
        grad_x, grad_residual, grad_weight, grad_bias = batch_norm_backward(
            grad,
            x,
            ctx.settings,
            mean,
            inverse_std,
            ctx.count,
            *affine,
            y,
            relu=ctx.relu,
            residual=ctx.needs_input_grad[5],
        )
        if grad_residual is not None:
            grad_residual = grad_residual.to(ctx.residual_dtype)
        grad_weight = None if weight is None else grad_weight.to(weight.dtype)
        grad_bias = None if bias is None else grad_bias.to(bias.dtype)
        return None, None, grad_x, grad_weight, grad_bias, grad_residual, None, None
