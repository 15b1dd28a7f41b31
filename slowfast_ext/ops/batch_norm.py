"""The passes over memory that batch norm, an addition and ReLU need in training: two forwards, two backwards.

Each statistic is that of a group of clips: with ``splits`` groups, clip n belongs to group n modulo ``splits``, as in
sub-batch normalisation (Wu et al., "A Multigrid Method for Efficiently Training Video Models"); with one group it is
ordinary batch norm. Ioffe and Szegedy, "Batch Normalization", arXiv 1502.03167. The operators have no gradients:
:func:`~slowfast_ext.ops.batch_norm_relu` puts them together.
"""

from functools import partial

import torch
from torch import Tensor

from .._library import lib
from .common import accumulator_dtype, check, check_out

_AFFINE = "Tensor mean, Tensor inverse_std, Tensor? weight, Tensor? bias"
_GRADIENT = f"Tensor grad, Tensor x, {_AFFINE}, Tensor? y, bool relu"
_TAGS = (torch.Tag.pt2_compliant_tag,)
lib.define("batch_norm_statistics(Tensor x, int splits, float eps) -> (Tensor, Tensor, Tensor)", tags=_TAGS)
lib.define(f"batch_norm_apply(Tensor x, {_AFFINE}, Tensor? residual, bool relu) -> Tensor", tags=_TAGS)
lib.define(f"batch_norm_apply.out(Tensor x, {_AFFINE}, Tensor? residual, bool relu, Tensor(a!) out) -> ()", tags=_TAGS)
lib.define(f"batch_norm_reduce_gradient({_GRADIENT}, bool residual) -> (Tensor, Tensor, Tensor)", tags=_TAGS)
lib.define(
    f"batch_norm_apply_gradient({_GRADIENT}, Tensor? sum_grad, Tensor? sum_grad_normalized, float count) -> Tensor",
    tags=_TAGS,
)


