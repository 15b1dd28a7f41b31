"""fast_bottleneck against plain PyTorch in float64: values, gradients, layouts, registrations, messages."""

import importlib
import math
import re
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tolerances import tolerance
from torch.testing import assert_close

from slowfast_ext import ops

OPERATOR = torch.ops.slowfast_ext.fast_bottleneck.default
OPERATOR_OUT = torch.ops.slowfast_ext.fast_bottleneck.out


@dataclass(frozen=True)
class Case:
    x: tuple
    channels: int
    stride: int = 1

    @property
    def projection(self):
        return self.stride > 1 or self.x[1] != 4 * self.channels

    @property
    def terms(self):
        """Products in one output, over the layers passed."""
        return 3 * self.x[1] + 9 * self.channels + self.channels + self.projection * self.x[1]


CASES = {
    "res2_first": Case((2, 8, 4, 9, 10), 8),
    "res2": Case((1, 32, 5, 7, 9), 8),
    "res3_first": Case((1, 32, 4, 9, 10), 16, 2),
    "res3": Case((1, 64, 3, 7, 6), 16),
    "res4_first": Case((1, 64, 3, 8, 7), 32, 2),
    "res4": Case((1, 128, 2, 5, 6), 32),
    "one_frame": Case((2, 32, 1, 5, 5), 8),
    "one_pixel": Case((1, 32, 3, 1, 1), 16, 2),
    "empty_batch": Case((0, 32, 3, 4, 4), 8),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def make_inputs(case, device="cpu", dtype=torch.float32, requires_grad=False):
    """The tensors of the schema, such that x, a, b and the result have entries of unit size."""
    generator = torch.Generator().manual_seed(0)
    in_channels, channels = case.x[1], case.channels
    bias_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = [(channels, in_channels, 3, 1, 1), (channels, channels, 1, 3, 3), (4 * channels, channels, 1, 1, 1)]
    shapes += [(4 * channels, in_channels, 1, 1, 1)] if case.projection else []

    def random(shape, dtype, deviation=1.0):
        tensor = deviation * torch.randn(shape, generator=generator)
        tensor = tensor.to(memory_format=torch.channels_last_3d) if len(shape) == 5 else tensor
        return tensor.to(device, dtype).requires_grad_(requires_grad)

    inputs = [random(case.x, dtype)]
    for shape in shapes:
        inputs += [random(shape, dtype, math.prod(shape[1:]) ** -0.5), random((shape[0],), bias_dtype)]
    return [*inputs, *(() if case.projection else (None, None))]


def expected(inputs, case):
    """Plain PyTorch in float64."""
    x, weight_a, bias_a, weight_b, bias_b, weight_c, bias_c, weight_shortcut, bias_shortcut = (
        None if tensor is None else tensor.double() for tensor in inputs
    )
    stride = (1, case.stride, case.stride)
    a = F.conv3d(x, weight_a, bias_a, padding=(1, 0, 0)).relu()
    b = F.conv3d(a, weight_b, bias_b, stride, padding=(0, 1, 1)).relu()
    shortcut = x if weight_shortcut is None else F.conv3d(x, weight_shortcut, bias_shortcut, stride)
    return (F.conv3d(b, weight_c, bias_c) + shortcut).relu()


def call(inputs, case, out=None):
    return ops.fast_bottleneck(*inputs, stride=case.stride, out=out)


def assert_like(actual, reference, case):
    # Everything has about unit deviation, a result at most twice that; a, b and on a CPU each convolution are rounded.
    assert_close(actual.double(), reference, **tolerance(actual.dtype, case.terms, roundings=6, scale=2))


@pytest.fixture
def served(device):
    """Skip what CUDA has no kernel for."""

    def skip_unless(case, dtype=torch.float32):
        if device.type == "cuda":
            reason = ops.fast_bottleneck_reason_against(
                case.x[1], case.channels, stride=case.stride, projection=case.projection, dtype=dtype, device=device
            )
            if reason is not None:
                pytest.skip(reason)

    return skip_unless


@dtypes
@cases
def test_equals_plain_pytorch_in_float64(case, dtype, device, served):
    served(case, dtype)
    inputs = make_inputs(case, device, dtype)
    y = call(inputs, case)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    assert_like(y, expected(inputs, case), case)


@cases
def test_float64_is_exact_on_a_cpu(case):
    inputs = make_inputs(case, dtype=torch.float64)
    assert_close(call(inputs, case), expected(inputs, case), rtol=1e-12, atol=1e-12)


def test_a_frame_of_zeros_is_not_what_the_image_is_padded_with(device, served):
    """The 1x3x3 convolution sees zeros outside the image, not the ReLU of a bias."""
    case = Case((1, 32, 1, 3, 3), 8)
    served(case, torch.bfloat16)
    x, weight_a, bias_a, weight_b, bias_b, weight_c, bias_c, *_ = (
        None if tensor is None else torch.zeros_like(tensor) for tensor in make_inputs(case, device, torch.bfloat16)
    )
    bias_a.fill_(1)
    weight_b[:, 0] = 1
    weight_c[:, 0] = 1
    y = call((x, weight_a, bias_a, weight_b, bias_b, weight_c, bias_c, None, None), case)
    taps = torch.tensor([[4, 6, 4], [6, 9, 6], [4, 6, 4]], device=device, dtype=y.dtype)
    assert_close(y, taps.expand_as(y), rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "slice_of_channels", "odd_slice_of_channels"])
