"""Residual blocks in training that keep one tensor for each convolution instead of two.

Between a convolution and the next lie batch norm and ReLU. PyTorch keeps what goes into the batch norm and what comes
out of the ReLU; here the latter is computed again from the former, which is one pass over memory. What comes out of the
last, 1 x 1 x 1 convolution of a block, four times as wide as what goes in, and of the one in the shortcut, is computed
again too where that takes no longer than keeping it. Chen et al., "Training Deep Nets with Sublinear Memory Cost"
(arXiv 1604.06174), section 3, and Bulo et al., "In-Place Activated BatchNorm" (arXiv 1712.02616), which recompute the
same tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..ops.batch_norm_relu import BatchNormForward, batch_norm_backward
from .statistics import NORMS, NormState, move_statistics
from .training_layer import Layer, Moments, Step

# Up to how many input channels a 1 x 1 x 1 convolution is computed again sooner than its result is written and read, as
# 2 * channels operations against 6 bytes in bfloat16 (12 in float32, at half the operations a second): a GPU does some
# 230 operations in the time of a byte (H100: 700 TFLOP/s, 3 TB/s), a CPU core some 30 (AVX-512 BF16: 300 GFLOP/s,
# 10 GB/s).
RECOMPUTED_CHANNELS = {"cuda": 690, "cpu": 90}


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
        narrow = weight.shape[1] <= min(weight.shape[0], RECOMPUTED_CHANNELS.get(weight.device.type, 0))
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
    move_statistics(moving, list(zip(moments[::3], moments[1::3], moments[2::3], strict=True)))
    return y


def _tensors_of(part: Part, state: NormState | None) -> tuple[Tensor | None, ...]:
    conv, bn = part.conv, part.bn
    constants = (None, None)
    if state is not None and not state.settings.batch:
        constants = (state.running_mean, state.running_var)
    return (conv.weight, conv.bias, *((None, None) if bn is None else (bn.weight, bn.bias)), *constants)


class _TrainedBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, structure: Structure, x: Tensor, fast: Tensor | None, *tensors: Tensor | None):
        with torch.autocast(x.device.type, enabled=False):  # everything is in the dtype that the structure says
            return _forward(ctx, structure, x, fast, *tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_):
        with torch.autocast(grad.device.type, enabled=False):  # which is on where backward() is called under it
            return _backward(ctx, grad)


def _forward(ctx, structure: Structure, x: Tensor, fast: Tensor | None, *tensors: Tensor | None):
    layers = _layers(structure, tensors)
    branch = layers[: len(structure.branch)]
    ctx.x_dtype, ctx.fast_dtype = x.dtype, None if fast is None else fast.dtype
    x = _prepared(x, structure.dtype)
    convolved: list[Tensor | None] = []
    results: list[BatchNormForward] = []

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


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    structure = ctx.structure
    x, fast, out, *rest = ctx.saved_tensors
    convolutions, moment_tensors = ctx.split
    convolved, rest = rest[:convolutions], rest[convolutions:]
    flat, tensors = rest[:moment_tensors], rest[moment_tensors:]
    moments = [
        Moments(mean, inverse_std, count)
        for mean, inverse_std, count in zip(flat[::2], flat[1::2], ctx.counts, strict=True)
    ]
    layers = _layers(structure, tensors)
    needs = ctx.needs_input_grad[3:]
    gradients = _Gradients(structure, layers, convolved, moments, needs)

    branch = len(structure.branch)
    grad_fast = None
    if structure.lateral is not None:
        channels = layers[branch - 1].weight.shape[0]
        grad_fast = gradients.lateral(grad[:, channels:], fast, ctx.needs_input_grad[2])
        grad, out = grad[:, :channels], None if out is None else out[:, :channels]
    needs_x = ctx.needs_input_grad[1]
    grad_x = gradients.branch(grad, x, out, needs_x)
    of_tensors = [
        None if gradient is None else gradient.to(dtype)
        for gradient, dtype in zip(gradients.of_tensors, ctx.tensor_dtypes, strict=True)
    ]
    grad_x = grad_x.to(ctx.x_dtype) if needs_x else None
    return None, grad_x, None if grad_fast is None else grad_fast.to(ctx.fast_dtype), *of_tensors


class _Gradients:
    """The backward pass of a block: layer by layer from the last, with what is needed of each computed again."""

    def __init__(self, structure, layers, convolved, moments, needs):
        self.structure, self.layers, self.convolved, self.moments = structure, layers, convolved, moments
        self.needs = needs
        self.of_tensors: list[Tensor | None] = [None] * len(needs)

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
            ends = index == 0 or not below
            onto = self._shortcut(grad_residual, x, needs_x) if ends and structure.residual else None
            grad = self._convolution(index, grad, z, below, onto)
            if ends:
                break
            after, z = z, self._input(index - 1, x)
        return grad

    def _shortcut(self, grad: Tensor, x: Tensor, needs_x: bool) -> Tensor | None:
        """The gradient of x by way of the shortcut, if needed."""
        if self.structure.shortcut is None:
            return grad
        index = len(self.structure.branch)
        y = self.convolved[index]
        y = self.layers[index].convolve(x) if y is None else y
        grad, _ = self._normalization(index, grad, y, None, self.layers[index].step.relu, False)
        return self._convolution(index, grad, x, needs_x)

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
        known = known if residual or layer.on_cpu else None  # the sign is cheap to compute again
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

    def _convolution(
        self, index: int, grad: Tensor, x: Tensor, needs_x: bool, onto: Tensor | None = None
    ) -> Tensor | None:
        """The gradient of x, if needed, and ``onto``, if given, added up."""
        first = index * Step.TENSORS
        wanted = (needs_x, self.needs[first], self.needs[first + 1])
        if not any(wanted):
            return None
        grad_x, grad_weight, grad_bias = self.layers[index].gradients(grad, x, wanted, onto)
        self._keep(index, 0, grad_weight)
        self._keep(index, 1, grad_bias)
        return grad_x

    def _keep(self, index: int, tensor: int, gradient: Tensor | None) -> None:
        at = index * Step.TENSORS + tensor
        if self.needs[at]:
            self.of_tensors[at] = gradient


def _layers(structure: Structure, tensors: Sequence[Tensor | None]) -> list[Layer]:
    return [
        Layer(step, tensors[index * Step.TENSORS : (index + 1) * Step.TENSORS], structure.dtype)
        for index, step in enumerate(structure.steps)
    ]


def _prepared(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).contiguous(memory_format=torch.channels_last_3d)


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
