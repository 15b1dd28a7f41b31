"""``cat([slow, relu(conv(fast) + bias)], 1)``: the lateral connection, its convolution strided in time."""

from functools import partial

import torch
from torch import Tensor

from .._library import lib
from .common import accumulator_dtype, allows_tf32, check, check_out, refuse_gradients_with_out, register_autocast
from .conv3d_bn_relu import conv3d_bn_relu_reference

_ARGUMENTS = "Tensor fast, Tensor weight, Tensor? bias, int stride, bool relu, bool allow_tf32"
lib.define(f"lateral_fuse(Tensor slow, {_ARGUMENTS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
lib.define(f"lateral_fuse.out({_ARGUMENTS}, Tensor(a!) out) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
_operator = torch.ops.slowfast_ext.lateral_fuse.default
_operator_out = torch.ops.slowfast_ext.lateral_fuse.out


def lateral_fuse(
    slow: Tensor, fast: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int, relu: bool = True
) -> Tensor:
    """Append the time-strided fast features to the slow ones, in one pass over memory.

    Equivalent to::

        y = F.conv3d(fast, weight, bias, (stride, 1, 1), (weight.shape[2] // 2, 0, 0))
        return torch.cat([slow, y.relu() if relu else y], 1)

    except that products and bias are summed in float32 and rounded once (float32 convolutions use TF32 where
    ``torch.backends.cudnn`` allows it, and three TF32 products a term elsewhere). A batch norm in evaluation mode
    belongs into weight and bias: see :func:`fold_batch_norm`. Where the producer of ``slow`` writes into the wider
    tensor itself, :func:`lateral_fuse_into` adds the rest.

    Args:
        slow (Tensor[N, Cs, T, H, W]): dtype of ``fast``.
        fast (Tensor[N, C, T', H, W]): float32, float16, bfloat16, on a CPU also float64, with
            ``T = (T' - 1) // stride + 1``. Any strides, fastest in channels_last_3d with a C that fills 16 bytes.
        weight (Tensor[K, C, k, 1, 1]): dtype of ``fast``, k odd.
        bias (Tensor[K]): float32 (float64 if ``fast`` is).
        stride: in time: frames of ``fast`` for one of ``slow``.
        relu: whether the ReLU is applied.

    Returns:
        Tensor[N, Cs + K, T, H, W]: in channels_last_3d.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype or device.

    Gradients for slow, fast, weight and bias, differentiable again. Under autocast slow, fast and weight are cast, bias
    is not.
    """
    return _operator(slow, fast, weight, bias, stride, relu, allows_tf32(fast))


def lateral_fuse_into(
    fast: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int, relu: bool = True, out: Tensor
) -> Tensor:
    """The part of :func:`lateral_fuse` behind ``slow``, written into ``out``. Without gradients.

    Args:
        fast, weight, bias, stride, relu: as there.
        out (Tensor[N, K, T, H, W]): dtype of ``fast``, channels_last_3d or a slice of the channels of such a tensor.
            Must not overlap ``fast``.

    Returns:
        Tensor[N, K, T, H, W]: ``out``.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype or device, or requires gradients while they are recorded.
    """
    refuse_gradients_with_out("lateral_fuse", fast, weight, bias, out)
    _operator_out(fast, weight, bias, stride, relu, allows_tf32(fast), out)
    return out


_check = partial(check, "lateral_fuse")


def _lateral_shape(fast, weight, bias, stride) -> list[int]:
    """The shape of the lateral part; checks what the CUDA kernels check too, with the same words."""
    _check(fast.dim() == 5, "fast", "(N, C, T, H, W)", tuple(fast.shape))
    _check(
        weight.dim() == 5
        and weight.shape[1] == fast.shape[1]
        and min(weight.shape[:2]) > 0
        and weight.shape[2] % 2 == 1
        and tuple(weight.shape[3:]) == (1, 1),
        "weight",
        f"(K, {fast.shape[1]}, an odd number, 1, 1)",
        tuple(weight.shape),
    )
    _check(stride > 0, "stride", "positive", stride)
    _check(fast.shape[2] > 0, "fast", "at least one frame", tuple(fast.shape))
    _check(fast.is_floating_point(), "fast", "floating point", fast.dtype)
    _check(weight.device == fast.device, "weight", f"on the device of fast, {fast.device}", weight.device)
    _check(weight.dtype == fast.dtype, "weight", f"in the dtype of fast, {fast.dtype}", weight.dtype)
    if bias is not None:
        _check(bias.dtype == accumulator_dtype(fast), "bias", accumulator_dtype(fast), bias.dtype)
        _check(bias.device == fast.device, "bias", f"on the device of fast, {fast.device}", bias.device)
        _check(tuple(bias.shape) == (weight.shape[0],), "bias", f"({weight.shape[0]},)", tuple(bias.shape))
    return [fast.shape[0], weight.shape[0], (fast.shape[2] - 1) // stride + 1, *fast.shape[3:]]


def _output_shape(slow, fast, weight, bias, stride) -> list[int]:
    n, channels, *rest = _lateral_shape(fast, weight, bias, stride)
    _check(slow.dim() == 5 and slow.shape[1] > 0, "slow", "(N, C, T, H, W)", tuple(slow.shape))
    like_fast = (n, slow.shape[1], *rest)
    _check(tuple(slow.shape) == like_fast, "slow", like_fast, tuple(slow.shape))
    _check(slow.device == fast.device, "slow", f"on the device of fast, {fast.device}", slow.device)
    _check(slow.dtype == fast.dtype, "slow", f"in the dtype of fast, {fast.dtype}", slow.dtype)
    return [n, slow.shape[1] + channels, *rest]


def _geometry(weight, stride):
    """Stride and padding of the convolution."""
    return (stride, 1, 1), (weight.shape[2] // 2, 0, 0)


def lateral_fuse_reference(slow, fast, weight, bias, stride, relu, allow_tf32=False) -> Tensor:
    """The operator in plain PyTorch; runs where there is no kernel. Arguments as in the schema."""
    _output_shape(slow, fast, weight, bias, stride)
    lateral = conv3d_bn_relu_reference(fast, weight, bias, None, *_geometry(weight, stride), relu)
    return torch.cat([slow, lateral], 1).contiguous(memory_format=torch.channels_last_3d)


def _into_reference(fast, weight, bias, stride, relu, allow_tf32, out) -> None:
    check_out("lateral_fuse", fast, out, _lateral_shape(fast, weight, bias, stride))
    out.copy_(conv3d_bn_relu_reference(fast, weight, bias, None, *_geometry(weight, stride), relu))


def _cpu_into(fast, weight, bias, stride, relu, allow_tf32, out) -> None:
    """The convolution by conv3d_bn_relu, which knows the fast ways of a CPU."""
    check_out("lateral_fuse", fast, out, _lateral_shape(fast, weight, bias, stride))
    convolution = torch.ops.slowfast_ext.conv3d_bn_relu.out
    convolution(fast, weight, bias, None, *_geometry(weight, stride), relu, allow_tf32, out)


def _cpu(slow, fast, weight, bias, stride, relu, allow_tf32) -> Tensor:
    shape = _output_shape(slow, fast, weight, bias, stride)
    y = torch.empty(shape, dtype=fast.dtype, memory_format=torch.channels_last_3d)
    channels = slow.shape[1]
    y[:, :channels].copy_(slow)
    _cpu_into(fast, weight, bias, stride, relu, allow_tf32, y[:, channels:])
    return y


def _fake(slow, fast, weight, bias, stride, relu, allow_tf32):
    shape = _output_shape(slow, fast, weight, bias, stride)
    return fast.new_empty(shape).to(memory_format=torch.channels_last_3d)


lib.impl("lateral_fuse", lateral_fuse_reference, "CompositeExplicitAutograd")
lib.impl("lateral_fuse.out", _into_reference, "CompositeExplicitAutograd")
lib.impl("lateral_fuse", _cpu, "CPU")
lib.impl("lateral_fuse.out", _cpu_into, "CPU")
torch.library.register_fake("slowfast_ext::lateral_fuse", _fake, lib=lib)


@torch.library.register_fake("slowfast_ext::lateral_fuse.out", lib=lib)
def _fake_into(fast, weight, bias, stride, relu, allow_tf32, out):
    check_out("lateral_fuse", fast, out, _lateral_shape(fast, weight, bias, stride))


def _setup_context(ctx, inputs, output):
    slow, fast, weight, bias, ctx.stride, ctx.relu, _ = inputs
    ctx.slow_channels = slow.shape[1]
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(fast, weight, output if ctx.relu else None)


def _backward(ctx, grad):
    fast, weight, y = ctx.saved_tensors
    grad_slow, grad = grad.tensor_split([ctx.slow_channels], 1)
    if ctx.relu:
        grad = torch.ops.aten.threshold_backward(grad, y[:, ctx.slow_channels :], 0)
    needs_slow, needs_fast, needs_weight, needs_bias = ctx.needs_input_grad[:4]
    grad_fast = grad_weight = None
    if needs_fast or needs_weight:
        grad_fast, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad,
            fast,
            weight,
            None,
            *_geometry(weight, ctx.stride),
            [1, 1, 1],
            False,
            [0, 0, 0],
            1,
            [needs_fast, needs_weight, False],
        )
    grad_bias = grad.sum((0, 2, 3, 4), dtype=ctx.bias_dtype) if needs_bias else None
    return grad_slow if needs_slow else None, grad_fast, grad_weight, grad_bias, None, None, None


torch.library.register_autograd("slowfast_ext::lateral_fuse", _backward, setup_context=_setup_context, lib=lib)


for _overload, _cast in ((_operator, ("slow", "fast", "weight")), (_operator_out, ("fast", "weight"))):
    register_autocast(_overload, cast=_cast)