@pytest.mark.parametrize("name", ["res2", "res3_first"])
def test_any_layout_of_x(name, layout, device, served):
    case = CASES[name]
    served(case, torch.bfloat16)
    x, *others = make_inputs(case, device, torch.bfloat16)
    if layout == "contiguous":
        x = x.contiguous()
    else:
        n, c, t, h, w = case.x
        offset = 8 if layout == "slice_of_channels" else 3
        wide = torch.full((n, c + 16, t, h, w), torch.nan, device=device, dtype=x.dtype)
        wide = wide.to(memory_format=torch.channels_last_3d)
        wide[:, offset : offset + c] = x
        x = wide[:, offset : offset + c]
    assert_like(call((x, *others), case), expected((x, *others), case), case)


@pytest.mark.parametrize("offset", [0, 1, 64])
def test_a_slice_of_a_wider_buffer_is_filled_and_nothing_else(offset, device, served):
    case = CASES["res2"]
    served(case, torch.bfloat16)
    inputs = make_inputs(case, device, torch.bfloat16)
    reference = expected(inputs, case)
    n, k, t, h, w = reference.shape
    buffer = torch.full((n, k + 66, t, h, w), 7.0, device=device, dtype=torch.bfloat16)
    buffer = buffer.to(memory_format=torch.channels_last_3d)
    out = buffer[:, offset : offset + k]
    assert call(inputs, case, out=out) is out
    assert_like(out, reference, case)
    assert (buffer[:, :offset] == 7).all()
    assert (buffer[:, offset + k :] == 7).all()


@cases
def test_gradients_equal_autograd_of_plain_pytorch_in_float64(case):
    inputs = make_inputs(case, dtype=torch.float64, requires_grad=True)
    tensors = [tensor for tensor in inputs if tensor is not None]
    y, reference = call(inputs, case), expected(inputs, case)
    grad = torch.randn_like(reference)
    actual = torch.autograd.grad(y, tensors, grad)
    for gradient, gradient_of_reference in zip(actual, torch.autograd.grad(reference, tensors, grad), strict=True):
        assert_close(gradient, gradient_of_reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["res2", "res3_first"])
def test_gradients_of_low_precision_stay_close_to_those_of_float64(name, device, served):
    case = CASES[name]
    served(case, torch.bfloat16)
    inputs = make_inputs(case, device, torch.bfloat16, requires_grad=True)
    tensors = [tensor for tensor in inputs if tensor is not None]
    y, reference = call(inputs, case), expected(inputs, case)
    grad = torch.randn_like(reference)
    actual = torch.autograd.grad(y, tensors, grad.bfloat16())
    for gradient, exact in zip(actual, torch.autograd.grad(reference, tensors, grad), strict=True):
        # Where a ReLU's argument is rounded to the other side of zero single elements differ much, but few do. Over
        # seeds the cosine of a bias, eight sums, goes down to 0.988.
        assert F.cosine_similarity(gradient.double().flatten(), exact.double().flatten(), 0) > 0.98


def test_gradients_are_differentiable_again():
    case = Case((1, 4, 2, 3, 3), 1)
    inputs = make_inputs(case, dtype=torch.float64, requires_grad=True)[:-2]
    assert torch.autograd.gradgradcheck(lambda *tensors: call((*tensors, None, None), case), inputs)


