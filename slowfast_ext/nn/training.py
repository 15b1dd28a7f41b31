"""Residual blocks in training that keep one tensor for each convolution instead of two.

Between a convolution and the next lie batch norm and ReLU. PyTorch keeps what goes into the batch norm and what comes
out of the ReLU; here the latter is computed again from the former, which is one pass over memory. What comes out of the
last, 1 x 1 x 1 convolution of a block, four times as wide as what goes in, and of the one in the shortcut, is computed
again too where that takes no longer than keeping it. Chen et al., "Training Deep Nets with Sublinear Memory Cost"
(arXiv 1604.06174), section 3, and Bulo et al., "In-Place Activated BatchNorm" (arXiv 1712.02616), which recompute the
same tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import ops
from ..ops.batch_norm_relu import (
    BatchNormForward,
    BatchNormSettings,
    batch_norm_backward,
    batch_norm_forward,
    in_dtype_of_sums,
    update_running_statistics,
)
from ..ops.common import allows_tf32

# Up to how many input channels a 1 x 1 x 1 convolution is computed again sooner than its result is written and read, as
# 2 * channels operations against 6 bytes in bfloat16 (12 in float32, at half the operations a second): a GPU does some
# 230 operations in the time of a byte (H100: 700 TFLOP/s, 3 TB/s), a CPU core some 30 (AVX-512 BF16: 300 GFLOP/s,
# 10 GB/s).
_RECOMPUTED_CHANNELS = {"cuda": 690, "cpu": 90}

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


class Step(NamedTuple):
    """A convolution, and the batch norm and ReLU after it.

    Attributes:
        stride, padding: of the convolution.
        norm: None where there is none.
        relu: whether there is a ReLU; only behind a batch norm.
    """

    stride: tuple[int, int, int]
    padding: tuple[int, int, int]
    norm: BatchNormSettings | None
    relu: bool

    TENSORS = 6  # that belong to a step: weight and bias of the convolution, of the batch norm, its statistics


class Structure(NamedTuple):
    """What is computed: ``pool(relu(branch(x) + shortcut(x)))``, and the lateral connection behind it.

    Attributes:
        branch: one after the other.
        residual: whether there is an addition; a ReLU follows.
        shortcut: None: x itself is added.
        pool: kernel, stride, padding, dilation and ceil mode of a maximum after the ReLU, or None.
        lateral: is applied to the fast features; the result is appended to the channels.
        dtype: to compute in.
    """

    branch: tuple[Step, ...]
    residual: bool = False
    shortcut: Step | None = None
    pool: tuple | None = None
    lateral: Step | None = None
    dtype: torch.dtype = torch.float32

    @property
    def steps(self) -> tuple[Step, ...]:
        return (*self.branch, *(step for step in (self.shortcut, self.lateral) if step is not None))

    def is_recomputed(self, step: int, weight: Tensor) -> bool:
        """Whether the backward pass computes the convolution again instead of having kept its result."""
        last = self.residual and step == len(self.branch) - 1 and step > 0
        beside = self.shortcut is not None and step == len(self.branch)
        narrow = weight.shape[1] <= min(weight.shape[0], _RECOMPUTED_CHANNELS.get(weight.device.type, 0))
        return (last or beside) and weight.shape[2:].numel() == 1 and narrow


class Part(NamedTuple):
    """A convolution of a block, its batch norm and whether a ReLU follows, as modules."""

    conv: nn.Conv3d
    bn: nn.Module | None
    relu: bool

    def state(self) -> NormState | None:
        return None if self.bn is None else NORMS[type(self.bn)](self.bn)


def train_block(
    x: Tensor,
    branch: Sequence[Part],
    dtype: torch.dtype,
    *,
    residual: bool = False,
    shortcut: Part | None = None,
    pool: nn.MaxPool3d | None = None,
    lateral: Part | None = None,
    fast: Tensor | None = None,
) -> Tensor:
    """A block, of the fields of :class:`Structure`, with its gradients; moves the running statistics.

    Args:
        x (Tensor[N, C, T, H, W]): any floating-point dtype.
        dtype: to compute in.
        fast (Tensor[N, Cf, T', H', W']): with ``lateral``.

    Returns:
        Tensor in ``dtype`` and channels_last_3d.
    """
    parts = [*branch, *(part for part in (shortcut, lateral) if part is not None)]
    states = [part.state() for part in parts]
    steps = [
        Step(part.conv.stride, part.conv.padding, None if state is None else state.settings, part.relu)
        for part, state in zip(parts, states, strict=True)
    ]
    count = len(branch)
    structure = Structure(
        tuple(steps[:count]),
        residual,
        None if shortcut is None else steps[count],
        None if pool is None else _pool_arguments(pool),
        None if lateral is None else steps[-1],
        dtype,
    )
    tensors = [tensor for part, state in zip(parts, states, strict=True) for tensor in _tensors_of(part, state)]
    y, *moments = _TrainedBlock.apply(structure, x, fast, *tensors)
    moving = [
        (part.bn, state)
        for part, state in zip(parts, states, strict=True)
        if state is not None and state.settings.batch
    ]
    _move_statistics(moving, list(zip(moments[::3], moments[1::3], moments[2::3], strict=True)))
    return y


@torch.no_grad()
def _move_statistics(moving: Sequence[tuple[nn.Module, NormState]], moments: Sequence[tuple]) -> None:
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


def _tensors_of(part: Part, state: NormState | None) -> tuple[Tensor | None, ...]:
    conv, bn = part.conv, part.bn
    constants = (None, None)
    if state is not None and not state.settings.batch:
        constants = (state.running_mean, state.running_var)
    return (conv.weight, conv.bias, *((None, None) if bn is None else (bn.weight, bn.bias)), *constants)


@torch.compiler.assume_constant_result
def _statistics_reason(*arguments) -> str | None:
    return _cached_statistics_reason(*arguments)


@functools.cache  # asked for each convolution in each step
def _cached_statistics_reason(x, weight, stride, padding, dtype, allow_tf32, device) -> str | None:
    geometry = {"stride": stride, "padding": padding}
    return ops.conv3d_statistics_reason_against(
        x, weight, **geometry, dtype=dtype, allow_tf32=allow_tf32, device=device
    )


class _Layer:
    """A step with its tensors."""

    def __init__(self, step: Step, tensors: Sequence[Tensor | None], dtype: torch.dtype):
        self.step = step
        weight, bias, *norm = tensors
        self.weight, self.bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        gamma, beta, mean, variance = (in_dtype_of_sums(self.weight, tensor) for tensor in norm)
        self.affine = (gamma, beta)
        self.given = None if mean is None else (mean[None], variance[None])

    def convolve(self, x: Tensor) -> Tensor:
        """Tensor[N, C, T, H, W] -> Tensor[N, K, T', H', W'] in channels_last_3d."""
        geometry = {"stride": self.step.stride, "padding": self.step.padding}
        if x.device.type == "cpu":  # F.conv3d has a slow path for small batches
            bias = in_dtype_of_sums(x, self.bias)
            return ops.conv3d_bn_relu(x, self.weight, bias, relu=False, **geometry)
        if self._has_statistics(x):  # the kernel that made the statistics, so that they belong to the same numbers
            return ops.conv3d_bn_relu(x, self.weight, relu=False, **geometry)
        return F.conv3d(x, self.weight, self.bias, **geometry).contiguous(memory_format=torch.channels_last_3d)

    def convolve_for_statistics(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """The convolution, and mean, variance and inverse_std of its result where one kernel makes all."""
        if not self._has_statistics(x):
            return self.convolve(x), None
        step = self.step
        y, *statistics = ops.conv3d_statistics(
            x, self.weight, stride=step.stride, padding=step.padding, eps=step.norm.eps
        )
        return y, tuple(statistics)

    def _has_statistics(self, x: Tensor) -> bool:
        norm = self.step.norm
        if norm is None or not norm.batch or norm.splits > 1 or self.bias is not None:
            return False
        geometry = (tuple(self.weight.shape), tuple(self.step.stride), tuple(self.step.padding))
        return _statistics_reason(tuple(x.shape), *geometry, x.dtype, allows_tf32(x), x.device) is None

    def normalize(
        self,
        y: Tensor,
        statistics: tuple[Tensor, ...] | None = None,
        residual: Tensor | None = None,
        *,
        relu: bool,
        out: Tensor | None = None,
    ) -> BatchNormForward:
        given = self.given if statistics is None else statistics
        return batch_norm_forward(y, self.step.norm, *self.affine, given, residual, relu=relu, out=out)

    def normalize_again(self, y: Tensor, moments: _Moments) -> Tensor:
        return ops.batch_norm_apply(y, moments.mean, moments.inverse_std, *self.affine, relu=self.step.relu)

    def gradients(self, grad: Tensor, x: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
        """Of x, weight and bias of the convolution."""
        weight, stride, padding = self.weight, list(self.step.stride), list(self.step.padding)
        frames, padded = x.shape[2], padding[0]
        if x.device.type == "cpu" and padded and 1 < frames < weight.shape[2] and x.element_size() == 2:
            # oneDNN's gradient of the weight reads memory that nobody wrote where the kernel is longer than the clip.
            x = F.pad(x, (0, 0, 0, 0, padded, padded)).contiguous(memory_format=torch.channels_last_3d)
            grad_x, *others = self._gradients(grad, x, stride, [0, *padding[1:]], needs)
            grad_x = grad_x[:, :, padded:-padded] if needs[0] else None
            return grad_x, *others
        return self._gradients(grad, x, stride, padding, needs)

    def _gradients(self, grad, x, stride, padding, needs) -> tuple[Tensor | None, ...]:
        weight = self.weight
        biases = None if self.bias is None else [weight.shape[0]]
        if x.device.type == "cpu" and _is_flat(weight, stride, padding):
            # In three dimensions torch does without oneDNN here, and takes up to ten times as long.
            by_frame = weight.shape[2] == 1
            grad, flat = _in_two_dimensions(grad, by_frame), _in_two_dimensions(x, by_frame)
            stride, padding = (stride[1:], padding[1:]) if by_frame else ([stride[0], stride[2]], [padding[0], 0])
            geometry = (stride, padding, [1, 1], False, [0, 0], 1)
            grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
                grad, flat, weight.flatten(3), biases, *geometry, list(needs)
            )
            grad_x = _in_three_dimensions(grad_x, x, by_frame) if needs[0] else None
            return grad_x, grad_weight.view_as(weight) if needs[1] else None, grad_bias
        geometry = (stride, padding, [1, 1, 1], False, [0, 0, 0], 1)
        return torch.ops.aten.convolution_backward(grad, x, weight, biases, *geometry, list(needs))


class _Moments(NamedTuple):
    mean: Tensor
    inverse_std: Tensor
    count: int | Tensor


class _TrainedBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, structure: Structure, x: Tensor, fast: Tensor | None, *tensors: Tensor | None):
        with torch.autocast(x.device.type, enabled=False):  # everything is in the dtype that the structure says
            return _forward(ctx, structure, x, fast, *tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_):
        structure = ctx.structure
        x, fast, out, *rest = ctx.saved_tensors
        convolutions, moment_tensors = ctx.split
        convolved, rest = rest[:convolutions], rest[convolutions:]
        flat, tensors = rest[:moment_tensors], rest[moment_tensors:]
        moments = [
            _Moments(mean, inverse_std, count)
            for mean, inverse_std, count in zip(flat[::2], flat[1::2], ctx.counts, strict=True)
        ]
        layers = _layers(structure, tensors)
        needs = ctx.needs_input_grad[3:]
        pass_ = _Backward(structure, layers, convolved, moments, tensors, needs)

        branch = len(structure.branch)
        grad_fast = None
        if structure.lateral is not None:
            channels = layers[branch - 1].weight.shape[0]
            grad_fast = pass_.lateral(grad[:, channels:], fast, ctx.needs_input_grad[2])
            grad, out = grad[:, :channels], None if out is None else out[:, :channels]
        needs_x = ctx.needs_input_grad[1]
        grad_x = pass_.branch(grad, x, out, needs_x)
        gradients = [
            None if gradient is None else gradient.to(dtype)
            for gradient, dtype in zip(pass_.gradients, ctx.tensor_dtypes, strict=True)
        ]
        grad_x = grad_x.to(ctx.x_dtype) if needs_x else None
        return None, grad_x, None if grad_fast is None else grad_fast.to(ctx.fast_dtype), *gradients


def _forward(ctx, structure: Structure, x: Tensor, fast: Tensor | None, *tensors: Tensor | None):
    layers = _layers(structure, tensors)
    branch = layers[: len(structure.branch)]
    ctx.x_dtype, ctx.fast_dtype = x.dtype, None if fast is None else fast.dtype
    x = _prepared(x, structure.dtype)
    convolved: list[Tensor | None] = []
    results: list[Any] = []

    z = x
    for layer in branch[:-1]:
        y, statistics = layer.convolve_for_statistics(z)
        convolved.append(y)
        results.append(layer.normalize(y, statistics, relu=layer.step.relu))
        z = results[-1].y
    last = branch[-1]
    y, statistics = last.convolve_for_statistics(z)
    del z
    convolved.append(y)
    residual, shortcut = (x if structure.residual else None), None
    if structure.shortcut is not None:
        layer = layers[len(branch)]
        beside, of_shortcut = layer.convolve_for_statistics(x)
        convolved.append(beside)
        shortcut = layer.normalize(beside, of_shortcut, relu=layer.step.relu)
        residual = shortcut.y

    fused = None
    if structure.lateral is not None:
        fast = _prepared(fast, structure.dtype)
        fused = layers[-1].convolve(fast)
    room, place = _room(structure, y, fused)
    relu = last.step.relu or structure.residual
    results.append(last.normalize(y, statistics, residual, relu=relu, out=None if structure.pool else place))
    out = results[-1].y
    if structure.pool is not None:
        out = F.max_pool3d(out, *structure.pool)
        out = out if place is None else place.copy_(out)
    if shortcut is not None:
        results.append(shortcut)
    if structure.lateral is not None:
        place, out = room[:, out.shape[1] :], room
        if layers[-1].step.norm is None:
            place.copy_(fused)
            fused = None
        else:
            convolved.append(fused)
            results.append(layers[-1].normalize(fused, relu=layers[-1].step.relu, out=place))

    for index in range(len(layers)):
        if index < len(convolved) and structure.is_recomputed(index, layers[index].weight):
            convolved[index] = None
    ctx.structure, ctx.counts = structure, [result.count for result in results]
    saved_moments = [tensor for result in results for tensor in (result.mean, result.inverse_std)]
    ctx.split = (len(convolved), len(saved_moments))
    masked = out if structure.residual else None
    ctx.tensor_dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
    cast = [tensor for layer in layers for tensor in (layer.weight, layer.bias)]  # not to be cast again
    tensors = [cast.pop(0) if index % Step.TENSORS < 2 else tensor for index, tensor in enumerate(tensors)]
    ctx.save_for_backward(x, fast, masked, *convolved, *saved_moments, *tensors)
    moments = []
    for result, layer in zip(results, layers, strict=False):
        if layer.step.norm is not None and layer.step.norm.batch:
            moments += [result.mean, result.variance, result.count]
    ctx.mark_non_differentiable(*(moment for moment in moments if isinstance(moment, Tensor)))
    return out, *moments


class _Backward:
    """The backward pass of a block: layer by layer from the last, with what is needed of each computed again."""

    def __init__(self, structure, layers, convolved, moments, tensors, needs):
        self.structure, self.layers, self.convolved, self.moments = structure, layers, convolved, moments
        self.needs = needs
        self.gradients: list[Tensor | None] = [None] * len(tensors)

    def branch(self, grad: Tensor, x: Tensor, out: Tensor | None, needs_x: bool) -> Tensor | None:
        """The gradient of x, if needed; ``out`` is the result where there was an addition."""
        structure, last = self.structure, len(self.structure.branch) - 1
        grad_residual, after = None, None
        # z: what goes into convolution `index`; grad: of what its batch norm, and the ReLU, gave
        z = self._input(last, x)
        for index in range(last, -1, -1):
            y = self.convolved[index]
            y = self.layers[index].convolve(z) if y is None else y
            final = index == last
            known = out if final else after
            relu = self.layers[index].step.relu or (final and structure.residual)
            if final and structure.pool is not None:
                known = self.layers[index].normalize_again(y, self.moments[index])
                grad = _max_pool_backward(grad, known, structure.pool)
            grad, of_residual = self._normalization(index, grad, y, known, relu, final and structure.residual)
            if final:
                grad_residual = of_residual
            del y, known, of_residual
            below = needs_x or any(self.needs[: index * Step.TENSORS])
            grad = self._convolution(index, grad, z, below)
            if index > 0 and below:
                after, z = z, self._input(index - 1, x)
            elif index > 0:
                break
        if structure.shortcut is not None:
            index = last + 1
            y = self.convolved[index]
            y = self.layers[index].convolve(x) if y is None else y
            relu = self.layers[index].step.relu
            grad_residual, _ = self._normalization(index, grad_residual, y, None, relu, False)
            grad_residual = self._convolution(index, grad_residual, x, needs_x)
        if grad_residual is not None and needs_x:
            grad = grad.add_(grad_residual)
        return grad

    def lateral(self, grad: Tensor, fast: Tensor, needs_fast: bool) -> Tensor | None:
        index = len(self.layers) - 1
        if self.layers[index].step.norm is None:
            grad = grad.contiguous(memory_format=torch.channels_last_3d)
        else:
            y, relu = self.convolved[index], self.layers[index].step.relu
            grad, _ = self._normalization(index, grad, y, None, relu, False)
        return self._convolution(index, grad, fast, needs_fast)

    def _input(self, index: int, x: Tensor) -> Tensor:
        """What went into convolution ``index`` of the branch."""
        if index == 0:
            return x
        return self.layers[index - 1].normalize_again(self.convolved[index - 1], self.moments[index - 1])

    def _normalization(self, index, grad, y, known, relu, residual) -> tuple[Tensor, Tensor | None]:
        layer, moments = self.layers[index], self.moments[index]
        known = known if residual or y.device.type == "cpu" else None  # the sign is cheap to compute again
        grad, grad_residual, grad_weight, grad_bias = batch_norm_backward(
            grad,
            y,
            layer.step.norm,
            moments.mean,
            moments.inverse_std,
            moments.count,
            *layer.affine,
            known,
            relu=relu,
            residual=residual,
        )
        self._keep(index, 2, grad_weight)
        self._keep(index, 3, grad_bias)
        return grad, grad_residual

    def _convolution(self, index: int, grad: Tensor, x: Tensor, needs_x: bool) -> Tensor | None:
        first = index * Step.TENSORS
        wanted = (needs_x, self.needs[first], self.needs[first + 1])
        if not any(wanted):
            return None
        grad_x, grad_weight, grad_bias = self.layers[index].gradients(grad, x, wanted)
        self._keep(index, 0, grad_weight)
        self._keep(index, 1, grad_bias)
        return grad_x

    def _keep(self, index: int, tensor: int, gradient: Tensor | None) -> None:
        at = index * Step.TENSORS + tensor
        if self.needs[at]:
            self.gradients[at] = gradient


def _layers(structure: Structure, tensors: Sequence[Tensor | None]) -> list[_Layer]:
    return [
        _Layer(step, tensors[index * Step.TENSORS : (index + 1) * Step.TENSORS], structure.dtype)
        for index, step in enumerate(structure.steps)
    ]


def _prepared(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).contiguous(memory_format=torch.channels_last_3d)


def _is_flat(weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether the kernel is 1 x 1 x 1 or t x 1 x 1, and strides are in space or in time, where it is."""
    taps, *spatial = weight.shape[2:]
    if spatial != [1, 1]:
        return False
    if taps == 1:
        return stride[0] == 1 and padding[0] == 0
    return list(stride[1:]) == [1, 1] and list(padding[1:]) == [0, 0]


def _in_two_dimensions(x: Tensor, by_frame: bool) -> Tensor:
    """A view of a channels_last_3d tensor: Tensor[N * T, C, H, W], or else Tensor[N, C, T, H * W]."""
    return x.transpose(1, 2).flatten(0, 1) if by_frame else x.flatten(3)


def _in_three_dimensions(flat: Tensor, like: Tensor, by_frame: bool) -> Tensor:
    """The inverse, of the shape of ``like``."""
    if by_frame:
        return flat.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)
    return flat.unflatten(3, tuple(like.shape[3:]))


def _room(structure: Structure, y: Tensor, fused: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Memory for the result and the lateral connection's, and the first channels of it; None without one."""
    if fused is None:
        return None, None
    channels = y.shape[1]
    shape = (fused.shape[0], channels + fused.shape[1], *fused.shape[2:])
    room = torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=torch.channels_last_3d)
    return room, room[:, :channels]


def _max_pool_backward(grad: Tensor, x: Tensor, pool: tuple) -> Tensor:
    """Where the maxima were is found again instead of kept: a whole number for each."""
    _, indices = torch.ops.aten.max_pool3d_with_indices(x, *pool)
    return torch.ops.aten.max_pool3d_with_indices_backward(grad, x, *pool, indices)


def _pool_arguments(pool: nn.MaxPool3d) -> tuple:
    sizes = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    return *(([size] * 3) if isinstance(size, int) else list(size) for size in sizes), pool.ceil_mode
