"""``max_pool3d(relu(conv3d(frames, weight) + bias))``: the first layer of a pathway, from raw frames."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .._library import lib
from .common import accumulator_dtype, check, check_out, refuse_gradients_with_out, register_autocast

_ARGUMENTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? frames, Tensor? scale, Tensor? shift"
lib.define(f"stem({_ARGUMENTS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
lib.define(f"stem.out({_ARGUMENTS}, Tensor(a!) out) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
_operator = torch.ops.slowfast_ext.stem.default
_operator_out = torch.ops.slowfast_ext.stem.out

_TEMPORAL_KERNELS = (1, 5)
_STRIDE = (1, 2, 2)
_POOLING = ((1, 3, 3), (1, 2, 2), (0, 1, 1))  # kernel, stride, padding


def stem(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    frames: Tensor | Sequence[int] | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Normalisation, convolution, ReLU and max pooling of a ResNet's stem, with neither a copy of the clip nor the
    convolution's output in memory.

    Equivalent to::

        x = x if frames is None else x.index_select(time, frames)
        if x.dtype == torch.uint8:
            x = (x.permute(0, 4, 1, 2, 3) * scale[:, None, None, None] + shift[:, None, None, None]).to(weight.dtype)
        y = F.conv3d(x, weight, bias, stride=(1, 2, 2), padding=(kernel_t // 2, 3, 3)).relu()
        return F.max_pool3d(y, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))

    except that products and bias are summed in float32 and rounded once (float32 as three TF32 products a term). The
    padding of the convolution is zero after normalisation, in space and around the selected frames in time.

    Args:
        x (Tensor[N, T, H, W, 3] or Tensor[N, 3, T, H, W]): raw frames in uint8 in the first form, or normalised ones in
            the dtype of ``weight`` in the second; any strides.
        weight (Tensor[K, 3, kernel_t, 7, 7]): float32, float16, bfloat16, on a CPU also float64; K a multiple of 8,
            kernel_t 1 or 5; fastest in channels_last_3d. A folded batch norm belongs in here and into ``bias``: see
            :func:`fold_batch_norm`.
        bias (Tensor[K]): float32 (float64 if ``weight`` is).
        frames (Tensor[T'] or T' integers): the indices of the frames that the pathway sees, in order, e.g. each eighth
            (mmaction2) or ``linspace(0, T - 1, T')`` rounded down (PySlowFast); all by default. Integers are checked,
            and travel to the device: in a CUDA graph give a tensor, int32 or int64. Indices on a CPU are checked too;
            on a GPU, which nobody waits for, one outside of the clip makes NaN of the frames that see it.
        scale, shift (Tensor[3]): float32 (float64 if ``weight`` is), for uint8 only: a pixel is normalised to
            ``pixel * scale + shift``, thus ``1 / std`` and ``-mean / std`` in units of 0 to 255. Without gradients.
        out (Tensor[N, K, T', H', W']): where to write, dtype of ``weight``: channels_last_3d, or a slice of the
            channels of such a tensor. Must not overlap ``x``. Without gradients.

    Returns:
        Tensor[N, K, T', H', W']: ``out``, or a new tensor in channels_last_3d, in the dtype of ``weight``. H' and W'
        are a quarter of H and W, rounded up.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype or device, or an index is outside of the clip.

    Gradients for x (if not uint8), weight and bias, differentiable again; backward computes the convolution again and
    keeps nothing but the arguments. Under autocast x and weight are cast, the others are not.
    """
    if frames is not None and not isinstance(frames, Tensor):
        frames = torch.tensor(_checked_indices(x, list(frames)), dtype=torch.int64, device=x.device)
    if out is None:
        return _operator(x, weight, bias, frames, scale, shift)
    refuse_gradients_with_out("stem", x, weight, bias, scale, shift, out)
    _operator_out(x, weight, bias, frames, scale, shift, out)
    return out