def test_only_the_gradients_asked_for_are_returned():
    case = CASES["res3_first"]
    inputs = make_inputs(case)
    inputs[0].requires_grad_()
    inputs[4].requires_grad_()
    call(inputs, case).sum().backward()
    assert [tensor.grad is not None for tensor in inputs] == [index in (0, 4) for index in range(9)]


def test_out_refuses_inputs_that_want_gradients(device):
    case = CASES["res2"]
    inputs = make_inputs(case, device, requires_grad=True)
    with pytest.raises(RuntimeError, match="gradients"):
        call(inputs, case, out=torch.empty_like(inputs[0]))


def test_opcheck(device, served):
    case = CASES["res3_first"]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    served(case, dtype)
    for requires_grad in (False, True):
        inputs = make_inputs(case, device, dtype, requires_grad=requires_grad)
        torch.library.opcheck(OPERATOR, (*inputs, case.stride))
    inputs = make_inputs(case, device, dtype)
    torch.library.opcheck(OPERATOR_OUT, (*inputs, case.stride, torch.empty_like(call(inputs, case))))


def test_autocast_casts_activations_and_keeps_the_biases(device, served):
    case = CASES["res2_first"]
    served(case, torch.bfloat16)
    inputs = make_inputs(case, device, requires_grad=True)
    with torch.autocast(device.type, torch.bfloat16):
        y = call(inputs, case)
    assert y.dtype == torch.bfloat16
    rounded = [tensor.bfloat16() if tensor.dim() == 5 else tensor for tensor in inputs]
    assert_like(y, expected(rounded, case), case)
    y.sum().backward()
    assert {tensor.grad.dtype for tensor in inputs} == {torch.float32}


def test_compiles_to_one_graph_also_with_out_and_backward(device, served):
    case = CASES["res3_first"]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    served(case, dtype)
    inputs = make_inputs(case, device, dtype)

    def both(*inputs):
        y = call(inputs, case)
        return y, call(inputs, case, out=torch.zeros_like(y))

    for actual in torch.compile(both, fullgraph=True, backend="aot_eager")(*inputs):
        assert_like(actual, expected(inputs, case), case)
    inputs[0].requires_grad_()
    compiled = torch.compile(lambda *inputs: call(inputs, case), fullgraph=True, backend="aot_eager")
    gradients = [torch.autograd.grad(f(*inputs).sum(), inputs[0])[0] for f in (compiled, lambda *i: call(i, case))]
    assert_close(*gradients)


def test_stays_one_node_in_an_exported_program_with_dynamic_batch():
    case = CASES["res2"]
    _, *others = make_inputs(case)

    class Block(torch.nn.Module):
        def forward(self, x):
            return call((x, *others), case)

    batch, frames = torch.export.Dim("batch"), torch.export.Dim("frames")
    program = torch.export.export(Block(), (torch.randn(2, 32, 4, 5, 5),), dynamic_shapes=({0: batch, 2: frames},))
    assert [node.target for node in program.graph.nodes].count(OPERATOR) == 1
    x = torch.randn(3, 32, 6, 5, 5)
    assert_close(program.module()(x), Block()(x))