def batch_norm_statistics(x: Tensor, splits: int = 1, eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and ``1 / sqrt(variance + eps)`` of each channel, in one pass.

    Sums have the same order each time.

    Args:
        x (Tensor[N, C, T, H, W]): float32, float16, bfloat16, on a CPU also float64; fastest in channels_last_3d.
        splits: number of groups, a divisor of N.
        eps: at least 0.

    Returns:
        mean, variance, inverse_std (Tensor[splits, C]): float32 (float64 if ``x`` is); of no elements mean 0 and
        variance 0.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype or device, or ``eps`` is negative.
    """
    return torch.ops.slowfast_ext.batch_norm_statistics(x, splits, eps)


def batch_norm_apply(
    x: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    relu: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """``relu((x - mean) * inverse_std * weight + bias + residual)``, summed in float32 and rounded once.

    On a CPU it may be rounded before the residual is added, too.

    Args:
        x (Tensor[N, C, T, H, W]): as in :func:`batch_norm_statistics`.
        mean, inverse_std (Tensor[splits, C]): of the groups; float32 (float64 if ``x`` is).
        weight, bias (Tensor[C]): float32 (float64 if ``x`` is); 1 and 0 if None.
        residual (Tensor[N, C, T, H, W]): dtype of ``x``, added before the ReLU.
        relu: whether the ReLU is applied; NaN stays NaN.
        out (Tensor[N, C, T, H, W]): where to write, dtype of ``x``: channels_last_3d, or a slice of the channels of
            such a tensor. May be ``x`` itself, must not overlap it otherwise.

    Returns:
        Tensor[N, C, T, H, W]: ``out``, or a new tensor in channels_last_3d.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype or device.
    """
    if out is None:
        return torch.ops.slowfast_ext.batch_norm_apply(x, mean, inverse_std, weight, bias, residual, relu)
    torch.ops.slowfast_ext.batch_norm_apply.out(x, mean, inverse_std, weight, bias, residual, relu, out)
    return out


def batch_norm_reduce_gradient(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    y: Tensor | None = None,
    *,
    relu: bool = True,
    residual: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The sums of g and of g * (x - mean) * inverse_std over each group, g being ``grad`` where the ReLU let pass.

    And g itself, which is the residual's gradient: the next pass need not look at the ReLU again.

    Args:
        grad (Tensor[N, C, T, H, W]): of the result of :func:`batch_norm_apply`; dtype of ``x``.
        x, mean, inverse_std, weight, bias, relu: as given to it.
        y (Tensor[N, C, T, H, W]): its result. None: the sign is computed again from ``x``, which is right where there
            was no residual.
        residual: whether g is wanted.

    Returns:
        Two Tensor[splits, C] in float32 (float64 if ``x`` is); added up over the groups they are the gradients of bias
        and weight. And g (Tensor[N, C, T, H, W], dtype of ``x``, channels_last_3d) or None.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype or device.
    """
    sum_grad, sum_grad_normalized, grad_residual = torch.ops.slowfast_ext.batch_norm_reduce_gradient(
        grad, x, mean, inverse_std, weight, bias, y, relu, residual
    )
    return sum_grad, sum_grad_normalized, grad_residual if residual else None


def batch_norm_apply_gradient(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    y: Tensor | None = None,
    *,
    relu: bool = True,
    sum_grad: Tensor | None = None,
    sum_grad_normalized: Tensor | None = None,
    count: float = 0.0,
) -> Tensor:
    """The gradient of ``x``, in one pass.

    ``weight * inverse_std * (g - sum_grad / count - xhat * sum_grad_normalized / count)``, with xhat the normalised
    ``x`` and g as in :func:`batch_norm_reduce_gradient`, which takes the same first arguments. Where that has returned
    g, this may take it for ``grad``, without ``y`` and ``relu``.

    Args:
        sum_grad, sum_grad_normalized (Tensor[splits, C]): its results, added up over all processes whose batches
            count as one; both None where the statistics are constants.
        count: elements of a channel that each of the sums is of; must be positive, is ignored without sums.

    Returns:
        Tensor[N, C, T, H, W]: dtype of ``x``, channels_last_3d.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype or device.
    """
    return torch.ops.slowfast_ext.batch_norm_apply_gradient(
        grad, x, mean, inverse_std, weight, bias, y, relu, sum_grad, sum_grad_normalized, count
    )


def _check_map(operator: str, name: str, tensor: Tensor, x: Tensor) -> None:
    check(operator, tensor.device == x.device, name, f"on the device of x, {x.device}", tensor.device)
    check(operator, tensor.dtype == x.dtype, name, f"in the dtype of x, {x.dtype}", tensor.dtype)
    check(operator, tuple(tensor.shape) == tuple(x.shape), name, tuple(x.shape), tuple(tensor.shape))


def _check_splits(operator: str, x: Tensor, splits: int) -> None:
    check(operator, x.dim() == 5, "x", "(N, C, T, H, W)", tuple(x.shape))
    check(operator, x.is_floating_point(), "x", "floating point", x.dtype)
    check(operator, splits > 0 and x.shape[0] % splits == 0, "splits", f"a divisor of the {x.shape[0]} clips", splits)


def _check_statistics(operator: str, x: Tensor, splits: int, eps: float) -> None:
    _check_splits(operator, x, splits)
    check(operator, eps >= 0, "eps", "at least 0", eps)


def _check_affine(operator, x, mean, inverse_std, weight, bias, **maps) -> None:
    """What all but the statistics check; ``maps``: of the shape of x, or None."""
    _check = partial(check, operator)
    _check(mean.dim() == 2 and mean.shape[0] > 0, "mean", "(splits, C)", tuple(mean.shape))
    _check_splits(operator, x, mean.shape[0])
    vectors = {"mean": (mean, (mean.shape[0], x.shape[1])), "inverse_std": (inverse_std, tuple(mean.shape))}
    vectors |= {"weight": (weight, (x.shape[1],)), "bias": (bias, (x.shape[1],))}
    for name, (vector, shape) in vectors.items():
        if vector is not None:
            _check(tuple(vector.shape) == shape, name, shape, tuple(vector.shape))
            _check(vector.dtype == accumulator_dtype(x), name, accumulator_dtype(x), vector.dtype)
            _check(vector.device == x.device, name, f"on the device of x, {x.device}", vector.device)
    for name, tensor in maps.items():
        if tensor is not None:
            _check_map(operator, name, tensor, x)


def _check_sums(operator, x, mean, sum_grad, sum_grad_normalized, count) -> None:
    both = (sum_grad is None) == (sum_grad_normalized is None)
    check(operator, both, "sum_grad", "given exactly with sum_grad_normalized", "one of them")
    if sum_grad is None:
        return
    for name, vector in (("sum_grad", sum_grad), ("sum_grad_normalized", sum_grad_normalized)):
        check(operator, tuple(vector.shape) == tuple(mean.shape), name, tuple(mean.shape), tuple(vector.shape))
        check(operator, vector.dtype == mean.dtype, name, mean.dtype, vector.dtype)
        check(operator, vector.device == x.device, name, f"on the device of x, {x.device}", vector.device)
    check(operator, count > 0 or x.numel() == 0, "count", "positive with sum_grad", count)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last_3d)


