"""The passes of batch norm against autograd of plain batch norm, addition and ReLU in float64."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from tolerances import tolerance, variance_tolerance
from torch.testing import assert_close

from slowfast_ext import ops

OPERATORS = torch.ops.slowfast_ext
EPSILON = 1e-3


@dataclass(frozen=True)
class Case:
    x: tuple
    splits: int = 1
    affine: bool = True
    residual: bool = False
    keeps_y: bool = False  # the gradients are given the result, whose sign they need
    relu: bool = True
    frozen: bool = False
    mean: float = 0.5  # of values of deviation 1

    @property
    def terms(self):
        """Of a group's statistics."""
        return self.x[0] // self.splits * math.prod(self.x[2:])


CASES = {
    "slow_res2": Case((2, 64, 2, 9, 7)),
    "slow_res2_block": Case((1, 128, 3, 9, 7), residual=True, keeps_y=True),
    "slow_res5": Case((2, 512, 1, 5, 7), residual=True, keeps_y=True),
    "fast_stem": Case((2, 8, 5, 19, 18)),
    "shortcut": Case((2, 32, 2, 9, 7), relu=False),
    "two_splits": Case((4, 32, 2, 7, 5), 2),
    "three_splits": Case((6, 24, 1, 7, 5), 3, residual=True, keeps_y=True),
    "a_split_a_clip": Case((3, 16, 2, 7, 5), 3),
    "no_affine": Case((2, 16, 2, 7, 5), affine=False),
    "odd_channels": Case((2, 13, 3, 5, 7), residual=True, keeps_y=True),
    "three_channels": Case((2, 3, 3, 9, 7)),
    "one_channel": Case((2, 1, 3, 9, 7)),
    "one_pixel_a_frame": Case((4, 8, 3, 1, 1)),
    "frozen": Case((2, 16, 2, 5, 7), frozen=True),
    "frozen_block": Case((2, 16, 2, 5, 7), residual=True, keeps_y=True, frozen=True),
    "far_from_zero": Case((2, 16, 2, 9, 7), mean=1000.0),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)


def skip_float64_on_a_gpu(dtype, device):
    if dtype == torch.float64 and device.type == "cuda":
        pytest.skip("there are no float64 kernels")


@dataclass
class Inputs:
    x: torch.Tensor
    grad: torch.Tensor
    residual: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    mean: torch.Tensor  # of running statistics
    variance: torch.Tensor