SHAPES = {
    "x": (2, 32, 3, 5, 5),
    "weight_a": (16, 32, 3, 1, 1),
    "bias_a": (16,),
    "weight_b": (16, 16, 1, 3, 3),
    "bias_b": (16,),
    "weight_c": (64, 16, 1, 1, 1),
    "bias_c": (64,),
    "weight_shortcut": (64, 32, 1, 1, 1),
    "bias_shortcut": (64,),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(32, 3, 5, 5)}, r"x must be \(N, C, T, H, W\), not empty, got \(32, 3, 5, 5\)"),
        ({"x": torch.zeros(2, 32, 3, 0, 5)}, r"x must be \(N, C, T, H, W\), not empty, got \(2, 32, 3, 0, 5\)"),
        ({"weight_a": torch.zeros(16, 32, 1, 1, 1)}, r"weight_a must be \(16, 32, 3, 1, 1\), got \(16, 32, 1, 1, 1\)"),
        ({"weight_b": torch.zeros(16, 16, 3, 3)}, r"weight_b must be \(16, 16, 1, 3, 3\), got \(16, 16, 3, 3\)"),
        ({"weight_c": torch.zeros(32, 16, 1, 1, 1)}, r"weight_c must be \(64, 16, 1, 1, 1\), got \(32, 16, 1, 1, 1\)"),
        ({"weight_c": torch.zeros(64, 16, 1, 1, 1).half()}, "weight_c must .*dtype of x"),
        ({"bias_b": torch.zeros(15)}, r"bias_b must be \(16,?\), got \(15,?\)"),
        ({"bias_c": torch.zeros(64).half()}, "bias_c must be .*float32"),
        ({"bias_shortcut": None}, "bias_shortcut must be given exactly if weight_shortcut is"),
        (
            {"weight_shortcut": None, "bias_shortcut": None},
            "weight_shortcut must be given unless the stride is 1 and x has 64 channels, got None for stride 2 and 32",
        ),
        ({"stride": 3}, "stride must be 1 or 2, got 3"),
        ({"out": torch.zeros(2, 64, 3, 5, 5)}, r"out must be \(2, 64, 3, 3, 3\), got \(2, 64, 3, 5, 5\)"),
        ({"out": torch.zeros(2, 64, 3, 3, 3).half()}, "out must .*dtype of x"),
        ({"out": torch.zeros(2, 64, 3, 3, 3)}, "out must be channels_last_3d"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(change, message, device):
    arguments = {name: torch.zeros(shape) for name, shape in SHAPES.items()} | {"stride": 2} | change
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match="fast_bottleneck: .*" + message):
        ops.fast_bottleneck(**arguments)


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("x", "channels", "dtype", "message"),
    [
        ((1, 32, 2, 4, 4), 8, torch.float32, "x must be float16 or bfloat16 on CUDA"),
        ((1, 256, 2, 4, 4), 64, torch.bfloat16, r"in_channels, channels, stride must .*got \(256, 64, 1\)"),
        ((1, 16, 2, 4, 4), 4, torch.bfloat16, r"in_channels, channels, stride must .*got \(16, 4, 1\)"),
    ],
)
def test_a_block_without_a_kernel_is_refused_on_cuda(x, channels, dtype, message):
    case = Case(x, channels)
    with pytest.raises(RuntimeError, match=message):
        call(make_inputs(case, "cuda", dtype), case)


def pretend_there_is_a_gpu(monkeypatch, shared_memory):
    properties = SimpleNamespace(name="Pretended", shared_memory_per_block_optin=shared_memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    module = importlib.import_module("slowfast_ext.ops.fast_bottleneck")
    unavailable_reason = module.unavailable_reason
    monkeypatch.setattr(module, "unavailable_reason", lambda device: unavailable_reason(device) if device else None)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"dtype": torch.float32}, "kernels for torch.float16 and torch.bfloat16, not for torch.float32"),
        ({"temporal_kernel": 1}, "temporal kernel of 3, not of 1"),
        ({"in_channels": 256, "channels": 64}, r"no kernel has .* \(256, 64, 1\) with the identity"),
        ({"in_channels": 12}, r"no kernel has .* \(12, 8, 1\)"),
        ({"stride": 2}, r"no kernel has .* \(32, 8, 2\)"),
        ({"projection": True}, r"no kernel has .* \(32, 8, 1\) with a projection"),
        ({"device": "cpu"}, "CUDA-only"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_block_that_is_not_served_gets_a_reason(block, message, monkeypatch):
    pretend_there_is_a_gpu(monkeypatch, shared_memory=232448)
    arguments = {"in_channels": 32, "channels": 8} | block
    reason = ops.fast_bottleneck_reason_against(arguments.pop("in_channels"), arguments.pop("channels"), **arguments)
    assert re.search(message, reason)


@pytest.mark.parametrize(
    ("shared_memory", "served"),
    [(232448, {8, 32, 64, 128}), (166912, {8, 32, 64, 128}), (101376, {8, 32, 64}), (65536, {8, 32})],
    ids=["9.0", "8.0", "8.6", "7.5"],
)
def test_shared_memory_decides_which_widths_are_served(shared_memory, served, monkeypatch):
    pretend_there_is_a_gpu(monkeypatch, shared_memory)
    reasons = {
        in_channels: ops.fast_bottleneck_reason_against(in_channels, channels, projection=in_channels == 8)
        for in_channels, channels in ((8, 8), (32, 8), (64, 16), (128, 32))
    }
    assert {in_channels for in_channels, reason in reasons.items() if reason is None} == served
    for reason in reasons.values():
        assert reason is None or f"bytes of shared memory, Pretended has {shared_memory}" in reason
