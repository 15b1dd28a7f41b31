"""Two convolutions of one tensor in one launch, as the first convolution and the shortcut of a residual block."""

import torch
from torch import Tensor

from .._library import lib
from .common import allows_tf32, check, check_out, refuse_gradients_with_out, register_autocast
from .conv3d_bn_relu import conv3d_bn_relu_reference, convolution_gradients, convolution_shape

_NAME = "conv3d_bn_relu_pair"
_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor weight_shortcut, Tensor? bias_shortcut, int[3] stride, "
    "int[3] padding, int[3] stride_shortcut, int[3] padding_shortcut, bool relu, bool relu_shortcut, bool allow_tf32"
)
_RESULTS = "Tensor(a!) out, Tensor(b!) out_shortcut"
lib.define(f"{_NAME}({_ARGUMENTS}) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
lib.define(f"{_NAME}.out({_ARGUMENTS}, {_RESULTS}) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
_operator = torch.ops.slowfast_ext.conv3d_bn_relu_pair.default
_operator_out = torch.ops.slowfast_ext.conv3d_bn_relu_pair.out


def conv3d_bn_relu_pair(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_shortcut: Tensor,
    bias_shortcut: Tensor | None,
    *,
    stride: int | tuple[int, int, int] = 1,
    padding: int | tuple[int, int, int] = 0,
    stride_shortcut: int | tuple[int, int, int] = 1,
    padding_shortcut: int | tuple[int, int, int] = 0,
    relu: bool = True,
    relu_shortcut: bool = False,
    out: Tensor | None = None,
    out_shortcut: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Two convolutions of the same tensor, each with what follows it, in one pass over memory.

    Equivalent to two calls of :func:`conv3d_bn_relu`::

        y = conv3d_bn_relu(x, weight, bias, stride=stride, padding=padding, relu=relu)
        shortcut = conv3d_bn_relu(
            x, weight_shortcut, bias_shortcut, stride=stride_shortcut, padding=padding_shortcut, relu=relu_shortcut
        )

    which they are on a CPU. On a GPU they are one launch that reads ``x`` from memory once, followed by a small second
    one where there are too few output pixels to occupy the GPU. The defaults are those of the first block of a stage:
    its first convolution has a ReLU, its shortcut has none.

    Args:
        x (Tensor[N, C, T, H, W]): float32, float16, bfloat16, on a CPU also float64; any strides, fastest in
            channels_last_3d with a C that fills 16 bytes.
        weight (Tensor[K, C, kernel_t, kernel_h, kernel_w]): dtype of ``x``; fastest in channels_last_3d.
        bias (Tensor[K]): float32 (float64 if ``x`` is).
        weight_shortcut (Tensor[K', C, kernel_t', kernel_h', kernel_w']): as ``weight``.
        bias_shortcut (Tensor[K']): as ``bias``.
        stride, padding, stride_shortcut, padding_shortcut: elements along (T, H, W), or one number for all three.
        relu, relu_shortcut: whether the ReLU is applied.
        out, out_shortcut (Tensor[N, K, ...], Tensor[N, K', ...]): where to write, both or neither, dtype of ``x``:
            channels_last_3d, or a slice of the channels of such a tensor. Must not overlap ``x`` or each other. Without
            gradients.

    Returns:
        (Tensor[N, K, ...], Tensor[N, K', ...]): ``out`` and ``out_shortcut``, or new tensors in channels_last_3d.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype or device, a kernel does not fit into the padded input, or
            only one of ``out`` and ``out_shortcut`` is given.

    Gradients for x, weights and biases, differentiable again. Under autocast x and the weights are cast, the biases are
    not.
    """
    stride, padding, stride_shortcut, padding_shortcut = (
        (value,) * 3 if isinstance(value, int) else value
        for value in (stride, padding, stride_shortcut, padding_shortcut)
    )
    tensors = (x, weight, bias, weight_shortcut, bias_shortcut)
    arguments = (*tensors, stride, padding, stride_shortcut, padding_shortcut, relu, relu_shortcut, allows_tf32(x))
    both_or_neither = (out is None) == (out_shortcut is None)
    check(_NAME, both_or_neither, "out_shortcut", "given exactly if out is", "one without the other")
    if out is None:
        return _operator(*arguments)
    refuse_gradients_with_out(_NAME, *tensors, out, out_shortcut)
    _operator_out(*arguments, out, out_shortcut)
    return out, out_shortcut


def _output_shapes(
    x, weight, bias, weight_shortcut, bias_shortcut, stride, padding, stride_shortcut, padding_shortcut
) -> tuple[list[int], list[int]]:
    shortcut = (weight_shortcut, bias_shortcut, stride_shortcut, padding_shortcut)
    return (
        convolution_shape(_NAME, x, weight, bias, stride, padding),
        convolution_shape(_NAME, x, *shortcut, suffix="_shortcut"),
    )


def _each(arguments) -> tuple[tuple, tuple]:
    """The arguments of the two calls of conv3d_bn_relu."""
    x, weight, bias, weight_shortcut, bias_shortcut, stride, padding, stride_shortcut, padding_shortcut = arguments[:9]
    relu, relu_shortcut, allow_tf32 = arguments[9:]
    return (
        (x, weight, bias, None, stride, padding, relu, allow_tf32),
        (x, weight_shortcut, bias_shortcut, None, stride_shortcut, padding_shortcut, relu_shortcut, allow_tf32),
    )


def conv3d_bn_relu_pair_reference(*arguments) -> tuple[Tensor, Tensor]:
    """The operator in plain PyTorch; runs where there is no kernel. Arguments as in the schema."""
    _output_shapes(*arguments[:9])
    first, shortcut = _each(arguments)
    return conv3d_bn_relu_reference(*first), conv3d_bn_relu_reference(*shortcut)


def _cpu(x, *arguments) -> tuple[Tensor, Tensor]:
    """By conv3d_bn_relu, which knows the fast ways of a CPU; ``x`` is brought into their layout once."""
    _output_shapes(x, *arguments[:8])
    first, shortcut = _each((x.contiguous(memory_format=torch.channels_last_3d), *arguments))
    convolution = torch.ops.slowfast_ext.conv3d_bn_relu.default
    return convolution(*first), convolution(*shortcut)


def _into(implementation):
    def into(*arguments) -> None:
        *arguments, out, out_shortcut = arguments
        _check_outs(arguments, out, out_shortcut)
        y, shortcut = implementation(*arguments)
        out.copy_(y)
        out_shortcut.copy_(shortcut)

    return into


def _check_outs(arguments, out, out_shortcut) -> None:
    shape, shape_shortcut = _output_shapes(*arguments[:9])
    check_out(_NAME, arguments[0], out, shape)
    check_out(_NAME, arguments[0], out_shortcut, shape_shortcut, out_name="out_shortcut")


lib.impl(_NAME, conv3d_bn_relu_pair_reference, "CompositeExplicitAutograd")
lib.impl(f"{_NAME}.out", _into(conv3d_bn_relu_pair_reference), "CompositeExplicitAutograd")
lib.impl(_NAME, _cpu, "CPU")
lib.impl(f"{_NAME}.out", _into(_cpu), "CPU")


@torch.library.register_fake(f"slowfast_ext::{_NAME}", lib=lib)
def _fake(x, *arguments):
    shapes = _output_shapes(x, *arguments[:8])
    return tuple(x.new_empty(shape).to(memory_format=torch.channels_last_3d) for shape in shapes)


@torch.library.register_fake(f"slowfast_ext::{_NAME}.out", lib=lib)
def _fake_into(*arguments):
    *arguments, out, out_shortcut = arguments
    _check_outs(arguments, out, out_shortcut)


def _setup_context(ctx, inputs, output):
    x, weight, bias, weight_shortcut, bias_shortcut, *geometry, relu, relu_shortcut, _ = inputs
    y, shortcut = output
    ctx.stride, ctx.padding, ctx.stride_shortcut, ctx.padding_shortcut = geometry
    ctx.bias_dtypes = [None if tensor is None else tensor.dtype for tensor in (bias, bias_shortcut)]
    ctx.save_for_backward(x, weight, weight_shortcut, y if relu else None, shortcut if relu_shortcut else None)


def _backward(ctx, grad, grad_shortcut):
    x, weight, weight_shortcut, y, shortcut = ctx.saved_tensors
    if y is not None:
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
    if shortcut is not None:
        grad_shortcut = torch.ops.aten.threshold_backward(grad_shortcut, shortcut, 0)
    needs_x, *needs = ctx.needs_input_grad[:5]
    grad_x, *gradients = convolution_gradients(
        grad, x, weight, ctx.stride, ctx.padding, ctx.bias_dtypes[0], (needs_x, *needs[:2])
    )
    more_x, *gradients_shortcut = convolution_gradients(
        grad_shortcut,
        x,
        weight_shortcut,
        ctx.stride_shortcut,
        ctx.padding_shortcut,
        ctx.bias_dtypes[1],
        (needs_x, *needs[2:]),
    )
    return grad_x + more_x if needs_x else None, *gradients, *gradients_shortcut, *[None] * 7


torch.library.register_autograd(f"slowfast_ext::{_NAME}", _backward, setup_context=_setup_context, lib=lib)


register_autocast(_operator, cast=("x", "weight", "weight_shortcut"))
register_autocast(_operator_out, cast=("x", "weight", "weight_shortcut"), keep=("out_shortcut",))
