"""lateral_fuse against plain PyTorch in float64: values, gradients, layouts, registrations, messages."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from tolerances import tolerance
from torch.testing import assert_close

from slowfast_ext import ops

OPERATOR = torch.ops.slowfast_ext.lateral_fuse.default
OPERATOR_OUT = torch.ops.slowfast_ext.lateral_fuse.out


@dataclass(frozen=True)
class Case:
    fast: tuple
    slow_channels: int
    out_channels: int
    kernel: int
    stride: int

    @property
    def slow(self):
        n, _, t, h, w = self.fast
        return n, self.slow_channels, (t - 1) // self.stride + 1, h, w

    @property
    def terms(self):
        return self.fast[1] * self.kernel


CASES = {
    "res1_5_taps_stride_8": Case((1, 8, 32, 5, 6), 64, 16, 5, 8),
    "res2_7_taps_stride_4": Case((2, 32, 16, 3, 5), 256, 64, 7, 4),
    "res3_7_taps_stride_4": Case((1, 64, 8, 3, 3), 128, 128, 7, 4),
    "frames_left_over": Case((1, 16, 11, 3, 4), 24, 32, 5, 4),
    "shorter_than_the_kernel": Case((2, 8, 2, 3, 3), 8, 16, 7, 4),
    "one_tap": Case((1, 8, 3, 3, 3), 8, 8, 1, 1),
    "odd_channels": Case((2, 5, 6, 3, 3), 7, 3, 3, 2),
    "empty_batch": Case((0, 8, 8, 3, 3), 8, 16, 5, 4),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def make_inputs(case, device="cpu", dtype=torch.float32, requires_grad=False):
    """slow, fast, weight and bias with entries of unit size, in the layout the kernels like."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape, dtype=dtype):
        tensor = torch.randn(shape, generator=generator).to(device, dtype)
        tensor = tensor.to(memory_format=torch.channels_last_3d) if len(shape) == 5 else tensor
        return tensor.requires_grad_(requires_grad)

    weight = random(case.out_channels, case.fast[1], case.kernel, 1, 1)
    bias = random(case.out_channels, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return random(*case.slow), random(*case.fast), weight, bias


def expected_lateral(fast, weight, bias, case, relu=True):
    """Plain PyTorch in float64."""
    bias = None if bias is None else bias.double()
    y = F.conv3d(fast.double(), weight.double(), bias, (case.stride, 1, 1), (case.kernel // 2, 0, 0))
    return y.relu() if relu else y


def expected(slow, fast, weight, bias, case, relu=True):
    return torch.cat([slow.double(), expected_lateral(fast, weight, bias, case, relu)], 1)


def assert_like(actual, reference, case):
    # The reference operator rounds twice to a 16-bit dtype, the kernels once.
    scale = math.sqrt(case.terms + 1)
    assert_close(actual.double(), reference, **tolerance(actual.dtype, case.terms, roundings=2, scale=scale))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@cases
def test_equals_plain_pytorch_in_float64(case, dtype, relu, device):
    slow, fast, weight, bias = make_inputs(case, device, dtype)
    y = ops.lateral_fuse(slow, fast, weight, bias, stride=case.stride, relu=relu)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(y[:, : case.slow_channels], slow)
    assert_like(y, expected(slow, fast, weight, bias, case, relu), case)


def test_bias_is_optional(device):
    case = CASES["res1_5_taps_stride_8"]
    slow, fast, weight, _ = make_inputs(case, device)
    assert_like(ops.lateral_fuse(slow, fast, weight, stride=8), expected(slow, fast, weight, None, case), case)


def test_the_reference_for_other_devices_equals_the_operator():
    case = CASES["res2_7_taps_stride_4"]
    inputs = make_inputs(case)
    reference = ops.lateral_fuse_reference(*inputs, case.stride, True)
    assert_like(reference, expected(*inputs, case), case)


@pytest.mark.parametrize("layout", ["contiguous", "every_second_frame", "slice_of_channels"])
@pytest.mark.parametrize("name", ["res1_5_taps_stride_8", "odd_channels"])
def test_any_layout_of_the_inputs(name, layout, device):
    case = CASES[name]
    slow, fast, weight, bias = make_inputs(case, device)

    def lay_out(x):
        if layout == "contiguous":
            return x.contiguous()
        n, c, t, h, w = x.shape
        frames = layout == "every_second_frame"
        shape = (n, c, 2 * t, h, w) if frames else (n, c + 16, t, h, w)
        wide = torch.full(shape, torch.nan, device=device).to(memory_format=torch.channels_last_3d)
        return (wide[:, :, ::2] if frames else wide[:, 8 : 8 + c]).copy_(x)

    y = ops.lateral_fuse(lay_out(slow), lay_out(fast), weight.contiguous(), bias, stride=case.stride)
    assert_like(y, expected(slow, fast, weight, bias, case), case)


@pytest.mark.parametrize("offset", [0, 1, 64])
def test_a_slice_of_a_wider_buffer_is_filled_and_nothing_else(offset, device):
    case = CASES["res2_7_taps_stride_4"]
    slow, fast, weight, bias = make_inputs(case, device)
    shape = (slow.shape[0], case.out_channels + 66, *slow.shape[2:])
    buffer = torch.full(shape, 7.0, device=device).to(memory_format=torch.channels_last_3d)
    out = buffer[:, offset : offset + case.out_channels]
    assert ops.lateral_fuse_into(fast, weight, bias, stride=case.stride, out=out) is out
    assert_like(out, expected_lateral(fast, weight, bias, case), case)
    assert (buffer[:, :offset] == 7).all()
    assert (buffer[:, offset + case.out_channels :] == 7).all()


@pytest.mark.parametrize("relu", [False, True])
@cases
def test_gradients_equal_autograd_of_plain_pytorch_in_float64(case, relu, device):
    inputs = make_inputs(case, device, requires_grad=True)
    y = ops.lateral_fuse(*inputs, stride=case.stride, relu=relu)
    reference = expected(*inputs, case, relu)
    # A ReLU on either side of zero has another gradient: leave those elements out.
    grad = torch.randn_like(reference) * (reference.abs() > 1e-3)
    actual = torch.autograd.grad(y, inputs, grad.float())
    for gradient, gradient_of_reference in zip(actual, torch.autograd.grad(reference, inputs, grad), strict=True):
        terms = max(case.terms, y[:, 0].numel(), case.out_channels * case.kernel)
        assert_close(gradient, gradient_of_reference.float(), **tolerance(torch.float32, terms))


def test_gradients_are_differentiable_again():
    case = Case((1, 2, 4, 2, 2), 2, 3, 3, 2)
    inputs = make_inputs(case, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda *tensors: ops.lateral_fuse(*tensors, stride=2), inputs)


def test_into_refuses_inputs_that_want_gradients(device):
    case = CASES["one_tap"]
    slow, fast, weight, bias = make_inputs(case, device, requires_grad=True)
    with pytest.raises(RuntimeError, match="lateral_fuse: with out, no argument may require gradients"):
        ops.lateral_fuse_into(fast, weight, bias, stride=1, out=torch.empty_like(slow))


def test_opcheck(device):
    case = CASES["frames_left_over"]
    for requires_grad in (False, True):
        inputs = make_inputs(case, device, requires_grad=requires_grad)
        torch.library.opcheck(OPERATOR, (*inputs, case.stride, True, False))
    _, fast, weight, bias = make_inputs(case, device)
    out = torch.empty(expected_lateral(fast, weight, bias, case).shape, device=device)
    out = out.to(memory_format=torch.channels_last_3d)
    torch.library.opcheck(OPERATOR_OUT, (fast, weight, bias, case.stride, True, False, out))


def test_autocast_casts_features_and_keeps_the_bias(device):
    case = CASES["res1_5_taps_stride_8"]
    inputs = make_inputs(case, device, requires_grad=True)
    with torch.autocast(device.type, torch.bfloat16):
        y = ops.lateral_fuse(*inputs, stride=case.stride)
    rounded = [tensor.bfloat16() for tensor in inputs[:3]]
    assert y.dtype == torch.bfloat16
    assert_like(y, expected(*rounded, inputs[3], case), case)
    y.sum().backward()
    assert {tensor.grad.dtype for tensor in inputs} == {torch.float32}


def test_compiles_to_one_graph_also_with_out(device):
    case = CASES["frames_left_over"]
    inputs = make_inputs(case, device)

    def both(slow, fast, weight, bias):
        y = ops.lateral_fuse(slow, fast, weight, bias, stride=case.stride)
        buffer = torch.zeros_like(y)
        buffer[:, : case.slow_channels].copy_(slow)
        ops.lateral_fuse_into(fast, weight, bias, stride=case.stride, out=buffer[:, case.slow_channels :])
        return y, buffer

    for actual in torch.compile(both, fullgraph=True, backend="aot_eager")(*inputs):
        assert_like(actual, expected(*inputs, case), case)


def test_stays_one_node_in_an_exported_program_with_dynamic_batch():
    class Block(torch.nn.Module):
        def forward(self, slow, fast):
            return ops.lateral_fuse(slow, fast, torch.ones(4, 8, 5, 1, 1), stride=4)

    inputs = torch.randn(2, 8, 2, 5, 5), torch.randn(2, 8, 8, 5, 5)
    batch = torch.export.Dim("batch")
    program = torch.export.export(Block(), inputs, dynamic_shapes=({0: batch}, {0: batch}))
    assert [node.target for node in program.graph.nodes].count(OPERATOR) == 1
    inputs = torch.randn(3, 8, 2, 5, 5), torch.randn(3, 8, 8, 5, 5)
    assert_close(program.module()(*inputs), Block()(*inputs))


SLOW, FAST, WEIGHT = (2, 8, 2, 5, 5), (2, 4, 8, 5, 5), (6, 4, 5, 1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fast": torch.zeros(4, 8, 5, 5)}, r"fast must be \(N, C, T, H, W\), got \(4, 8, 5, 5\)"),
        ({"fast": torch.zeros(2, 4, 0, 5, 5)}, r"fast must be at least one frame, got \(2, 4, 0, 5, 5\)"),
        (
            {"weight": torch.zeros(6, 3, 5, 1, 1)},
            r"weight must be \(K, 4, an odd number, 1, 1\), got \(6, 3, 5, 1, 1\)",
        ),
        (
            {"weight": torch.zeros(6, 4, 4, 1, 1)},
            r"weight must be \(K, 4, an odd number, 1, 1\), got \(6, 4, 4, 1, 1\)",
        ),
        (
            {"weight": torch.zeros(6, 4, 5, 3, 1)},
            r"weight must be \(K, 4, an odd number, 1, 1\), got \(6, 4, 5, 3, 1\)",
        ),
        ({"weight": torch.zeros(WEIGHT).half()}, "weight must .*dtype of"),
        ({"stride": 0}, "stride must be positive, got 0"),
        ({"stride": 8}, r"slow must be \(2, 8, 1, 5, 5\), got \(2, 8, 2, 5, 5\)"),
        ({"slow": torch.zeros(8, 2, 5, 5)}, r"slow must be \(N, C, T, H, W\), got \(8, 2, 5, 5\)"),
        ({"slow": torch.zeros(2, 8, 2, 5, 6)}, r"slow must be \(2, 8, 2, 5, 5\), got \(2, 8, 2, 5, 6\)"),
        ({"slow": torch.zeros(SLOW).half()}, "slow must .*dtype of"),
        ({"bias": torch.zeros(4)}, r"bias must be \(6,?\), got \(4,?\)"),
        ({"bias": torch.zeros(6).half()}, "bias must be .*float32"),
        ({"fast": torch.zeros(FAST).long(), "weight": torch.zeros(WEIGHT).long()}, "must be .*float"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(change, message, device):
    arguments = {"slow": torch.zeros(SLOW), "fast": torch.zeros(FAST), "weight": torch.zeros(WEIGHT), "stride": 4}
    arguments |= change
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match="lateral_fuse: .*(" + message + ")"):
        ops.lateral_fuse(**arguments)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.zeros(2, 6, 3, 5, 5), r"out must be \(2, 6, 2, 5, 5\), got \(2, 6, 3, 5, 5\)"),
        (torch.zeros(2, 6, 2, 5, 5).half(), "out must .*dtype of"),
        (torch.zeros(2, 6, 2, 5, 5), "out must be channels_last_3d or a slice"),
    ],
)
def test_an_out_that_cannot_be_written_is_refused(out, message, device):
    fast, weight = torch.zeros(FAST, device=device), torch.zeros(WEIGHT, device=device)
    with pytest.raises(RuntimeError, match="lateral_fuse: " + message):
        ops.lateral_fuse_into(fast, weight, stride=4, out=out.to(device))
