"""``relu(conv3d(x, weight) + bias + residual)`` with the batch norm folded into weight and bias."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .._library import lib
from .common import accumulator_dtype, allows_tf32, check, check_out, refuse_gradients_with_out, register_autocast

_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int[3] stride, int[3] padding, bool relu, bool allow_tf32"
)
lib.define(f"conv3d_bn_relu({_ARGUMENTS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
lib.define(f"conv3d_bn_relu.out({_ARGUMENTS}, Tensor(a!) out) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
lib.define(
    f"conv3d_bn_relu.tiled({_ARGUMENTS}, int tile, int splits, Tensor(a!) out) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_operator = torch.ops.slowfast_ext.conv3d_bn_relu.default
_operator_out = torch.ops.slowfast_ext.conv3d_bn_relu.out
_operator_tiled = torch.ops.slowfast_ext.conv3d_bn_relu.tiled

# Output pixels x output channels of a thread block; in the order of csrc/conv3d_plan.cuh.
TILES = ("128x128", "128x64", "64x64", "128x32", "128x16")


def conv3d_bn_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: int | tuple[int, int, int] = 1,
    padding: int | tuple[int, int, int] = 0,
    relu: bool = True,
    out: Tensor | None = None,
    tile: tuple[str, int] | None = None,
) -> Tensor:
    """3-D convolution with everything that follows it in a residual network, in one pass over memory.

    Equivalent to::

        y = F.conv3d(x, weight, bias, stride, padding)
        y = y if residual is None else y + residual
        return y.relu() if relu else y

    except that products, bias and residual are summed in float32 and rounded once. Float32 convolutions use TF32 where
    ``torch.backends.cudnn`` allows it, as torch's own do, and three TF32 products a term elsewhere. A batch norm in
    evaluation mode belongs into weight and bias: see :func:`fold_batch_norm`.

    On a CPU, in float32, the ReLU is oneDNN's, which makes 0 of NaN; everywhere else NaN stays NaN.

    Args:
        x (Tensor[N, C, T, H, W]): float32, float16, bfloat16, on a CPU also float64; any strides, fastest in
            channels_last_3d with a C that fills 16 bytes.
        weight (Tensor[K, C, kernel_t, kernel_h, kernel_w]): dtype of ``x``; fastest in channels_last_3d.
        bias (Tensor[K]): float32 (float64 if ``x`` is).
        residual (Tensor[N, K, T', H', W']): dtype of ``x``, added before the ReLU.
        stride, padding: elements along (T, H, W), or one number for all three.
        relu: whether the ReLU is applied.
        out (Tensor[N, K, T', H', W']): where to write, dtype of ``x``: channels_last_3d, or a slice of the channels of
            such a tensor, which is how a concatenation is filled without a copy. Must not overlap ``x``. Without
            gradients.
        tile: for measurements on a GPU, with ``out``: one of ``TILES`` and how many thread blocks share the sums of
            one output (1, 2, 4, 8 or 16), in place of what the kernel's cost model chooses.

    Returns:
        Tensor[N, K, T', H', W']: ``out``, or a new tensor in channels_last_3d.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype or device, or the kernel does not fit into the padded input.

    Gradients for x, weight, bias and residual, differentiable again. Under autocast x, weight and residual are cast,
    bias is not.
    """
    stride = (stride,) * 3 if isinstance(stride, int) else stride
    padding = (padding,) * 3 if isinstance(padding, int) else padding
    allow_tf32 = allows_tf32(x)
    _check_tile(x, out, tile)
    if out is None:
        return _operator(x, weight, bias, residual, stride, padding, relu, allow_tf32)
    refuse_gradients_with_out("conv3d_bn_relu", x, weight, bias, residual, out)
    arguments = (x, weight, bias, residual, stride, padding, relu, allow_tf32)
    if tile is None:
        _operator_out(*arguments, out)
    else:
        _operator_tiled(*arguments, TILES.index(tile[0]), tile[1], out)
    return out


def _check_tile(x: Tensor, out: Tensor | None, tile: tuple[str, int] | None) -> None:
    if tile is not None:
        check("conv3d_bn_relu", x.is_cuda and out is not None, "tile", "None without out and without a GPU", tile)
        known = tile[0] in TILES and tile[1] in (1, 2, 4, 8, 16)
        check("conv3d_bn_relu", known, "tile", f"one of {TILES} with 1, 2, 4, 8 or 16 blocks", tile)


def fold_batch_norm(
    weight: Tensor, bias: Tensor | None, bn: torch.nn.BatchNorm3d | None
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the convolution that equals convolution, then ``bn`` in evaluation mode.

    ``weight * gamma / sqrt(var + eps)`` and ``(bias - mean) * gamma / sqrt(var + eps) + beta``, computed in float64:
    an error of the factor would be the same in all products of a channel, and add up.

    Args:
        weight (Tensor[K, C, kernel_t, kernel_h, kernel_w]): floating point.
        bias (Tensor[K]): the convolution's own.
        bn: with running statistics; None folds nothing.

    Returns:
        (Tensor[K, C, kernel_t, kernel_h, kernel_w], Tensor[K] or None): float32 (float64 if ``weight`` is), to be
        rounded once by the caller.
    """
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if bn is None:
        return weight.to(dtype), None if bias is None else bias.to(dtype)
    scale = torch.rsqrt(bn.running_var.double() + bn.eps)
    if bn.weight is not None:
        scale = scale * bn.weight.double()
    shift = (-bn.running_mean.double() if bias is None else bias.double() - bn.running_mean.double()) * scale
    if bn.bias is not None:
        shift = shift + bn.bias.double()
    return (weight.double() * scale.view(-1, 1, 1, 1, 1)).to(dtype), shift.to(dtype)


def convolution_shape(operator: str, x, weight, bias, stride, padding, *, suffix: str = "") -> list[int]:
    """The shape of a convolution's result; checks what the CUDA kernels check too, with the same words.

    ``suffix`` is what the operator's names of all arguments but x end in.
    """
    _check = partial(check, operator)
    _check(x.dim() == 5, "x", "(N, C, T, H, W)", tuple(x.shape))
    _check(
        weight.dim() == 5 and weight.shape[1] == x.shape[1] and min(weight.shape[:2]) > 0,
        f"weight{suffix}",
        f"(K, {x.shape[1]}, kernel_t, kernel_h, kernel_w)",
        tuple(weight.shape),
    )
    _check(len(stride) == 3 and min(stride) > 0, f"stride{suffix}", "three positive integers", tuple(stride))
    _check(len(padding) == 3 and min(padding) >= 0, f"padding{suffix}", "three integers of at least 0", tuple(padding))
    shape = [x.shape[0], weight.shape[0]]
    for size, kernel, step, pad, dimension in zip(
        x.shape[2:], weight.shape[2:], stride, padding, (2, 3, 4), strict=True
    ):
        padded = size + 2 * pad
        torch._check(
            kernel > 0 and padded >= kernel,
            lambda kernel=kernel, padded=padded, dimension=dimension: (
                f"{operator}: weight{suffix}'s kernel must fit into the padded input, "
                f"got kernel {kernel} for {padded} elements in dimension {dimension}"
            ),
        )
        shape.append((padded - kernel) // step + 1)
    _check(x.is_floating_point(), "x", "floating point", x.dtype)
    _check(weight.device == x.device, f"weight{suffix}", f"on the device of x, {x.device}", weight.device)
    _check(weight.dtype == x.dtype, f"weight{suffix}", f"in the dtype of x, {x.dtype}", weight.dtype)
    if bias is not None:
        _check(bias.dtype == accumulator_dtype(x), f"bias{suffix}", accumulator_dtype(x), bias.dtype)
        _check(bias.device == x.device, f"bias{suffix}", f"on the device of x, {x.device}", bias.device)
        _check(tuple(bias.shape) == (weight.shape[0],), f"bias{suffix}", f"({weight.shape[0]},)", tuple(bias.shape))
    return shape


def _output_shape(x, weight, bias, residual, stride, padding) -> list[int]:
    shape = convolution_shape("conv3d_bn_relu", x, weight, bias, stride, padding)
    if residual is not None:
        _check = partial(check, "conv3d_bn_relu", argument="residual")
        _check(residual.device == x.device, expected=f"on the device of x, {x.device}", actual=residual.device)
        _check(residual.dtype == x.dtype, expected=f"in the dtype of x, {x.dtype}", actual=residual.dtype)
        _check(tuple(residual.shape) == tuple(shape), expected=tuple(shape), actual=tuple(residual.shape))
    return shape


def conv3d_bn_relu_reference(x, weight, bias, residual, stride, padding, relu, allow_tf32=False) -> Tensor:
    """The operator in plain PyTorch; runs where there is no kernel. Arguments as in the schema."""
    _output_shape(x, weight, bias, residual, stride, padding)
    y = F.conv3d(x, weight, None, stride, padding).to(accumulator_dtype(x))
    if bias is not None:
        y = y + bias.view(-1, 1, 1, 1)
    if residual is not None:
        y = y + residual
    if relu:
        y = y.relu()
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last_3d)


def _onednn_computes(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.float32


def _cpu(x, weight, bias, residual, stride, padding, relu, allow_tf32=False) -> Tensor:
    """To oneDNN where it has the dtype, with the epilogue as its post-ops, as torch's own compiler calls it.

    ``F.conv3d`` takes a path without oneDNN for N * C * T * H <= 20480, which is up to 20 times slower. In 16 bits
    oneDNN's own ReLU makes zeros of NaN, and its addition wants the bias in 16 bits: these two are torch's.
    """
    shape = _output_shape(x, weight, bias, residual, stride, padding)
    if not _onednn_computes(x.dtype):
        return conv3d_bn_relu_reference(x, weight, bias, residual, stride, padding, relu)
    if 0 in shape:
        return x.new_empty(shape).to(memory_format=torch.channels_last_3d)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    convolution = (weight, bias, padding, stride, (1, 1, 1), 1)
    if residual is not None and x.dtype == torch.float32:
        residual = residual.contiguous(memory_format=torch.channels_last_3d)
    # One pixel, or one channel, is in both layouts, and torch 2.11 takes that for the other one.
    ambiguous = residual is not None and residual.is_contiguous()
    if x.dtype != torch.float32 or ambiguous:
        y = torch.ops.mkldnn._convolution_pointwise(x, *convolution, "none", [], "")
        y = y if residual is None else y.add_(residual)
        y = y.relu_() if relu else y
    elif residual is None:
        y = torch.ops.mkldnn._convolution_pointwise(x, *convolution, "relu" if relu else "none", [], "")
    else:
        epilogue = ("add", 1.0, "relu" if relu else None, [], None)
        y = torch.ops.mkldnn._convolution_pointwise(x, residual, *convolution, *epilogue)
    return y.contiguous(memory_format=torch.channels_last_3d)


def _into(implementation):
    def into(x, weight, bias, residual, stride, padding, relu, allow_tf32, out) -> None:
        check_out("conv3d_bn_relu", x, out, _output_shape(x, weight, bias, residual, stride, padding))
        out.copy_(implementation(x, weight, bias, residual, stride, padding, relu))

    return into


lib.impl("conv3d_bn_relu", conv3d_bn_relu_reference, "CompositeExplicitAutograd")
lib.impl("conv3d_bn_relu.out", _into(conv3d_bn_relu_reference), "CompositeExplicitAutograd")
lib.impl("conv3d_bn_relu", _cpu, "CPU")
lib.impl("conv3d_bn_relu.out", _into(_cpu), "CPU")


@torch.library.register_fake("slowfast_ext::conv3d_bn_relu", lib=lib)
def _fake(x, weight, bias, residual, stride, padding, relu, allow_tf32):
    shape = _output_shape(x, weight, bias, residual, stride, padding)
    return x.new_empty(shape).to(memory_format=torch.channels_last_3d)


@torch.library.register_fake("slowfast_ext::conv3d_bn_relu.out", lib=lib)
def _fake_into(x, weight, bias, residual, stride, padding, relu, allow_tf32, out):
    check_out("conv3d_bn_relu", x, out, _output_shape(x, weight, bias, residual, stride, padding))


def _setup_context(ctx, inputs, output):
    x, weight, bias, _, ctx.stride, ctx.padding, ctx.relu, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, output if ctx.relu else None)


def convolution_gradients(grad, x, weight, stride, padding, bias_dtype, needs):
    """Of x, weight and bias, each None unless needed, from the gradient of the sum before the ReLU."""
    needs_x, needs_weight, needs_bias = needs
    grad_x = grad_weight = None
    if needs_x or needs_weight:
        geometry = (stride, padding, [1, 1, 1], False, [0, 0, 0], 1)
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, *geometry, [needs_x, needs_weight, False]
        )
    return grad_x, grad_weight, grad.sum((0, 2, 3, 4), dtype=bias_dtype) if needs_bias else None


def _backward(ctx, grad):
    x, weight, y = ctx.saved_tensors
    if ctx.relu:
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
    *needs, needs_residual = ctx.needs_input_grad[:4]
    gradients = convolution_gradients(grad, x, weight, ctx.stride, ctx.padding, ctx.bias_dtype, needs)
    return *gradients, grad if needs_residual else None, None, None, None, None


torch.library.register_autograd("slowfast_ext::conv3d_bn_relu", _backward, setup_context=_setup_context, lib=lib)


for _overload in (_operator, _operator_out, _operator_tiled):
    register_autocast(_overload, cast=("x", "weight", "residual"))