def make_inputs(case, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def random_map(mean=0.0):
        values = mean + torch.randn(case.x, generator=generator, dtype=torch.float64)
        return values.to(device, dtype, memory_format=torch.channels_last_3d)

    def vector(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, wide)

    channels = case.x[1]
    return Inputs(
        random_map(case.mean),
        random_map(),
        random_map() if case.residual else None,
        vector(channels) if case.affine else None,
        vector(channels) if case.affine else None,
        case.mean + vector(case.splits, channels) / 4,
        (1 + vector(case.splits, channels) / 8).square(),
    )


@dataclass
class Outputs:
    y: torch.Tensor
    grad_x: torch.Tensor
    grad_residual: torch.Tensor | None
    grad_weight: torch.Tensor | None
    grad_bias: torch.Tensor | None


def fused(inputs, case):
    """As a module would call the passes. With out, because a CPU rounds twice without."""
    mean, inverse_std = inputs.mean, (inputs.variance + EPSILON).rsqrt()
    if not case.frozen:
        mean, _, inverse_std = ops.batch_norm_statistics(inputs.x, case.splits, EPSILON)
    affine = (mean, inverse_std, inputs.weight, inputs.bias)
    y = torch.empty_like(inputs.x)
    ops.batch_norm_apply(inputs.x, *affine, inputs.residual, relu=case.relu, out=y)
    gradient = (inputs.grad, inputs.x, *affine, y if case.keeps_y else None)
    grad_bias, grad_weight, grad_residual = ops.batch_norm_reduce_gradient(
        *gradient, relu=case.relu, residual=case.residual
    )
    sums = {}
    if not case.frozen:
        sums = {"sum_grad": grad_bias, "sum_grad_normalized": grad_weight, "count": case.terms}
    grad_x = ops.batch_norm_apply_gradient(*gradient, relu=case.relu, **sums)
    if case.residual:  # either way gives the same
        passed = (grad_residual, inputs.x, *affine)
        assert torch.equal(ops.batch_norm_apply_gradient(*passed, relu=False, **sums), grad_x)
    vectors = (grad_weight.sum(0), grad_bias.sum(0)) if case.affine else (None, None)
    return Outputs(y, grad_x, grad_residual, *vectors)


def plain(inputs, case):
    """Autograd of F.batch_norm in float64; groups of clips become channels, as in PySlowFast's sub-batch norm."""
    n, channels, *size = case.x
    leaves = [
        None if tensor is None else tensor.double().contiguous().requires_grad_()
        for tensor in (inputs.x, inputs.residual, inputs.weight, inputs.bias)
    ]
    x, residual, weight, bias = leaves
    y = F.batch_norm(
        x.reshape(n // case.splits, case.splits * channels, *size),
        inputs.mean.double().flatten(),
        inputs.variance.double().flatten(),
        training=not case.frozen,
        eps=EPSILON,
    ).reshape(case.x)
    if case.affine:
        y = y * weight.view(-1, 1, 1, 1) + bias.view(-1, 1, 1, 1)
    y = y if residual is None else y + residual
    y = y.relu() if case.relu else y
    given = [leaf for leaf in leaves if leaf is not None]
    gradients = iter(torch.autograd.grad(y, given, inputs.grad.double()))
    return Outputs(y.detach(), *(None if leaf is None else next(gradients) for leaf in leaves))


def assert_like(actual, expected, dtype, terms):
    """Of a map or a sum of ``terms`` of what is given exactly."""
    if actual is None:
        assert expected is None
        return
    scale = expected.square().mean().sqrt().item()
    assert_close(actual.double(), expected, **tolerance(dtype, terms, scale=scale))


@dtypes
@cases
def test_passes_equal_autograd_of_plain_batch_norm_in_float64(case, dtype, device):
    skip_float64_on_a_gpu(dtype, device)
    inputs = make_inputs(case, device, dtype)
    actual, expected = fused(inputs, case), plain(inputs, case)
    assert actual.grad_x.is_contiguous(memory_format=torch.channels_last_3d)
    # The mean enters all results: it is off by roundoffs of itself.
    conditioning = max(1, round(case.mean**2))
    for name in ("y", "grad_x", "grad_residual"):
        part = getattr(actual, name)
        assert part is None or part.dtype == dtype
        assert_like(part, getattr(expected, name), dtype, conditioning * case.terms)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    for name in ("grad_weight", "grad_bias"):
        assert_like(getattr(actual, name), getattr(expected, name), sums, conditioning * case.terms)


@dtypes
@cases
def test_a_new_result_is_that_written_into_out(case, dtype, device):
    skip_float64_on_a_gpu(dtype, device)
    inputs = make_inputs(case, device, dtype)
    arguments = (inputs.x, inputs.mean, inputs.variance, inputs.weight, inputs.bias, inputs.residual)
    y = ops.batch_norm_apply(*arguments, relu=case.relu)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    out = ops.batch_norm_apply(*arguments, relu=case.relu, out=torch.empty_like(inputs.x))
    if device.type == "cuda":
        assert torch.equal(y, out)
    scale = (1 + case.mean) * out.double().square().mean().sqrt().item()
    assert_close(y, out, **tolerance(dtype, 4, roundings=2, scale=scale))


@dtypes
@pytest.mark.parametrize("mean", [0.0, 30.0, 1000.0])
@pytest.mark.parametrize("splits", [1, 2, 4])
def test_statistics_are_right_far_from_zero(splits, mean, dtype, device):
    skip_float64_on_a_gpu(dtype, device)
    case = Case((4, 24, 3, 13, 11), splits, mean=mean)
    x = make_inputs(case, device, dtype).x
    actual_mean, actual_variance, inverse_std = ops.batch_norm_statistics(x, splits, EPSILON)
    rows = x.double().unflatten(0, (4 // splits, splits))
    variance, expected_mean = torch.var_mean(rows, (0, 3, 4, 5), correction=0)
    assert actual_mean.shape == actual_variance.shape == inverse_std.shape == (splits, 24)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    assert actual_mean.dtype == actual_variance.dtype == inverse_std.dtype == sums
    assert_close(actual_mean.double(), expected_mean, **tolerance(sums, case.terms, scale=1 + mean))
    assert_close(actual_variance.double(), variance, **variance_tolerance(dtype, case.terms, mean))
    expected_inverse = (actual_variance.double() + EPSILON).rsqrt()
    assert_close(inverse_std.double(), expected_inverse, **tolerance(sums, 1, scale=expected_inverse.max().item()))


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["fast_stem", "slow_res5", "three_splits", "odd_channels"])
def test_sums_are_the_same_bits_each_time(name):
    case = CASES[name]
    inputs = make_inputs(case, "cuda", torch.bfloat16)
    first = fused(inputs, case)
    for _ in range(3):
        again = fused(inputs, case)
        assert torch.equal(again.grad_weight, first.grad_weight)
        assert torch.equal(again.grad_x, first.grad_x)


def lay_out(tensor, layout):
    if layout == "contiguous":
        return tensor.contiguous()
    first = {"slice_of_channels": 8, "slice_that_is_not_aligned": 3}.get(layout, 0)
    n, channels, frames, *size = tensor.shape
    shape = (n, channels + 2 * first, frames * (1 if first else 2), *size)
    wide = torch.full(shape, torch.nan, device=tensor.device, dtype=tensor.dtype)
    wide = wide.to(memory_format=torch.channels_last_3d)
    view = wide[:, first : first + channels] if first else wide[:, :, ::2]
    return view.copy_(tensor)


def make_arguments(device):
    inputs = make_inputs(CASES["three_splits"], device, torch.bfloat16)
    vectors = {"mean": inputs.mean, "inverse_std": inputs.variance, "weight": inputs.weight, "bias": inputs.bias}
    y = ops.batch_norm_apply(inputs.x, **vectors, residual=inputs.residual)
    maps = {"x": inputs.x, "grad": inputs.grad, "residual": inputs.residual, "y": y}
    return maps, vectors


def assert_same_results(maps, vectors, other_maps, other_vectors):
    """Of all passes, but for the order of sums, which is PyTorch's on a CPU."""
    case = CASES["three_splits"]

    def run(maps, vectors):
        gradient = {name: maps[name] for name in ("grad", "x", "y")} | vectors
        sums = {"sum_grad": vectors["mean"] / 2, "sum_grad_normalized": vectors["mean"], "count": 4}
        return [
            *ops.batch_norm_statistics(maps["x"], case.splits),
            ops.batch_norm_apply(maps["x"], **vectors, residual=maps["residual"]),
            *ops.batch_norm_reduce_gradient(**gradient, residual=True),
            ops.batch_norm_apply_gradient(**gradient, **sums),
        ]

    for found, expected in zip(run(maps, vectors), run(other_maps, other_vectors), strict=True):
        if expected.dim() == 5:
            assert torch.equal(found, expected)
        else:
            scale = 1 + expected.square().mean().sqrt().item()
            assert_close(found, expected, **tolerance(torch.float32, case.terms, scale=scale))


@pytest.mark.parametrize(
    "layout", ["contiguous", "slice_of_channels", "slice_that_is_not_aligned", "every_second_frame"]
)
@pytest.mark.parametrize("which", ["x", "grad", "residual", "y"])
def test_any_layout_of_each_map(which, layout, device):
    maps, vectors = make_arguments(device)
    changed = maps | {which: lay_out(maps[which], layout)}
    assert_same_results(changed, vectors, maps, vectors)


def test_vectors_may_lie_anywhere(device):
    maps, vectors = make_arguments(device)
    # 4 bytes from an aligned address.
    moved = {name: torch.cat([v.flatten()[:1], v.flatten()])[1:].view_as(v) for name, v in vectors.items()}
    assert_same_results(maps, moved, maps, vectors)
    transposed = {name: v.t().contiguous().t() if v.dim() == 2 else v for name, v in vectors.items()}
    assert_same_results(maps, transposed, maps, vectors)


@pytest.mark.parametrize("channels", [16, 13])
def test_out_may_be_a_slice_or_an_argument_itself(channels, device):
    case = Case((2, channels, 2, 5, 7), 2, residual=True)
    inputs = make_inputs(case, device, torch.bfloat16)
    affine = (inputs.mean, inputs.variance, inputs.weight, inputs.bias)
    expected = ops.batch_norm_apply(inputs.x, *affine, inputs.residual)
    wide = torch.zeros(2, channels + 16, 2, 5, 7, device=device, dtype=torch.bfloat16)
    wide = wide.to(memory_format=torch.channels_last_3d)
    out = wide[:, 8:-8]
    assert ops.batch_norm_apply(inputs.x, *affine, inputs.residual, out=out) is out
    assert torch.equal(out, expected)
    assert wide[:, :8].count_nonzero() == wide[:, -8:].count_nonzero() == 0
    for which in ("x", "residual"):
        maps = {"x": inputs.x, "residual": inputs.residual}
        maps[which] = out.copy_(maps[which])
        ops.batch_norm_apply(maps["x"], *affine, maps["residual"], out=out)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("shape", [(0, 8, 2, 3, 3), (2, 8, 0, 3, 3), (2, 0, 2, 3, 3)], ids=str)
def test_nothing_has_zero_mean_variance_and_sums(shape, device):
    case = Case(shape, 2, residual=True)
    inputs = make_inputs(case, device)
    zeros = torch.zeros(2, shape[1], device=device)
    assert_close(ops.batch_norm_statistics(inputs.x, 2, 0.25), (zeros, zeros, zeros + 2))
    affine = (inputs.mean, inputs.variance, inputs.weight, inputs.bias)
    assert ops.batch_norm_apply(inputs.x, *affine, inputs.residual).shape == shape
    gradient = (inputs.grad, inputs.x, *affine)
    *totals, grad_residual = ops.batch_norm_reduce_gradient(*gradient, residual=True)
    assert_close(totals, [zeros, zeros])
    assert grad_residual.shape == shape
    sums = {"sum_grad": zeros, "sum_grad_normalized": zeros, "count": 0}
    for given in ({}, sums):
        assert ops.batch_norm_apply_gradient(*gradient, **given).shape == shape


@pytest.mark.parametrize("keeps_y", [False, True])
def test_nan_goes_where_it_goes_in_pytorch(keeps_y, device):
    case = Case((2, 8, 2, 3, 5), residual=True)
    inputs = make_inputs(case, device)
    inputs.x[1, 2, 0, 1, 1] = inputs.residual[0, 4, 1, 2, 2] = torch.nan
    assert [each.isnan().nonzero().tolist() for each in ops.batch_norm_statistics(inputs.x)] == [[[0, 2]]] * 3
    affine = (inputs.mean, inputs.variance, inputs.weight, inputs.bias)
    y = ops.batch_norm_apply(inputs.x, *affine, inputs.residual)
    assert y.isnan().nonzero().tolist() == [[0, 4, 1, 2, 2], [1, 2, 0, 1, 1]]
    gradient = (torch.ones_like(inputs.x), inputs.x, *affine, y if keeps_y else None)
    assert not ops.batch_norm_apply_gradient(*gradient).isnan().any()  # of constants
    grad_bias, grad_weight, grad_residual = ops.batch_norm_reduce_gradient(*gradient, residual=True)
    assert grad_residual[1, 2, 0, 1, 1] == 1  # the gradient passes where not y <= 0
    assert not grad_bias.isnan().any()
    assert grad_weight.isnan().nonzero().tolist() == [[0, 2]]


def test_the_sign_is_computed_again_as_it_was(device):
    case = CASES["two_splits"]
    inputs = make_inputs(case, device)
    inputs.bias.zero_()
    inputs.x[2, :, :, 1:3] = inputs.mean[0].view(-1, 1, 1, 1)  # where the result is zero
    affine = (inputs.mean, inputs.variance, inputs.weight, inputs.bias)
    y = ops.batch_norm_apply(inputs.x, *affine)
    assert (y[2, :, :, 1:3] == 0).all()
    *_, again = ops.batch_norm_reduce_gradient(inputs.grad, inputs.x, *affine, residual=True)
    *_, kept = ops.batch_norm_reduce_gradient(inputs.grad, inputs.x, *affine, y, residual=True)
    assert torch.equal(again, kept)
    assert again.count_nonzero() < inputs.grad.count_nonzero()


def test_opcheck(device):
    case = CASES["three_splits"]
    inputs = make_inputs(case, device)
    affine = (inputs.mean, inputs.variance, inputs.weight, inputs.bias)
    check = torch.library.opcheck
    check(OPERATORS.batch_norm_statistics.default, (inputs.x, case.splits, EPSILON))
    check(OPERATORS.batch_norm_apply.default, (inputs.x, *affine, inputs.residual, True))
    check(OPERATORS.batch_norm_apply.out, (inputs.x, *affine, None, True, torch.empty_like(inputs.x)))
    gradient = (inputs.grad, inputs.x, *affine)
    check(OPERATORS.batch_norm_reduce_gradient.default, (*gradient, None, True, False))
    check(OPERATORS.batch_norm_reduce_gradient.default, (*gradient, inputs.residual, True, True))
    sums = (inputs.mean, inputs.variance, 70.0)
    check(OPERATORS.batch_norm_apply_gradient.default, (*gradient, None, True, *sums))
    check(OPERATORS.batch_norm_apply_gradient.default, (*gradient, inputs.residual, True, None, None, 0.0))


MAP, GROUPS, CHANNELS = torch.zeros(2, 8, 2, 5, 5), torch.zeros(2, 8), torch.zeros(8)
X_MESSAGES = [
    ({"x": torch.zeros(8, 2, 5, 5)}, r"x must be \(N, C, T, H, W\), got \(8, 2, 5, 5\)"),
    ({"x": MAP.long()}, "x must be (floating point, got torch.int64|float32, float16 or bfloat16)"),
]
AFFINE_MESSAGES = [
    *X_MESSAGES,
    ({"x": torch.zeros(3, 8, 2, 5, 5)}, "splits must be a divisor of the 3 clips, got 2"),
    ({"mean": CHANNELS}, r"mean must be \(splits, C\), got \(8,?\)"),
    ({"mean": torch.zeros(0, 8)}, r"mean must be \(splits, C\), got \(0, 8\)"),
    ({"mean": torch.zeros(2, 7)}, r"mean must be \(2, 8\), got \(2, 7\)"),
    ({"inverse_std": torch.zeros(1, 8)}, r"inverse_std must be \(2, 8\), got \(1, 8\)"),
    ({"weight": torch.zeros(9)}, r"weight must be \(8,?\), got \(9,?\)"),
    ({"bias": GROUPS}, r"bias must be \(8,?\), got \(2, 8\)"),
    ({"mean": GROUPS.half()}, "mean must be .*float32"),
    ({"inverse_std": GROUPS.double()}, "inverse_std must be .*float32"),
    ({"weight": CHANNELS.bfloat16()}, "weight must be .*float32"),
    ({"bias": CHANNELS.long()}, "bias must be .*float32"),
]


def of_a_map(name):
    wrong_dtype = f"{name} must (be in the dtype of x, torch.float32, got torch.float16|have the dtype of x)"
    return [
        ({name: MAP[:, :7]}, rf"{name} must be \(2, 8, 2, 5, 5\), got \(2, 7, 2, 5, 5\)"),
        ({name: MAP.half()}, wrong_dtype),
    ]


MESSAGES = {
    "batch_norm_statistics": [
        *X_MESSAGES,
        ({"splits": 0}, "splits must be a divisor of the 2 clips, got 0"),
        ({"splits": -1}, "splits must be a divisor of the 2 clips, got -1"),
        ({"splits": 3}, "splits must be a divisor of the 2 clips, got 3"),
        ({"eps": -1e-5}, "eps must be at least 0, got -1e-05"),
        ({"eps": math.nan}, "eps must be at least 0, got nan"),
    ],
    "batch_norm_apply": [
        *AFFINE_MESSAGES,
        *of_a_map("residual"),
        *of_a_map("out"),
        (
            {"out": torch.zeros(2, 8, 2, 5, 5)},
            "out must be channels_last_3d or a slice of the channels of such a tensor",
        ),
    ],
    "batch_norm_reduce_gradient": [*AFFINE_MESSAGES, *of_a_map("grad"), *of_a_map("y")],
    "batch_norm_apply_gradient": [
        *AFFINE_MESSAGES,
        *of_a_map("grad"),
        *of_a_map("y"),
        ({"sum_grad": GROUPS}, "sum_grad must be given exactly with sum_grad_normalized, got one of them"),
        ({"sum_grad": CHANNELS, "sum_grad_normalized": GROUPS}, r"sum_grad must be \(2, 8\), got \(8,?\)"),
        (
            {"sum_grad": GROUPS, "sum_grad_normalized": GROUPS[:1]},
            r"sum_grad_normalized must be \(2, 8\), got \(1, 8\)",
        ),
        ({"sum_grad": GROUPS, "sum_grad_normalized": GROUPS.half()}, "sum_grad_normalized must be .*float32"),
        ({"sum_grad": GROUPS, "sum_grad_normalized": GROUPS}, "count must be positive with sum_grad, got 0"),
    ],
}


@pytest.mark.parametrize(
    ("operator", "change", "message"),
    [(operator, *row) for operator, rows in MESSAGES.items() for row in rows],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value if value in MESSAGES else "",
)
def test_bad_arguments_are_named(operator, change, message, device):
    arguments = {"x": MAP}
    if operator != "batch_norm_statistics":
        arguments |= {"mean": GROUPS, "inverse_std": GROUPS}
    if operator.endswith("gradient"):
        arguments |= {"grad": MAP}
    arguments |= change
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match=f"{operator}: ({message})"):
        getattr(ops, operator)(**arguments)


@pytest.mark.cuda
def test_another_device_is_named():
    x = MAP.cuda()
    with pytest.raises(RuntimeError, match=r"batch_norm_apply: mean must be .*on the device of x"):
        ops.batch_norm_apply(x, GROUPS, GROUPS.cuda())
    with pytest.raises(RuntimeError, match=r"batch_norm_apply: residual must be .*on the device of x"):
        ops.batch_norm_apply(x, GROUPS.cuda(), GROUPS.cuda(), residual=MAP)