def _groups(x: Tensor, splits: int) -> Tensor:
    """In the dtype of sums, as Tensor[N / splits, splits, C, T, H, W]."""
    return x.to(accumulator_dtype(x)).unflatten(0, (x.shape[0] // splits, splits))


def _of_groups(vector: Tensor) -> Tensor:
    return vector.view(*vector.shape, 1, 1, 1)


def batch_norm_statistics_reference(x: Tensor, splits: int, eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
    """The operator in plain PyTorch; runs where there is no kernel. Arguments as in the schema."""
    _check_statistics("batch_norm_statistics", x, splits, eps)
    if x.numel() == 0:
        mean, variance = (x.new_zeros((splits, x.shape[1]), dtype=accumulator_dtype(x)) for _ in range(2))
    else:
        variance, mean = torch.var_mean(_groups(x, splits), (0, 3, 4, 5), correction=0)
    return mean, variance, (variance + eps).rsqrt()


def _normalized(x: Tensor, mean: Tensor, inverse_std: Tensor) -> Tensor:
    return (_groups(x, mean.shape[0]) - _of_groups(mean)) * _of_groups(inverse_std)


def _affine(normalized: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Tensor[N / splits, splits, C, T, H, W] -> Tensor[N, C, T, H, W]."""
    y = normalized.flatten(0, 1)
    y = y if weight is None else y * weight.view(-1, 1, 1, 1)
    return y if bias is None else y + bias.view(-1, 1, 1, 1)


def batch_norm_apply_reference(x, mean, inverse_std, weight, bias, residual, relu) -> Tensor:
    """The operator in plain PyTorch; runs where there is no kernel. Arguments as in the schema."""
    _check_affine("batch_norm_apply", x, mean, inverse_std, weight, bias, residual=residual)
    y = _affine(_normalized(x, mean, inverse_std), weight, bias)
    y = y if residual is None else y + residual
    y = y.relu() if relu else y
    return _channels_last(y.to(x.dtype))


def _passed(grad, normalized, weight, bias, y, relu) -> Tensor:
    """``grad`` in the dtype of sums, zero where the ReLU did not let pass."""
    grad = grad.to(accumulator_dtype(grad))
    if not relu:
        return grad
    return torch.ops.aten.threshold_backward(grad, _affine(normalized, weight, bias) if y is None else y.to(grad), 0)


def batch_norm_reduce_gradient_reference(
    grad, x, mean, inverse_std, weight, bias, y, relu, residual
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator in plain PyTorch; runs where there is no kernel. Arguments as in the schema."""
    _check_affine("batch_norm_reduce_gradient", x, mean, inverse_std, weight, bias, grad=grad, y=y)
    normalized = _normalized(x, mean, inverse_std)
    passed = _passed(grad, normalized, weight, bias, y, relu)
    grad_residual = _channels_last(passed.to(x.dtype, copy=True)) if residual else x.new_empty(0)
    passed = _groups(passed, mean.shape[0])
    return passed.sum((0, 3, 4, 5)), (passed * normalized).sum((0, 3, 4, 5)), grad_residual


def batch_norm_apply_gradient_reference(
    grad, x, mean, inverse_std, weight, bias, y, relu, sum_grad, sum_grad_normalized, count
) -> Tensor:
    """The operator in plain PyTorch; runs where there is no kernel. Arguments as in the schema."""
    operator = "batch_norm_apply_gradient"
    _check_affine(operator, x, mean, inverse_std, weight, bias, grad=grad, y=y)
    _check_sums(operator, x, mean, sum_grad, sum_grad_normalized, count)
    normalized = _normalized(x, mean, inverse_std)
    grad_x = _groups(_passed(grad, normalized, weight, bias, y, relu), mean.shape[0])
    if sum_grad is not None and x.numel() > 0:
        grad_x = grad_x - _of_groups(sum_grad / count) - normalized * _of_groups(sum_grad_normalized / count)
    grad_x = _affine(grad_x * _of_groups(inverse_std), weight, None)
    return _channels_last(grad_x.to(x.dtype))


def _apply_cpu(x, mean, inverse_std, weight, bias, residual, relu) -> Tensor:
    """With torch's own batch norm, which is the fastest there, for one group."""
    _check_affine("batch_norm_apply", x, mean, inverse_std, weight, bias, residual=residual)
    if mean.shape[0] != 1 or x.numel() == 0:
        return batch_norm_apply_reference(x, mean, inverse_std, weight, bias, residual, relu)
    statistics = (mean[0], inverse_std[0].square().reciprocal_())
    y, *_ = torch.native_batch_norm(_channels_last(x), weight, bias, *statistics, False, 0.0, 0.0)
    y = y if residual is None else y.add_(residual)
    return y.relu_() if relu else y


def batch_norm_apply_into_reference(x, mean, inverse_std, weight, bias, residual, relu, out) -> None:
    """The operator in plain PyTorch; runs where there is no kernel. Arguments as in the schema."""
    check_out("batch_norm_apply", x, out, list(x.shape))
    out.copy_(batch_norm_apply_reference(x, mean, inverse_std, weight, bias, residual, relu))


for _name, _reference in (
    ("batch_norm_statistics", batch_norm_statistics_reference),
    ("batch_norm_apply", batch_norm_apply_reference),
    ("batch_norm_apply.out", batch_norm_apply_into_reference),
    ("batch_norm_reduce_gradient", batch_norm_reduce_gradient_reference),
    ("batch_norm_apply_gradient", batch_norm_apply_gradient_reference),
):
    lib.impl(_name, _reference, "CompositeExplicitAutograd")
lib.impl("batch_norm_apply", _apply_cpu, "CPU")


@torch.library.register_fake("slowfast_ext::batch_norm_statistics", lib=lib)
def _fake_statistics(x, splits, eps):
    _check_statistics("batch_norm_statistics", x, splits, eps)
    return tuple(x.new_empty((splits, x.shape[1]), dtype=accumulator_dtype(x)) for _ in range(3))


@torch.library.register_fake("slowfast_ext::batch_norm_apply", lib=lib)
def _fake_apply(x, mean, inverse_std, weight, bias, residual, relu):
    _check_affine("batch_norm_apply", x, mean, inverse_std, weight, bias, residual=residual)
    return torch.empty_like(x, memory_format=torch.channels_last_3d)


@torch.library.register_fake("slowfast_ext::batch_norm_apply.out", lib=lib)
def _fake_apply_into(x, mean, inverse_std, weight, bias, residual, relu, out):
    _check_affine("batch_norm_apply", x, mean, inverse_std, weight, bias, residual=residual)
    check_out("batch_norm_apply", x, out, list(x.shape))


@torch.library.register_fake("slowfast_ext::batch_norm_reduce_gradient", lib=lib)
def _fake_reduce_gradient(grad, x, mean, inverse_std, weight, bias, y, relu, residual):
    _check_affine("batch_norm_reduce_gradient", x, mean, inverse_std, weight, bias, grad=grad, y=y)
    grad_residual = torch.empty_like(x, memory_format=torch.channels_last_3d) if residual else x.new_empty(0)
    return torch.empty_like(mean), torch.empty_like(mean), grad_residual


@torch.library.register_fake("slowfast_ext::batch_norm_apply_gradient", lib=lib)
def _fake_apply_gradient(grad, x, mean, inverse_std, weight, bias, y, relu, sum_grad, sum_grad_normalized, count):
    operator = "batch_norm_apply_gradient"
    _check_affine(operator, x, mean, inverse_std, weight, bias, grad=grad, y=y)
    _check_sums(operator, x, mean, sum_grad, sum_grad_normalized, count)
    return torch.empty_like(x, memory_format=torch.channels_last_3d)
