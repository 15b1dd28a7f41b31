"""conv3d_bn_relu against plain PyTorch in float64: values, gradients, layouts, registrations, messages."""

import math
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from tolerances import tolerance
from torch.testing import assert_close

from slowfast_ext import ops
from slowfast_ext.ops import common

OPERATOR = torch.ops.slowfast_ext.conv3d_bn_relu.default
OPERATOR_OUT = torch.ops.slowfast_ext.conv3d_bn_relu.out


@dataclass(frozen=True)
class Case:
    x: tuple
    out_channels: int
    kernel: tuple = (1, 1, 1)
    stride: tuple = (1, 1, 1)
    padding: tuple = field(default=None)

    def __post_init__(self):
        if self.padding is None:
            object.__setattr__(self, "padding", tuple(size // 2 for size in self.kernel))

    @property
    def terms(self):
        return self.x[1] * self.kernel[0] * self.kernel[1] * self.kernel[2]


CASES = {
    "slow_1x1x1_80_channels": Case((2, 80, 2, 7, 5), 64),
    "slow_1x3x3_stride_2": Case((1, 64, 3, 9, 10), 64, (1, 3, 3), (1, 2, 2)),
    "slow_3x1x1": Case((1, 64, 4, 6, 6), 136, (3, 1, 1)),
    "fast_3x1x1_8_channels": Case((1, 8, 8, 7, 7), 8, (3, 1, 1)),
    "fast_1x3x3_16_channels": Case((1, 16, 5, 7, 9), 16, (1, 3, 3)),
    "slow_stem_1x7x7": Case((1, 3, 2, 19, 17), 64, (1, 7, 7), (1, 2, 2)),
    "fast_stem_5x7x7": Case((1, 3, 6, 15, 16), 8, (5, 7, 7), (1, 2, 2)),
    "lateral_5x1x1_stride_8": Case((1, 8, 32, 5, 4), 16, (5, 1, 1), (8, 1, 1)),
    "lateral_7x1x1_stride_4": Case((2, 32, 16, 3, 5), 64, (7, 1, 1), (4, 1, 1)),
    "one_frame": Case((2, 16, 1, 5, 5), 24, (3, 3, 3)),
    "all_ones": Case((1, 1, 1, 1, 1), 1),
    "odd_channels": Case((1, 5, 3, 7, 5), 7, (3, 3, 3), (2, 2, 1)),
    "even_kernel_no_padding": Case((1, 12, 4, 6, 7), 33, (2, 2, 4), (1, 3, 2), (0, 0, 0)),
    "padding_wider_than_kernel": Case((1, 8, 2, 3, 3), 8, (1, 1, 1), (1, 1, 1), (2, 1, 3)),
    "empty_batch": Case((0, 8, 2, 3, 3), 16, (1, 3, 3)),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def make_inputs(case, device="cpu", dtype=torch.float32, residual=True, requires_grad=False):
    """x, weight, bias and residual with entries of unit size, on the device, in the layout the kernels like."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    def on_device(tensor, dtype):
        return tensor.to(device, dtype).requires_grad_(requires_grad)

    layout = {"memory_format": torch.channels_last_3d}
    x, weight = random(*case.x).to(**layout), random(case.out_channels, case.x[1], *case.kernel).to(**layout)
    y_shape = F.conv3d(x.to("meta"), weight.to("meta"), None, case.stride, case.padding).shape
    bias_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        on_device(x, dtype),
        on_device(weight, dtype),
        on_device(random(case.out_channels), bias_dtype),
        on_device(random(*y_shape).to(**layout), dtype) if residual else None,
    )


def expected(x, weight, bias, residual, case, relu=True):
    """Plain PyTorch in float64."""
    y = F.conv3d(x.double(), weight.double(), None if bias is None else bias.double(), case.stride, case.padding)
    y = y if residual is None else y + residual.double()
    return y.relu() if relu else y


def call(x, weight, bias, residual, case, relu=True, out=None):
    return ops.conv3d_bn_relu(x, weight, bias, residual, stride=case.stride, padding=case.padding, relu=relu, out=out)


def assert_like(actual, reference, case):
    # Inputs have unit deviation, so the sum of the terms, bias and residual has the square root of their number. The
    # reference operator rounds twice to a 16-bit dtype, the kernels once.
    scale = math.sqrt(case.terms + 2)
    assert_close(actual.double(), reference, **tolerance(actual.dtype, case.terms, roundings=2, scale=scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@cases
def test_equals_plain_pytorch_in_float64(case, dtype, device):
    inputs = make_inputs(case, device, dtype)
    y = call(*inputs, case)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    assert_like(y, expected(*inputs, case), case)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_every_part_of_the_epilogue_is_optional(with_bias, with_residual, relu, device):
    case = CASES["slow_1x3x3_stride_2"]
    x, weight, bias, residual = make_inputs(case, device)
    inputs = x, weight, bias if with_bias else None, residual if with_residual else None
    assert_like(call(*inputs, case, relu), expected(*inputs, case, relu), case)


def test_float64_is_exact_on_a_cpu():
    inputs = make_inputs(CASES["odd_channels"], dtype=torch.float64)
    assert_close(call(*inputs, CASES["odd_channels"]), expected(*inputs, CASES["odd_channels"]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "every_second_frame", "slice_of_channels"])
@pytest.mark.parametrize("name", ["slow_1x1x1_80_channels", "slow_stem_1x7x7", "odd_channels"])
def test_any_layout_of_x(name, layout, device):
    case = CASES[name]
    x, weight, bias, residual = make_inputs(case, device)
    n, c, t, h, w = case.x
    if layout == "contiguous":
        x = x.contiguous()
    elif layout == "transposed":
        x = x.transpose(3, 4).contiguous().transpose(3, 4)
    elif layout == "every_second_frame":
        wide = torch.full((n, c, 2 * t, h, w), torch.nan, device=device).to(memory_format=torch.channels_last_3d)
        wide[:, :, ::2] = x
        x = wide[:, :, ::2]
    else:
        wide = torch.full((n, c + 16, t, h, w), torch.nan, device=device).to(memory_format=torch.channels_last_3d)
        wide[:, 8 : 8 + c] = x
        x = wide[:, 8 : 8 + c]
    assert_like(call(x, weight, bias, residual, case), expected(x, weight, bias, residual, case), case)


@pytest.mark.parametrize("offset", [0, 1, 64])
def test_a_slice_of_a_wider_buffer_is_filled_and_nothing_else(offset, device):
    case = CASES["lateral_5x1x1_stride_8"]
    inputs = make_inputs(case, device)
    reference = expected(*inputs, case)
    n, k, t, h, w = reference.shape
    buffer = torch.full((n, k + 66, t, h, w), 7.0, device=device).to(memory_format=torch.channels_last_3d)
    out = buffer[:, offset : offset + k]
    assert call(*inputs, case, out=out) is out
    assert_like(out, reference, case)
    assert (buffer[:, :offset] == 7).all()
    assert (buffer[:, offset + k :] == 7).all()


def test_residual_can_be_a_slice_and_the_output_can_replace_it(device):
    case = CASES["slow_1x1x1_80_channels"]
    x, weight, bias, residual = make_inputs(case, device)
    reference = expected(x, weight, bias, residual, case)
    buffer = torch.cat([residual, residual], 1).to(memory_format=torch.channels_last_3d)
    both = buffer[:, 64:]
    call(x, weight, bias, both, case, out=both)
    assert_like(both, reference, case)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_visible(value, device):
    x = torch.zeros(1, 8, 1, 2, 2, device=device)
    x[0, 3, 0, 1, 1] = value
    y = ops.conv3d_bn_relu(x.bfloat16(), torch.ones(8, 8, 1, 1, 1, device=device).bfloat16())
    assert not y[..., 1, 1].isfinite().any()
    assert (y[..., 0, 0] == 0).all()


@pytest.mark.parametrize("relu", [False, True])
@cases
def test_gradients_equal_autograd_of_plain_pytorch_in_float64(case, relu, device):
    inputs = make_inputs(case, device, requires_grad=True)
    y, reference = call(*inputs, case, relu), expected(*inputs, case, relu)
    # A ReLU on either side of zero has another gradient: leave those elements out.
    grad = torch.randn_like(reference) * (reference.abs() > 1e-3)
    actual = torch.autograd.grad(y, inputs, grad.float())
    for gradient, gradient_of_reference in zip(actual, torch.autograd.grad(reference, inputs, grad), strict=True):
        terms = max(case.terms, y[:, 0].numel(), case.out_channels * case.terms // case.x[1])
        assert_close(gradient, gradient_of_reference.float(), **tolerance(torch.float32, terms))


def test_gradients_are_differentiable_again():
    case = Case((1, 2, 2, 3, 3), 3, (1, 3, 3))
    inputs = make_inputs(case, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda *tensors: call(*tensors, case), inputs)


def test_out_refuses_inputs_that_want_gradients(device):
    case = CASES["one_frame"]
    inputs = make_inputs(case, device, requires_grad=True)
    with pytest.raises(RuntimeError, match="gradients"):
        call(*inputs, case, out=torch.empty_like(inputs[3]))


def test_opcheck(device):
    case = CASES["lateral_7x1x1_stride_4"]
    for requires_grad in (False, True):
        inputs = make_inputs(case, device, requires_grad=requires_grad)
        torch.library.opcheck(OPERATOR, (*inputs, case.stride, case.padding, True, False))
    inputs = make_inputs(case, device)
    torch.library.opcheck(OPERATOR_OUT, (*inputs, case.stride, case.padding, True, False, torch.empty_like(inputs[3])))


def test_autocast_casts_activations_and_keeps_the_bias(device):
    case = CASES["slow_1x1x1_80_channels"]
    x, weight, bias, residual = make_inputs(case, device, requires_grad=True)
    with torch.autocast(device.type, torch.bfloat16):
        y = call(x, weight, bias, residual, case)
        out = call(x.detach(), weight.detach(), bias.detach(), None, case, out=torch.empty_like(residual))
    assert y.dtype == torch.bfloat16
    assert out.dtype == torch.float32
    rounded = [tensor.bfloat16() for tensor in (x, weight)], residual.bfloat16()
    assert_like(y, expected(*rounded[0], bias, rounded[1], case), case)
    y.sum().backward()
    assert {tensor.grad.dtype for tensor in (x, weight, bias, residual)} == {torch.float32}


def test_compiles_to_one_graph_also_with_out(device):
    case = CASES["slow_3x1x1"]
    inputs = make_inputs(case, device)

    def both(x, weight, bias, residual):
        buffer = torch.zeros_like(residual)
        y = call(x, weight, bias, residual, case)
        return y, call(x, weight, bias, residual, case, out=buffer)

    for actual in torch.compile(both, fullgraph=True, backend="aot_eager")(*inputs):
        assert_like(actual, expected(*inputs, case), case)


def test_stays_one_node_in_an_exported_program_with_dynamic_batch():
    class Block(torch.nn.Module):
        def forward(self, x):
            return ops.conv3d_bn_relu(x, torch.ones(4, 8, 1, 3, 3), padding=(0, 1, 1))

    batch, frames = torch.export.Dim("batch"), torch.export.Dim("frames")
    program = torch.export.export(Block(), (torch.randn(2, 8, 4, 5, 5),), dynamic_shapes=({0: batch, 2: frames},))
    assert [node.target for node in program.graph.nodes].count(OPERATOR) == 1
    x = torch.randn(3, 8, 6, 5, 5)
    assert_close(program.module()(x), Block()(x))


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_folded_batch_norm_equals_batch_norm_in_evaluation_mode(affine, with_bias):
    conv = torch.nn.Conv3d(8, 5, (1, 3, 3), bias=with_bias).double()
    bn = torch.nn.BatchNorm3d(5, affine=affine).double().eval()
    for tensor in (bn.running_mean, bn.weight, bn.bias):
        if tensor is not None:
            torch.nn.init.normal_(tensor)
    bn.running_var.uniform_(0.1, 2)
    x = torch.randn(2, 8, 2, 6, 6).double()
    weight, bias = ops.fold_batch_norm(conv.weight, conv.bias, bn)
    assert_close(ops.conv3d_bn_relu(x, weight, bias, relu=False), bn(conv(x)))
    assert ops.fold_batch_norm(conv.weight.half(), None, bn)[0].dtype == torch.float32


X, WEIGHT = (2, 8, 4, 5, 5), (16, 8, 1, 3, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(8, 4, 5, 5)}, r"x must be \(N, C, T, H, W\), got \(8, 4, 5, 5\)"),
        (
            {"weight": torch.zeros(16, 8, 3, 3)},
            r"weight must be \(K, 8, kernel_t, kernel_h, kernel_w\), got \(16, 8, 3",
        ),
        ({"weight": torch.zeros(16, 7, 1, 3, 3)}, r"weight must be \(K, 8, .*got \(16, 7, 1, 3, 3\)"),
        ({"weight": torch.zeros(WEIGHT).half()}, "weight must .*dtype of x"),
        ({"weight": torch.zeros(16, 8, 5, 3, 3)}, "kernel must fit into the padded input, got kernel 5 for 4 elements"),
        ({"bias": torch.zeros(15)}, r"bias must be \(16,?\), got \(15,?\)"),
        ({"bias": torch.zeros(16).half()}, "bias must be .*float32"),
        ({"residual": torch.zeros(2, 16, 4, 5, 5)}, r"residual must be \(2, 16, 4, 3, 3\), got \(2, 16, 4, 5, 5\)"),
        ({"residual": torch.zeros(2, 16, 4, 3, 3).half()}, "residual must .*dtype of x"),
        ({"stride": (0, 1, 1)}, r"stride must be three positive integers, got \(0, 1, 1\)"),
        ({"padding": (0, -1, 0)}, r"padding must be three integers of at least 0, got \(0, -1, 0\)"),
        ({"out": torch.zeros(2, 16, 4, 5, 5)}, r"out must be \(2, 16, 4, 3, 3\), got \(2, 16, 4, 5, 5\)"),
        ({"out": torch.zeros(2, 16, 4, 3, 3).half()}, "out must .*dtype of x"),
        ({"out": torch.zeros(2, 16, 4, 3, 3)}, "out must be channels_last_3d"),
        (
            {"x": torch.zeros(X, dtype=torch.int64), "weight": torch.zeros(WEIGHT, dtype=torch.int64)},
            "x must be .*float",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(change, message, device):
    arguments = {"x": torch.zeros(X), "weight": torch.zeros(WEIGHT)} | change
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match="conv3d_bn_relu: .*" + message):
        ops.conv3d_bn_relu(**arguments)


@pytest.mark.parametrize("name", ["weight", "bias", "residual", "out"])
def test_tensors_on_two_devices_are_named(name):
    arguments = {
        "x": torch.zeros(X, device="meta"),
        "weight": torch.zeros(WEIGHT, device="meta"),
        "bias": torch.zeros(16, device="meta"),
        "residual": torch.zeros(2, 16, 4, 3, 3, device="meta"),
        "out": torch.zeros(2, 16, 4, 3, 3, device="meta").to(memory_format=torch.channels_last_3d),
    }
    arguments[name] = torch.zeros(arguments[name].shape)
    with pytest.raises(RuntimeError, match=f"conv3d_bn_relu: {name} must be on the device of x, meta, got cpu"):
        ops.conv3d_bn_relu(**arguments)


@pytest.mark.cuda
def test_bad_devices_and_layouts_are_named_on_cuda():
    x, weight = torch.zeros(X, device="cuda"), torch.zeros(WEIGHT, device="cuda")
    for change, message in (
        ({"weight": weight.cpu()}, "weight must be on the device of x"),
        ({"bias": torch.zeros(16)}, "bias must be float32 on the device of x"),
        ({"x": x.double(), "weight": weight.double()}, "x must be float32, float16 or bfloat16 on CUDA"),
        ({"out": torch.empty(2, 16, 4, 3, 3, device="cuda")}, "out must be channels_last_3d"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.conv3d_bn_relu(**({"x": x, "weight": weight} | change))


def test_torchs_newer_switch_for_tf32_is_followed_also_when_compiling():
    conv = torch.backends.cudnn.conv
    try:
        for precision in ("tf32", "ieee"):
            conv.fp32_precision = precision
            assert common._convolutions_use_tf32() == (precision == "tf32")
            compiled = torch.compile(lambda x: x + common._convolutions_use_tf32(), fullgraph=True, backend="eager")
            assert compiled(torch.zeros(())) == (precision == "tf32")
            torch._dynamo.reset()
    finally:
        conv.fp32_precision = "none"


@pytest.mark.cuda
def test_tf32_is_used_only_where_torch_allows_it(monkeypatch):
    case = CASES["slow_1x3x3_stride_2"]
    inputs = make_inputs(case, "cuda")
    reference = expected(*inputs, case)
    error = {}
    for allowed in (False, True):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        error[allowed] = (call(*inputs, case) - reference).abs().max().item()
    assert error[False] < 1e-4 < error[True] < 0.1
