"""The classification head in one operator: averages of both pathways, linear layer, softmax over windows and views."""

import math
from functools import partial

import torch
from torch import Tensor

from .._library import lib
from .common import accumulator_dtype, check, register_autocast

lib.define(
    "pool_head(Tensor slow, Tensor fast, Tensor weight, Tensor? bias, int[] window, bool softmax_positions, int views)"
    " -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_operator = torch.ops.slowfast_ext.pool_head.default


def pool_head(
    slow: Tensor,
    fast: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    window: tuple[int, int] | None = None,
    softmax_positions: bool = False,
    views: int = 0,
) -> Tensor:
    """Average the features, classify ``[fast, slow]`` (mmaction2's order), and perhaps average probabilities.

    In float32, whatever the dtype of the features. Without a window the average spans the whole map. With one it is
    taken in every window that slides with stride 1 over rows and columns, and over all frames; the windows' logits are
    averaged, or with ``softmax_positions`` their probabilities, as PySlowFast does.

    Args:
        slow (Tensor[N, Cs, Ts, H, W]): float32, float16, bfloat16, on a CPU also float64; fastest in channels_last_3d,
            or as some channels of such a tensor, with a Cs that fills 16 bytes.
        fast (Tensor[N, Cf, Tf, H, W]): dtype of ``slow``, fastest as that is. With a window H and W are those of
            ``slow``, without one they are free.
        weight (Tensor[K, Cf + Cs]): of any floating-point dtype, not necessarily that of the features.
        bias (Tensor[K]): float32 (float64 if the features are).
        window: height and width in positions, at most H and W.
        softmax_positions: whether probabilities are averaged over the windows instead of logits.
        views: 0 for the logits; they are the logarithm of the averaged probabilities where ``softmax_positions`` is
            set, so that their softmax is that average. Else each run of ``views`` clips is one video, and the result
            its class probabilities averaged over them.

    Returns:
        Tensor[N, K], or Tensor[N / views, K]: float32 (float64 if the features are).

    Raises:
        RuntimeError: an argument has a wrong shape, dtype or device.

    Gradients for slow, fast, weight and bias, differentiable again. Autocast leaves features and weight as they are.
    """
    return _operator(slow, fast, weight, bias, () if window is None else window, softmax_positions, views)


_check = partial(check, "pool_head")


def _output_shape(slow, fast, weight, bias, window, views) -> list[int]:
    """The shape of the result; checks what the CUDA kernels check too, with the same words."""
    _check(
        len(window) == 0 or (len(window) == 2 and min(window) > 0),
        "window",
        "two positive integers or empty",
        tuple(window),
    )
    for name, features in (("slow", slow), ("fast", fast)):
        shape = tuple(features.shape)
        _check(features.dim() == 5, name, "(N, C, T, H, W)", shape)
        _check(all(size > 0 for size in shape[1:]), name, "at least one channel, frame, row and column", shape)
        large = len(window) == 0 or (shape[3] >= window[0] and shape[4] >= window[1])
        _check(large, name, f"at least as large as the window {tuple(window)}", shape)
    plane = slow.shape[3:] if len(window) else fast.shape[3:]
    like_slow = (slow.shape[0], *fast.shape[1:3], *plane)
    _check(tuple(fast.shape) == like_slow, "fast", like_slow, tuple(fast.shape))
    features = slow.shape[1] + fast.shape[1]
    _check(
        weight.dim() == 2 and weight.shape[0] > 0 and weight.shape[1] == features,
        "weight",
        f"(classes, {features})",
        tuple(weight.shape),
    )
    divides = views >= 0 and (views == 0 or slow.shape[0] % views == 0)
    _check(divides, "views", f"0 or a divisor of the batch size {slow.shape[0]}", views)
    _check(slow.is_floating_point(), "slow", "floating point", slow.dtype)
    _check(fast.dtype == slow.dtype, "fast", f"in the dtype of slow, {slow.dtype}", fast.dtype)
    _check(weight.is_floating_point(), "weight", "floating point", weight.dtype)
    if bias is not None:
        _check(bias.dtype == accumulator_dtype(slow), "bias", accumulator_dtype(slow), bias.dtype)
        _check(tuple(bias.shape) == (weight.shape[0],), "bias", f"({weight.shape[0]},)", tuple(bias.shape))
    for name, tensor in (("fast", fast), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            _check(tensor.device == slow.device, name, f"on the device of slow, {slow.device}", tensor.device)
    return [slow.shape[0] // views if views else slow.shape[0], weight.shape[0]]


def _windows(features: Tensor, window, softmax_positions: bool) -> Tensor:
    """Tensor[P, H * W]: each pixel's weight in the averages, of each window, or of all of them if they are averaged."""
    dtype, device = accumulator_dtype(features), features.device
    axes = []
    for size, extent in zip(features.shape[3:], window or features.shape[3:], strict=True):
        start, pixel = torch.arange(size - extent + 1, device=device)[:, None], torch.arange(size, device=device)
        axes.append(((pixel >= start) & (pixel < start + extent)).to(dtype) / extent)
    rows, columns = axes
    windows = (rows[:, None, :, None] * columns[None, :, None, :]).flatten(2).flatten(0, 1)
    return windows if softmax_positions else windows.mean(0, keepdim=True)


def _average(features: Tensor, windows: Tensor) -> Tensor:
    """Tensor[N, C, T, H, W] -> Tensor[N, P, C]."""
    # In channels_last_3d a view, whose sum torch vectorises over pixels and channels.
    planes = features.permute(0, 2, 3, 4, 1).flatten(2, 3).sum(1, dtype=windows.dtype)
    return windows @ planes / features.shape[2]


def _summarise(logits: Tensor, softmax_positions: bool, views: int) -> Tensor:
    """Logits of each position, Tensor[N, P, K], to the result."""
    if views:
        return logits.softmax(2).reshape(-1, views * logits.shape[1], logits.shape[2]).mean(1)
    if softmax_positions:
        return logits.log_softmax(2).logsumexp(1) - math.log(logits.shape[1])
    return logits[:, 0]


def pool_head_reference(slow, fast, weight, bias, window, softmax_positions, views) -> Tensor:
    """The operator in plain PyTorch; runs where there is no kernel. Arguments as in the schema."""
    shape = _output_shape(slow, fast, weight, bias, window, views)
    pooled = [_average(features, _windows(features, window, softmax_positions)) for features in (fast, slow)]
    logits = torch.cat(pooled, 2) @ weight.to(accumulator_dtype(slow)).T
    logits = logits if bias is None else logits + bias
    return _summarise(logits, softmax_positions, views).reshape(shape).clone()


lib.impl("pool_head", pool_head_reference, "CompositeExplicitAutograd")


@torch.library.register_fake("slowfast_ext::pool_head", lib=lib)
def _fake(slow, fast, weight, bias, window, softmax_positions, views):
    return slow.new_empty(_output_shape(slow, fast, weight, bias, window, views), dtype=accumulator_dtype(slow))


def _setup_context(ctx, inputs, output):
    slow, fast, weight, bias, ctx.window, ctx.softmax_positions, ctx.views = inputs
    ctx.save_for_backward(slow, fast, weight, bias)


def _backward(ctx, grad):
    slow, fast, weight, bias = ctx.saved_tensors
    needs_slow, needs_fast, needs_weight, needs_bias = ctx.needs_input_grad[:4]
    with torch.autocast(grad.device.type, enabled=False):
        windows = [_windows(features, ctx.window, ctx.softmax_positions) for features in (fast, slow)]
        wide_weight = weight.to(grad.dtype)
        probabilities = pooled = None
        if needs_weight or ctx.softmax_positions or ctx.views:
            pooled = torch.cat([_average(fast, windows[0]), _average(slow, windows[1])], 2)
        if ctx.softmax_positions or ctx.views:
            logits = pooled @ wide_weight.T
            log_probabilities = (logits if bias is None else logits + bias).log_softmax(2)
            probabilities = log_probabilities.exp()
        # The gradient of the logits of each position, Tensor[N, P, K].
        if ctx.views:
            grad = grad.repeat_interleave(ctx.views, 0)[:, None] / (ctx.views * windows[0].shape[0]) * probabilities
        elif ctx.softmax_positions:
            grad = grad[:, None] * log_probabilities.softmax(1)
        else:
            grad = grad[:, None]
        if probabilities is not None:
            grad = grad - probabilities * grad.sum(2, keepdim=True)
        grad_fast, grad_slow = (grad @ wide_weight).split([fast.shape[1], slow.shape[1]], 2)

        def spread(grad, windows, features):
            """Tensor[N, P, C] -> Tensor[N, C, T, H, W]."""
            plane = (grad.mT @ windows / features.shape[2]).unflatten(2, features.shape[3:])
            return plane.to(features.dtype).unsqueeze(2).expand(features.shape)

        return (
            spread(grad_slow, windows[1], slow) if needs_slow else None,
            spread(grad_fast, windows[0], fast) if needs_fast else None,
            torch.einsum("npk,npc->kc", grad, pooled).to(weight.dtype) if needs_weight else None,
            grad.sum((0, 1)) if needs_bias else None,
            None,
            None,
            None,
        )


torch.library.register_autograd("slowfast_ext::pool_head", _backward, setup_context=_setup_context, lib=lib)
register_autocast(_operator, cast=(), keep=("slow", "fast", "weight"))
