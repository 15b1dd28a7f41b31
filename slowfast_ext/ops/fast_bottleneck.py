"""A bottleneck block of the Fast pathway in one launch, with its batch norms folded into weights and biases."""

from functools import partial

import torch
from torch import Tensor

from .._library import lib, unavailable_reason
from .common import accumulator_dtype, check, check_out, refuse_gradients_with_out, register_autocast
from .conv3d_bn_relu import conv3d_bn_relu_reference

_ARGUMENTS = (
    "Tensor x, Tensor weight_a, Tensor bias_a, Tensor weight_b, Tensor bias_b, Tensor weight_c, Tensor bias_c, "
    "Tensor? weight_shortcut, Tensor? bias_shortcut, int stride"
)
lib.define(f"fast_bottleneck({_ARGUMENTS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
lib.define(f"fast_bottleneck.out({_ARGUMENTS}, Tensor(a!) out) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
_operator = torch.ops.slowfast_ext.fast_bottleneck.default
_operator_out = torch.ops.slowfast_ext.fast_bottleneck.out

# The kernels there are, (in_channels, channels, stride), and the bytes of shared memory that a thread block needs.
# Blocks that change the width or the size have a projection, the others have not.
SHARED_BYTES = {
    (8, 8, 1): 15808,
    (32, 8, 1): 50112,
    (32, 16, 2): 97440,
    (64, 16, 1): 99584,
    (64, 32, 2): 134400,
    (128, 32, 1): 141568,
}


def fast_bottleneck(
    x: Tensor,
    weight_a: Tensor,
    bias_a: Tensor,
    weight_b: Tensor,
    bias_b: Tensor,
    weight_c: Tensor,
    bias_c: Tensor,
    weight_shortcut: Tensor | None = None,
    bias_shortcut: Tensor | None = None,
    *,
    stride: int = 1,
    out: Tensor | None = None,
) -> Tensor:
    """A residual block of kernels 3x1x1, 1x3x3, 1x1x1 that reads x and writes y once; what is between stays on chip.

    Equivalent to::

        a = F.conv3d(x, weight_a, bias_a, padding=(1, 0, 0)).relu()
        b = F.conv3d(a, weight_b, bias_b, stride=(1, stride, stride), padding=(0, 1, 1)).relu()
        shortcut = x if weight_shortcut is None else F.conv3d(x, weight_shortcut, bias_shortcut, (1, stride, stride))
        return (F.conv3d(b, weight_c, bias_c) + shortcut).relu()

    except that sums are kept in float32, and a, b and the result are rounded once each. :func:`fold_batch_norm` folds
    the batch norms. On a GPU there are kernels for float16 and bfloat16 and the blocks of the published Fast pathway:
    ask :func:`fast_bottleneck_reason_against`, and run other blocks layer by layer with :func:`conv3d_bn_relu`.

    Args:
        x (Tensor[N, C, T, H, W]): channels_last_3d, or some channels of such a tensor; others are copied.
        weight_a (Tensor[M, C, 3, 1, 1]): this and the other weights have the dtype of ``x`` and are fastest in
            channels_last_3d.
        bias_a (Tensor[M]): this and the other biases are float32 (float64 if ``x`` is).
        weight_b (Tensor[M, M, 1, 3, 3])
        bias_b (Tensor[M])
        weight_c (Tensor[4 M, M, 1, 1, 1])
        bias_c (Tensor[4 M])
        weight_shortcut (Tensor[4 M, C, 1, 1, 1]): None for the identity, which needs C = 4 M and stride 1.
        bias_shortcut (Tensor[4 M]): given if and only if ``weight_shortcut`` is.
        stride: spatial, 1 or 2.
        out (Tensor[N, 4 M, T, H', W']): where to write, dtype of ``x``: channels_last_3d, or a slice of the channels of
            such a tensor. Must not overlap ``x``. Without gradients.

    Returns:
        Tensor[N, 4 M, T, H', W']: ``out``, or a new tensor in channels_last_3d; H' is H / stride, rounded up.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype or device, or no kernel serves the block on this GPU.

    Gradients for x, weights and biases, differentiable again. The backward pass keeps x and the result only: it
    computes a and b once more, layer by layer. Under autocast x and the weights are cast, the biases are not.
    """
    arguments = (x, weight_a, bias_a, weight_b, bias_b, weight_c, bias_c, weight_shortcut, bias_shortcut)
    if out is None:
        return _operator(*arguments, stride)
    refuse_gradients_with_out("fast_bottleneck", *arguments, out)
    _operator_out(*arguments, stride, out)
    return out


def fast_bottleneck_reason_against(
    in_channels: int,
    channels: int,
    *,
    stride: int = 1,
    projection: bool = False,
    temporal_kernel: int = 3,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
) -> str | None:
    """Why no kernel computes a block in one launch, or None if one does.

    Args:
        in_channels, channels: C and M, channels of the input and between the convolutions.
        stride: spatial.
        projection: whether the shortcut is a convolution.
        temporal_kernel: of the first convolution.
        dtype: of x.
        device: where it is to run; the current CUDA device if None.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return f"there are kernels for torch.float16 and torch.bfloat16, not for {dtype}"
    if temporal_kernel != 3:
        return f"the kernels have a temporal kernel of 3, not of {temporal_kernel}"
    block = (in_channels, channels, stride)
    if block not in SHARED_BYTES or projection != (stride > 1 or in_channels != 4 * channels):
        shortcut = "a projection" if projection else "the identity"
        served = ", ".join(map(str, SHARED_BYTES))
        return (
            f"no kernel has in_channels, channels, stride {block} with {shortcut} as the shortcut; there are {served}, "
            "with the identity where it fits"
        )
    reason = unavailable_reason(device)
    if reason is not None:
        return reason
    properties = torch.cuda.get_device_properties(device)
    if SHARED_BYTES[block] > properties.shared_memory_per_block_optin:
        return (
            f"a thread block needs {SHARED_BYTES[block]} bytes of shared memory, "
            f"{properties.name} has {properties.shared_memory_per_block_optin}"
        )
    return None


_check = partial(check, "fast_bottleneck")


def _output_shape(
    x, weight_a, bias_a, weight_b, bias_b, weight_c, bias_c, weight_shortcut, bias_shortcut, stride
) -> list[int]:
    """The shape of the result; checks what the CUDA kernels check too, with the same words."""
    _check(x.dim() == 5 and min(x.shape[1:]) > 0, "x", "(N, C, T, H, W), not empty", tuple(x.shape))
    _check(x.is_floating_point(), "x", "floating point", x.dtype)
    _check(stride in (1, 2), "stride", "1 or 2", stride)
    in_channels, channels = x.shape[1], weight_a.shape[0]
    out_channels = 4 * channels
    _check(channels > 0, "weight_a", f"(M, {in_channels}, 3, 1, 1)", tuple(weight_a.shape))
    _check(
        (weight_shortcut is None) == (bias_shortcut is None),
        "bias_shortcut",
        "given exactly if weight_shortcut is",
        "one without the other",
    )
    if weight_shortcut is None:
        fits = stride == 1 and in_channels == out_channels
        message = f"given unless the stride is 1 and x has {out_channels} channels"
        _check(fits, "weight_shortcut", message, f"None for stride {stride} and {in_channels} channels")
    for name, weight, shape in (
        ("weight_a", weight_a, (channels, in_channels, 3, 1, 1)),
        ("weight_b", weight_b, (channels, channels, 1, 3, 3)),
        ("weight_c", weight_c, (out_channels, channels, 1, 1, 1)),
        ("weight_shortcut", weight_shortcut, (out_channels, in_channels, 1, 1, 1)),
    ):
        if weight is not None:
            _check(tuple(weight.shape) == shape, name, shape, tuple(weight.shape))
            _check(weight.device == x.device, name, f"on the device of x, {x.device}", weight.device)
            _check(weight.dtype == x.dtype, name, f"in the dtype of x, {x.dtype}", weight.dtype)
    for name, bias, size in (
        ("bias_a", bias_a, channels),
        ("bias_b", bias_b, channels),
        ("bias_c", bias_c, out_channels),
        ("bias_shortcut", bias_shortcut, out_channels),
    ):
        if bias is not None:
            _check(bias.dtype == accumulator_dtype(x), name, accumulator_dtype(x), bias.dtype)
            _check(bias.device == x.device, name, f"on the device of x, {x.device}", bias.device)
            _check(tuple(bias.shape) == (size,), name, f"({size},)", tuple(bias.shape))
    height, width = ((size + stride - 1) // stride for size in x.shape[3:])
    return [x.shape[0], out_channels, x.shape[2], height, width]


def _inner_layers(convolve, x, weight_a, bias_a, weight_b, bias_b, stride) -> tuple[Tensor, Tensor]:
    """a and b of the block, with ``convolve`` as conv3d_bn_relu."""
    a = convolve(x, weight_a, bias_a, None, (1, 1, 1), (1, 0, 0), True, False)
    return a, convolve(a, weight_b, bias_b, None, (1, stride, stride), (0, 1, 1), True, False)


def _layer_by_layer(
    convolve, x, weight_a, bias_a, weight_b, bias_b, weight_c, bias_c, weight_shortcut, bias_shortcut, stride
) -> Tensor:
    _, b = _inner_layers(convolve, x, weight_a, bias_a, weight_b, bias_b, stride)
    if weight_shortcut is None:
        return convolve(b, weight_c, bias_c, x, (1, 1, 1), (0, 0, 0), True, False)
    # Last convolution and projection are one convolution of both their inputs: one sum, one rounding.
    inputs = torch.cat([b, x[..., ::stride, ::stride]], 1)
    weight = torch.cat([weight_c, weight_shortcut], 1)
    return convolve(inputs, weight, bias_c + bias_shortcut, None, (1, 1, 1), (0, 0, 0), True, False)


def fast_bottleneck_reference(
    x, weight_a, bias_a, weight_b, bias_b, weight_c, bias_c, weight_shortcut, bias_shortcut, stride
) -> Tensor:
    """The operator in plain PyTorch; runs where there is no kernel. Arguments as in the schema."""
    arguments = (x, weight_a, bias_a, weight_b, bias_b, weight_c, bias_c, weight_shortcut, bias_shortcut, stride)
    _output_shape(*arguments)
    return _layer_by_layer(conv3d_bn_relu_reference, *arguments)


_convolve = torch.ops.slowfast_ext.conv3d_bn_relu.default


def _cpu(*arguments) -> Tensor:
    """Each layer with what conv3d_bn_relu has for a CPU."""
    _output_shape(*arguments)
    return _layer_by_layer(_convolve, *arguments)


def _into(implementation):
    def into(*arguments) -> None:
        *arguments, out = arguments
        check_out("fast_bottleneck", arguments[0], out, _output_shape(*arguments))
        out.copy_(implementation(*arguments))

    return into


lib.impl("fast_bottleneck", fast_bottleneck_reference, "CompositeExplicitAutograd")
lib.impl("fast_bottleneck.out", _into(fast_bottleneck_reference), "CompositeExplicitAutograd")
lib.impl("fast_bottleneck", _cpu, "CPU")
lib.impl("fast_bottleneck.out", _into(_cpu), "CPU")


@torch.library.register_fake("slowfast_ext::fast_bottleneck", lib=lib)
def _fake(*arguments):
    return arguments[0].new_empty(_output_shape(*arguments)).to(memory_format=torch.channels_last_3d)


@torch.library.register_fake("slowfast_ext::fast_bottleneck.out", lib=lib)
def _fake_into(*arguments):
    *arguments, out = arguments
    check_out("fast_bottleneck", arguments[0], out, _output_shape(*arguments))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.stride = inputs
    ctx.save_for_backward(*tensors, output)


def _backward(ctx, grad):
    x, weight_a, bias_a, weight_b, bias_b, weight_c, _, weight_shortcut, _, y = ctx.saved_tensors
    needs_x, needs_a, _, needs_b, _, needs_c, _, needs_shortcut, *_ = ctx.needs_input_grad
    stride, unit, none = (1, ctx.stride, ctx.stride), (1, 1, 1), (0, 0, 0)
    a, b = _inner_layers(_convolve, x, weight_a, bias_a, weight_b, bias_b, ctx.stride)

    def through(grad, x, weight, stride, padding, *needs):
        geometry = (stride, padding, unit, False, none, 1)
        return torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, [*needs, False])[:2]

    grad_c = torch.ops.aten.threshold_backward(grad, y, 0)
    grad_b, grad_weight_c = through(grad_c, b, weight_c, unit, none, True, needs_c)
    grad_b = torch.ops.aten.threshold_backward(grad_b, b, 0)
    grad_a, grad_weight_b = through(grad_b, a, weight_b, stride, (0, 1, 1), True, needs_b)
    grad_a = torch.ops.aten.threshold_backward(grad_a, a, 0)
    grad_x, grad_weight_a = through(grad_a, x, weight_a, unit, (1, 0, 0), needs_x, needs_a)
    grad_shortcut, grad_weight_shortcut = grad_c, None
    if weight_shortcut is not None:
        grad_shortcut, grad_weight_shortcut = through(grad_c, x, weight_shortcut, stride, none, needs_x, needs_shortcut)
    grad_biases = [
        layer_grad.sum((0, 2, 3, 4), dtype=accumulator_dtype(x)) if needs else None
        for layer_grad, needs in zip(
            (grad_a, grad_b, grad_c, grad_c), (ctx.needs_input_grad[i] for i in (2, 4, 6, 8)), strict=True
        )
    ]
    return (
        grad_x + grad_shortcut if needs_x else None,
        grad_weight_a,
        grad_biases[0],
        grad_weight_b,
        grad_biases[1],
        grad_weight_c,
        grad_biases[2],
        grad_weight_shortcut,
        grad_biases[3],
        None,
    )


torch.library.register_autograd("slowfast_ext::fast_bottleneck", _backward, setup_context=_setup_context, lib=lib)


for _overload in (_operator, _operator_out):
    register_autocast(_overload, cast=("x", "weight_a", "weight_b", "weight_c", "weight_shortcut"))
