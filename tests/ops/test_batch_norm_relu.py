"""Batch norm with addition and ReLU against plain PyTorch, forwards and backwards."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from fused_cases import LAYOUTS
from tolerances import tolerance
from torch import nn
from torch.testing import assert_close

from slowfast_ext import ops

SHAPES = [(4, 6, 3, 5, 7), (2, 8, 1, 4, 4), (2, 3, 2, 1, 1), (6, 1, 2, 3, 5)]
EXACT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(params=["torch's", "operators"])
def path(request, monkeypatch):
    """Torch's own batch norm, which serves CPUs, or the operators that GPUs have kernels for."""
    if request.param == "operators":
        module = importlib.import_module("slowfast_ext.ops.batch_norm_relu")  # the package has the function there
        monkeypatch.setattr(module, "_torch_serves", lambda x, splits: False)


def _tensor(shape, layout="contiguous", dtype=torch.float64):
    if layout == "slice":
        return torch.randn([size + 3 for size in shape], dtype=dtype)[tuple(slice(2, size + 2) for size in shape)]
    tensor = torch.randn(shape, dtype=dtype)
    return tensor.to(memory_format=torch.channels_last_3d) if layout == "channels_last_3d" else tensor


def _arguments(shape, residual, layout="contiguous", dtype=torch.float64):
    """x, weight, bias and residual, twice, all with gradients."""
    made = [_tensor(shape, layout, dtype), torch.rand(shape[1], dtype=torch.float64) + 0.5, torch.randn(shape[1])]
    made.append(_tensor(shape, layout, dtype) if residual else None)
    made[1:3] = [vector.to(torch.promote_types(dtype, torch.float32)) for vector in made[1:3]]
    return [[None if one is None else one.detach().clone().requires_grad_() for one in made] for _ in range(2)]