def stem_reason_against(convolution: torch.nn.Conv3d, pool: torch.nn.MaxPool3d) -> str | None:
    """Why :func:`stem` cannot compute ``pool(relu(convolution(x)))``, with or without a batch norm; None if it can."""
    kernel_t = convolution.kernel_size[0]
    if convolution.in_channels != 3 or convolution.kernel_size[1:] != (7, 7) or kernel_t not in _TEMPORAL_KERNELS:
        size = "x".join(map(str, convolution.kernel_size))
        return f"the kernel takes a 1x7x7 or 5x7x7 convolution of 3 channels, not {size} of {convolution.in_channels}"
    if convolution.out_channels % 8:
        return f"the output channels must be a multiple of 8, not {convolution.out_channels}"
    plain = (convolution.dilation, convolution.groups, convolution.padding_mode) == ((1, 1, 1), 1, "zeros")
    if not plain or convolution.stride != _STRIDE or convolution.padding != (kernel_t // 2, 3, 3):
        return "the convolution must have stride (1, 2, 2), half its kernel of zeros as padding, no dilation, no groups"
    three = [
        (size,) * 3 if isinstance(size, int) else tuple(size) for size in (pool.kernel_size, pool.stride, pool.padding)
    ]
    dilation = (pool.dilation,) * 3 if isinstance(pool.dilation, int) else tuple(pool.dilation)
    if tuple(three) != _POOLING or dilation != (1, 1, 1) or pool.ceil_mode or pool.return_indices:
        return "the pooling must be 1x3x3 with stride (1, 2, 2) and padding (0, 1, 1)"
    return None


_check = partial(check, "stem")


def _checked_indices(x: Tensor, indices: list[int]) -> list[int]:
    _check(x.dim() == 5, "x", "(N, T, H, W, 3) in uint8 or (N, 3, T, H, W)", tuple(x.shape))
    length = x.shape[_time(x)]
    _check(all(0 <= index < length for index in indices), "frames", f"indices from 0 to {length - 1}", indices)
    return indices


def _time(x: Tensor) -> int:
    """The dimension of time."""
    return 1 if x.dtype == torch.uint8 else 2


def _output_shape(x, weight, bias, frames, scale, shift) -> list[int]:
    """The shape of the result; checks what the CUDA kernels check too, with the same words."""
    raw = x.dtype == torch.uint8
    form = "(N, T, H, W, 3) in uint8 or (N, 3, T, H, W)"
    _check(x.dim() == 5 and x.shape[4 if raw else 1] == 3, "x", form, tuple(x.shape))
    _check(
        weight.dim() == 5
        and weight.shape[0] > 0
        and weight.shape[0] % 8 == 0
        and weight.shape[2] in _TEMPORAL_KERNELS
        and tuple(weight.shape[1:]) == (3, weight.shape[2], 7, 7),
        "weight",
        "(K, 3, kernel_t, 7, 7) with K a multiple of 8 and kernel_t 1 or 5",
        tuple(weight.shape),
    )
    height, width = x.shape[2:4] if raw else x.shape[3:]
    length = x.shape[_time(x)]
    _check(length > 0 and height > 0 and width > 0, "x", "of at least one frame and pixel", tuple(x.shape))
    _check(weight.is_floating_point(), "weight", "floating point", weight.dtype)
    _check(weight.device == x.device, "weight", f"on the device of x, {x.device}", weight.device)
    _check(raw or x.dtype == weight.dtype, "x", f"uint8 or in the dtype of weight, {weight.dtype}", x.dtype)
    _check((scale is None) == (shift is None), "scale and shift", "given together", "one")
    _check((scale is not None) == raw, "scale and shift", "given for uint8 and for no other dtype of x", x.dtype)
    for name, vector, size in (("bias", bias, weight.shape[0]), ("scale", scale, 3), ("shift", shift, 3)):
        if vector is not None:
            _check(vector.device == x.device, name, f"on the device of x, {x.device}", vector.device)
            _check(vector.dtype == accumulator_dtype(weight), name, accumulator_dtype(weight), vector.dtype)
            _check(tuple(vector.shape) == (size,), name, f"({size},)", tuple(vector.shape))
    if frames is not None:
        _check(frames.device == x.device, "frames", f"on the device of x, {x.device}", frames.device)
        _check(frames.dtype in (torch.int32, torch.int64), "frames", "int32 or int64", frames.dtype)
        _check(frames.dim() == 1 and frames.shape[0] > 0, "frames", "(T',) with T' > 0", tuple(frames.shape))
        length = frames.shape[0]
    return [x.shape[0], weight.shape[0], length, (height + 3) // 4, (width + 3) // 4]


def _normalise(x, frames, scale, shift, dtype) -> Tensor:
    """The frames that the convolution sees (N, 3, T', H, W), in its dtype."""
    if frames is not None:
        x = x.index_select(_time(x), frames)
    if x.dtype == torch.uint8:
        x = x.permute(0, 4, 1, 2, 3) * scale.view(-1, 1, 1, 1) + shift.view(-1, 1, 1, 1)
    return x.to(dtype)


def stem_reference(x, weight, bias, frames, scale, shift) -> Tensor:
    """The operator in plain PyTorch; runs where there is no kernel. Arguments as in the schema."""
    _output_shape(x, weight, bias, frames, scale, shift)
    if frames is not None and frames.is_cpu:
        _checked_indices(x, frames.tolist())
    accumulator = accumulator_dtype(weight)
    pixels = _normalise(x, frames, scale, shift, weight.dtype).to(accumulator)
    y = F.conv3d(pixels, weight.to(accumulator), bias, _STRIDE, (weight.shape[2] // 2, 3, 3)).relu()
    return F.max_pool3d(y, *_POOLING).to(weight.dtype).contiguous(memory_format=torch.channels_last_3d)


def _cpu(x, weight, bias, frames, scale, shift) -> Tensor:
    """The convolution with what conv3d_bn_relu has for a CPU. Rounding before the pooling gives what it does after."""
    _output_shape(x, weight, bias, frames, scale, shift)
    if frames is not None:
        _checked_indices(x, frames.tolist())
    pixels, padding = _normalise(x, frames, scale, shift, weight.dtype), (weight.shape[2] // 2, 3, 3)
    y = torch.ops.slowfast_ext.conv3d_bn_relu.default(pixels, weight, bias, None, _STRIDE, padding, True, False)
    return F.max_pool3d(y, *_POOLING).contiguous(memory_format=torch.channels_last_3d)


def _into(implementation):
    def into(x, weight, bias, frames, scale, shift, out) -> None:
        check_out("stem", weight, out, _output_shape(x, weight, bias, frames, scale, shift), name="weight")
        out.copy_(implementation(x, weight, bias, frames, scale, shift))

    return into


lib.impl("stem", stem_reference, "CompositeExplicitAutograd")
lib.impl("stem.out", _into(stem_reference), "CompositeExplicitAutograd")
lib.impl("stem", _cpu, "CPU")
lib.impl("stem.out", _into(_cpu), "CPU")


@torch.library.register_fake("slowfast_ext::stem", lib=lib)
def _fake(x, weight, bias, frames, scale, shift):
    shape = _output_shape(x, weight, bias, frames, scale, shift)
    return weight.new_empty(shape).to(memory_format=torch.channels_last_3d)


@torch.library.register_fake("slowfast_ext::stem.out", lib=lib)
def _fake_into(x, weight, bias, frames, scale, shift, out):
    shape = _output_shape(x, weight, bias, frames, scale, shift)
    check_out("stem", weight, out, shape, name="weight")


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    x, weight, bias, frames, scale, shift = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    padding = (weight.shape[2] // 2, 3, 3)
    pixels = _normalise(x, frames, scale, shift, weight.dtype)
    y = torch.ops.slowfast_ext.conv3d_bn_relu(pixels, weight, bias, None, _STRIDE, padding, True, False)
    pooling = (*_POOLING, (1, 1, 1), False)
    _, largest = torch.ops.aten.max_pool3d_with_indices(y, *pooling)
    grad = torch.ops.aten.max_pool3d_with_indices_backward(grad, y, *pooling, largest)
    grad = torch.ops.aten.threshold_backward(grad, y, 0)
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad,
        pixels,
        weight,
        None,
        _STRIDE,
        padding,
        [1, 1, 1],
        False,
        [0, 0, 0],
        1,
        [needs_x, needs_weight, False],
    )
    if needs_x and frames is not None:
        grad_x = torch.zeros_like(x).index_add(2, frames, grad_x)
    grad_bias = grad.sum((0, 2, 3, 4), dtype=bias.dtype) if needs_bias else None
    return grad_x, grad_weight, grad_bias, None, None, None


torch.library.register_autograd("slowfast_ext::stem", _backward, setup_context=_setup_context, lib=lib)


for _overload in (_operator, _operator_out):
    register_autocast(_overload, cast=("x", "weight"))
