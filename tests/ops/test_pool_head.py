"""pool_head against the plain head in float64: values, gradients, layouts, registrations, messages."""

import math
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tolerances import tolerance
from torch.func import functional_call
from torch.testing import assert_close

from slowfast_ext import ops
from slowfast_ext.models import SlowFastHead

OPERATOR = torch.ops.slowfast_ext.pool_head.default


@dataclass(frozen=True)
class Case:
    slow: tuple
    fast: tuple
    classes: int
    pooling: str = "global"
    window: tuple = (7, 7)

    @property
    def terms(self):
        """Additions on the way to a logit: pixels of an average, then features."""
        return self.slow[1] + self.fast[1] + max(math.prod(self.slow[2:]), math.prod(self.fast[2:]))

    @property
    def options(self):
        if self.pooling == "global":
            return {}
        return {"window": self.window, "softmax_positions": self.pooling == "sliding_softmax"}


CASES = {
    "global": Case((2, 64, 4, 7, 7), (2, 8, 32, 7, 7), 40),
    "global_of_different_planes": Case((2, 24, 2, 3, 5), (2, 8, 8, 6, 4), 11),
    "sliding": Case((2, 64, 4, 8, 8), (2, 8, 16, 8, 8), 40, "sliding"),
    "sliding_softmax": Case((2, 64, 4, 8, 8), (2, 8, 16, 8, 8), 40, "sliding_softmax"),
    "one_window": Case((2, 16, 2, 7, 7), (2, 8, 4, 7, 7), 5, "sliding_softmax"),
    "more_windows_than_are_summed_at_once": Case((2, 16, 2, 6, 5), (2, 8, 3, 6, 5), 5, "sliding_softmax", (3, 2)),
    "odd_channels": Case((3, 5, 3, 4, 6), (3, 3, 5, 4, 6), 7, "sliding", (2, 3)),
    "one_pixel": Case((1, 1, 1, 1, 1), (1, 1, 1, 1, 1), 1),
    "empty_batch": Case((0, 8, 2, 3, 3), (0, 8, 4, 3, 3), 5),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def make_inputs(case, device="cpu", dtype=torch.float32, weight_dtype=None, requires_grad=False):
    """Slow and fast features, weight and bias with entries of unit size."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape, dtype):
        tensor = torch.randn(shape, generator=generator).to(device, dtype)
        tensor = tensor.to(memory_format=torch.channels_last_3d) if len(shape) == 5 else tensor
        return tensor.requires_grad_(requires_grad)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        random(*case.slow, dtype=dtype),
        random(*case.fast, dtype=dtype),
        random(case.classes, case.fast[1] + case.slow[1], dtype=weight_dtype or dtype),
        random(case.classes, dtype=wide),
    )


def expected(slow, fast, weight, bias, case):
    """The plain head in float64: logits."""
    config = SimpleNamespace(
        head_pooling=case.pooling,
        head_window=case.window,
        dropout=0.5,
        fast=SimpleNamespace(channels=[fast.shape[1]]),
        slow=SimpleNamespace(channels=[slow.shape[1]]),
        num_classes=case.classes,
    )
    bias = weight.new_zeros(case.classes) if bias is None else bias
    parameters = {"fc_cls.weight": weight.double(), "fc_cls.bias": bias.double()}
    return functional_call(SlowFastHead(config).eval(), parameters, ((slow.double(), fast.double()),))


def assert_like(actual, reference, case):
    # Averages of entries of unit size are at most of unit size, so a logit has at most the deviation of this sum.
    scale = math.sqrt(case.slow[1] + case.fast[1] + 1)
    assert actual.dtype == torch.float32
    assert_close(actual.double(), reference, **tolerance(torch.float32, case.terms, scale=scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@cases
def test_logits_equal_those_of_the_plain_head_in_float64(case, dtype, device):
    inputs = make_inputs(case, device, dtype)
    logits = ops.pool_head(*inputs, **case.options)
    assert logits.is_contiguous()
    assert_like(logits, expected(*inputs, case), case)


@pytest.mark.parametrize("views", [1, 2, 6])
@pytest.mark.parametrize("pooling", ["global", "sliding", "sliding_softmax"])
def test_probabilities_are_averaged_over_the_views_of_each_video(pooling, views, device):
    case = Case((6, 16, 2, 4, 4), (6, 8, 4, 4, 4), 9, pooling, (3, 3))
    inputs = make_inputs(case, device)
    probabilities = ops.pool_head(*inputs, **case.options, views=views)
    reference = expected(*inputs, case).softmax(1).reshape(6 // views, views, 9).mean(1)
    assert_like(probabilities, reference, case)
    assert_close(probabilities.sum(1), torch.ones(6 // views, device=device))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_weight_has_a_dtype_of_its_own_and_bias_is_optional(weight_dtype, device):
    case = CASES["global"]
    slow, fast, weight, _ = make_inputs(case, device, torch.bfloat16, weight_dtype)
    assert_like(ops.pool_head(slow, fast, weight), expected(slow, fast, weight, None, case), case)


def test_float64_is_exact_on_a_cpu():
    for name in ("sliding", "sliding_softmax"):
        inputs = make_inputs(CASES[name], dtype=torch.float64)
        logits = ops.pool_head(*inputs, **CASES[name].options)
        assert_close(logits, expected(*inputs, CASES[name]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "layout", ["contiguous", "slice_of_channels", "slice_that_is_not_aligned", "every_second_frame"]
)
@pytest.mark.parametrize("name", ["global", "sliding_softmax", "odd_channels"])
def test_any_layout_of_the_features(name, layout, device):
    case = CASES[name]
    slow, fast, weight, bias = make_inputs(case, device)

    def lay_out(x):
        if layout == "contiguous":
            return x.contiguous()
        first = {"slice_of_channels": 8, "slice_that_is_not_aligned": 3}.get(layout, 0)
        shape = (x.shape[0], x.shape[1] + 2 * first, x.shape[2] * (1 if first else 2), *x.shape[3:])
        wide = torch.full(shape, torch.nan, device=device).to(memory_format=torch.channels_last_3d)
        view = wide[:, first : first + x.shape[1]] if first else wide[:, :, ::2]
        return view.copy_(x)

    features = lay_out(slow), lay_out(fast)
    assert_like(ops.pool_head(*features, weight, bias, **case.options), expected(slow, fast, weight, bias, case), case)


def test_probabilities_survive_logits_of_any_size(device):
    case = Case((1, 2, 1, 2, 3), (1, 1, 1, 2, 3), 20, "sliding_softmax", (2, 2))
    slow, fast, weight, bias = make_inputs(case, device)
    logits = ops.pool_head(slow * 1e4, fast * 1e4, weight, bias, **case.options)
    reference = expected(slow * 1e4, fast * 1e4, weight, bias, case)
    assert reference.min() < -1000  # whose exponential float32 cannot hold
    assert_close(logits.double(), reference, rtol=1e-5, atol=0.1)


def test_what_is_not_finite_concerns_its_windows_only(device):
    case = Case((1, 8, 1, 2, 3), (1, 8, 1, 2, 3), 3, "sliding_softmax", (2, 2))
    slow, fast, weight, bias = make_inputs(case, device)
    slow[0, 0, 0, 0, 0] = torch.nan
    assert ops.pool_head(slow, fast, weight, bias).isnan().all()
    assert ops.pool_head(slow[..., 1:], fast[..., 1:], weight, bias, **case.options).isfinite().all()


@pytest.mark.parametrize("views", [0, 2])
@pytest.mark.parametrize("name", ["global_of_different_planes", "sliding", "sliding_softmax"])
def test_gradients_equal_autograd_of_the_plain_head_in_float64(name, views, device):
    case = CASES[name]
    inputs = make_inputs(case, device, requires_grad=True)
    result, reference = ops.pool_head(*inputs, **case.options, views=views), expected(*inputs, case)
    if views:
        reference = reference.softmax(1).reshape(-1, views, case.classes).mean(1)
    grad = torch.randn_like(reference)
    actual = torch.autograd.grad(result, inputs, grad.float())
    for gradient, gradient_of_reference in zip(actual, torch.autograd.grad(reference, inputs, grad), strict=True):
        terms = case.terms + case.classes
        assert_close(gradient, gradient_of_reference.float(), **tolerance(torch.float32, terms))


@pytest.mark.parametrize(("pooling", "views"), [("global", 0), ("sliding", 2), ("sliding_softmax", 0)])
def test_gradients_are_differentiable_again(pooling, views):
    case = Case((2, 2, 1, 2, 3), (2, 1, 2, 2, 3), 3, pooling, (2, 2))
    inputs = make_inputs(case, dtype=torch.float64, requires_grad=True)
    head = partial(ops.pool_head, **case.options, views=views)
    assert torch.autograd.gradgradcheck(head, inputs, fast_mode=True)


def test_opcheck(device):
    global_inputs = make_inputs(CASES["global"], device)
    torch.library.opcheck(OPERATOR, (*global_inputs, (), False, 2))
    sliding_inputs = make_inputs(CASES["sliding_softmax"], device, requires_grad=True)
    torch.library.opcheck(OPERATOR, (*sliding_inputs, (7, 7), True, 0))


def test_autocast_changes_nothing(device):
    case = CASES["sliding"]
    inputs = make_inputs(case, device, requires_grad=True)
    with torch.autocast(device.type, torch.bfloat16):
        logits = ops.pool_head(*inputs, **case.options)
        mixed = ops.pool_head(*(tensor.bfloat16() for tensor in inputs[:2]), *inputs[2:], **case.options)
    assert torch.equal(logits, ops.pool_head(*inputs, **case.options))
    rounded = [tensor.bfloat16() for tensor in inputs[:2]]
    assert_like(mixed, expected(*rounded, *inputs[2:], case), case)


def test_compiles_to_one_graph_with_gradients(device):
    case = CASES["sliding_softmax"]
    inputs = make_inputs(case, device, requires_grad=True)
    compiled = torch.compile(
        lambda *tensors: ops.pool_head(*tensors, **case.options), fullgraph=True, backend="aot_eager"
    )
    logits = compiled(*inputs)
    assert_like(logits, expected(*inputs, case), case)
    plain = torch.autograd.grad(ops.pool_head(*inputs, **case.options).square().sum(), inputs)
    assert_close(torch.autograd.grad(logits.square().sum(), inputs), plain)


def test_stays_one_node_in_an_exported_program_with_dynamic_batch_and_frames():
    class Head(torch.nn.Module):
        def forward(self, slow, fast):
            return ops.pool_head(slow, fast, torch.ones(5, 12), window=(3, 3))

    batch = torch.export.Dim("batch")
    dynamic = tuple({0: batch, 2: torch.export.Dim(name)} for name in ("slow_frames", "fast_frames"))
    inputs = torch.randn(2, 8, 2, 4, 4), torch.randn(2, 4, 8, 4, 4)
    program = torch.export.export(Head(), inputs, dynamic_shapes=dynamic)
    assert [node.target for node in program.graph.nodes].count(OPERATOR) == 1
    inputs = torch.randn(3, 8, 3, 4, 4), torch.randn(3, 4, 12, 4, 4)
    assert_close(program.module()(*inputs), Head()(*inputs))


SLOW, FAST = (2, 8, 2, 5, 5), (2, 4, 8, 5, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slow": torch.zeros(8, 2, 5, 5)}, r"slow must be \(N, C, T, H, W\), got \(8, 2, 5, 5\)"),
        ({"fast": torch.zeros(2, 4, 8, 5)}, r"fast must be \(N, C, T, H, W\), got \(2, 4, 8, 5\)"),
        ({"slow": torch.zeros(2, 8, 0, 5, 5)}, r"slow must be at least one channel, frame, row and column, got"),
        ({"fast": torch.zeros(3, 4, 8, 5, 5)}, r"fast must be \(2, 4, 8, 5, 5\), got \(3, 4, 8, 5, 5\)"),
        (
            {"fast": torch.zeros(2, 4, 8, 6, 5), "window": (2, 2)},
            r"fast must be \(2, 4, 8, 5, 5\), got \(2, 4, 8, 6, 5",
        ),
        ({"fast": torch.zeros(FAST).half()}, "fast must be in the dtype of slow|fast must have the dtype of x"),
        ({"window": (7, 7)}, r"slow must be at least as large as the window \(7, 7\), got \(2, 8, 2, 5, 5\)"),
        ({"window": (0, 2)}, r"window must be two positive integers or empty, got \(0, 2\)"),
        ({"window": (2,)}, r"window must be two positive integers or empty, got \(2"),
        ({"weight": torch.zeros(3, 11)}, r"weight must be \(classes, 12\), got \(3, 11\)"),
        ({"weight": torch.zeros(12)}, r"weight must be \(classes, 12\), got \(12,?\)"),
        ({"weight": torch.zeros(3, 12).long()}, "weight must be .*float"),
        ({"bias": torch.zeros(4)}, r"bias must be \(3,?\), got \(4,?\)"),
        ({"bias": torch.zeros(3).half()}, "bias must be .*float32"),
        ({"views": 3}, "views must be 0 or a divisor of the batch size 2, got 3"),
        ({"views": -1}, "views must be 0 or a divisor of the batch size 2, got -1"),
        ({"slow": torch.zeros(SLOW).long(), "fast": torch.zeros(FAST).long()}, "must be .*float"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(change, message, device):
    arguments = {"slow": torch.zeros(SLOW), "fast": torch.zeros(FAST), "weight": torch.zeros(3, 12)} | change
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match="pool_head: .*(" + message + ")"):
        ops.pool_head(**arguments)