def _plain(x, weight, bias, residual, running, relu, training=True, splits=1, momentum=0.1, eps=1e-5):
    """By the definition, sub-batches by the reshaping of PySlowFast."""
    grouped = x.reshape(x.shape[0] // splits, x.shape[1] * splits, *x.shape[2:])
    affine = (None if vector is None else vector.repeat(splits) for vector in (weight, bias))
    y = F.batch_norm(grouped, *running, *affine, training, momentum, eps).view(x.shape)
    y = y if residual is None else y + residual
    return y.relu() if relu else y


def _check(ours, plain, grad, result, expected, tolerances):
    assert_close(result, expected, **tolerances)
    result.backward(grad)
    expected.backward(grad)
    for mine, theirs in zip(ours, plain, strict=True):
        if mine is not None:
            scale = max(theirs.grad.abs().max().item(), 1.0)
            assert_close(mine.grad, theirs.grad, rtol=tolerances["rtol"], atol=tolerances["atol"] * scale)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_result_gradients_and_running_statistics_are_those_of_the_definition(shape, relu, residual, splits, path):
    ours, plain = _arguments(shape, residual)
    statistics = [[torch.randn(shape[1] * splits).double(), torch.rand(shape[1] * splits).double()] for _ in "12"]
    for mine, theirs in zip(*statistics, strict=True):
        theirs.copy_(mine)
    expected = _plain(*plain, statistics[1], relu, splits=splits, momentum=0.3, eps=0.5)
    options = {"running_mean": statistics[0][0], "running_var": statistics[0][1], "momentum": 0.3, "eps": 0.5}
    result = ops.batch_norm_relu(*ours, relu=relu, splits=splits, **options)
    _check(ours, plain, torch.randn(shape).double(), result, expected, EXACT)
    for mine, theirs in zip(*statistics, strict=True):
        assert_close(mine, theirs, **EXACT)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_will_do_and_the_result_is_in_channels_last_3d(layout, path):
    ours, plain = _arguments(SHAPES[0], True, layout)
    result = ops.batch_norm_relu(*ours)
    assert result.is_contiguous(memory_format=torch.channels_last_3d)
    grad = _tensor(SHAPES[0], layout)
    _check(ours, plain, grad, result, _plain(*plain, (None, None), True), EXACT)


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_given_statistics_are_constants(residual):
    ours, plain = _arguments(SHAPES[0], residual)
    running = torch.randn(6).double(), torch.rand(6).double() + 0.5
    before = [statistic.clone() for statistic in running]
    options = {"running_mean": running[0], "running_var": running[1], "batch_statistics": False}
    result = ops.batch_norm_relu(*ours, **options)
    expected = _plain(*plain, running, True, training=False)
    _check(ours, plain, torch.randn(SHAPES[0]).double(), result, expected, EXACT)
    assert all(torch.equal(*pair) for pair in zip(before, running, strict=True))


def test_weight_and_bias_may_be_missing(path):
    ours, plain = _arguments(SHAPES[0], False)
    ours, plain = [ours[0], None, None, None], [plain[0], None, None, None]
    grad = torch.randn(SHAPES[0]).double()
    _check(ours, plain, grad, ops.batch_norm_relu(*ours), _plain(*plain, (None, None), True), EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums_are_in_float32_in_every_dtype(dtype, path):
    shape = (4, 8, 4, 8, 8)
    ours, plain = _arguments(shape, True, "channels_last_3d", dtype)
    plain = [one.detach().double().requires_grad_() for one in plain]
    result = ops.batch_norm_relu(*ours)
    assert result.dtype == dtype
    expected = _plain(*plain, (None, None), True)
    assert_close(result.double(), expected, **tolerance(dtype, shape[0] * 4 * 64, roundings=3, scale=2.0))
    # Where a rounded sum and the exact one differ in sign, the ReLU lets the gradient pass in one of them only.
    grad = torch.randn(shape).to(dtype) * (expected.abs() > 0.05)
    result.backward(grad)
    expected.backward(grad.double())
    for mine, theirs, terms in zip(ours, plain, (8, 1024, 1024, 1), strict=True):
        scale = theirs.grad.std().item()
        assert_close(mine.grad.double(), theirs.grad, **tolerance(dtype, terms, roundings=3, scale=scale))


def test_it_keeps_its_input_only_where_there_is_no_residual():
    kept = []
    ours, _ = _arguments((2, 64, 4, 8, 8), True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda _: None):
        ops.batch_norm_relu(*ours[:3])
        alone, kept[:] = sum(kept), []
        ops.batch_norm_relu(*ours)
    pixels = 2 * 4 * 8 * 8
    assert alone < 64 * (pixels + 5)
    assert 2 * 64 * pixels < sum(kept) < 64 * (2 * pixels + 5)


def test_gradients_that_are_not_wanted_are_none():
    (x, weight, bias, residual), _ = _arguments(SHAPES[0], True)
    for frozen in (x, weight, bias, residual):
        for one in (x, weight, bias, residual):
            one.requires_grad_(one is not frozen).grad = None
        ops.batch_norm_relu(x, weight, bias, residual).sum().backward()
        assert [one.grad is None for one in (x, weight, bias, residual)] == [
            one is frozen for one in (x, weight, bias, residual)
        ]


def test_an_empty_batch_is_empty_and_leaves_the_running_statistics(path):
    bn = nn.BatchNorm3d(3)
    x = torch.randn(0, 3, 2, 4, 4, requires_grad=True)
    y = ops.batch_norm_relu(x, bn.weight, bn.bias, running_mean=bn.running_mean, running_var=bn.running_var)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape
    assert bn.weight.grad.tolist() == [0, 0, 0]
    assert (bn.running_mean.tolist(), bn.running_var.tolist()) == ([0, 0, 0], [1, 1, 1])


def test_nan_stays_nan_in_its_channel(path):
    x = torch.randn(2, 3, 2, 4, 4)
    x[0, 1, 0, 0, 0] = float("nan")
    y = ops.batch_norm_relu(x)
    assert y[:, 1].isnan().all()
    assert not y[:, [0, 2]].isnan().any()


def test_it_compiles_in_one_graph():
    ours, plain = _arguments(SHAPES[0], True)
    compiled = torch.compile(ops.batch_norm_relu, fullgraph=True, backend="aot_eager")
    _check(ours, plain, torch.randn(SHAPES[0]).double(), compiled(*ours), _plain(*plain, (None, None), True), EXACT)


def test_a_second_derivative_is_refused():
    (x, *_), _ = _arguments(SHAPES[0], False)
    (grad,) = torch.autograd.grad(ops.batch_norm_relu(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (torch.randn(2, 3), {}, RuntimeError, r"batch_norm_relu: x must be \(N, C, T, H, W\), got \(2, 3\)"),
        (torch.randn(1, 3, 1, 1, 1), {}, ValueError, "x must be more than one element a channel in training, got"),
        (torch.randn(2, 3, 1, 1, 1), {"splits": 2}, ValueError, "more than one element a channel .* in 2 groups"),
        (torch.randn(3, 3, 2, 1, 1), {"splits": 2}, RuntimeError, "splits must be a divisor of the 3 clips, got 2"),
        (torch.randn(2, 3, 2, 1, 1), {"batch_statistics": False}, ValueError, "running_mean and running_var must be"),
        (torch.randn(2, 3, 2, 1, 1), {"weight": torch.ones(2)}, RuntimeError, r"weight must be \(3,\), got \(2,\)"),
        (torch.randn(2, 3, 2, 1, 1), {"residual": torch.ones(2, 3, 1, 1, 1)}, RuntimeError, "residual must be"),
        (torch.randn(2, 3, 2, 1, 1), {"running_var": torch.ones(3)}, RuntimeError, "exactly with running_mean"),
    ],
)
def test_bad_arguments_are_named(x, options, error, message):
    with pytest.raises(error, match=message):
        ops.batch_norm_relu(x, **options)
