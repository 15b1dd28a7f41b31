"""conv3d_bn_relu_pair against plain PyTorch in float64: values, gradients, layouts, registrations, messages."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from tolerances import tolerance
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from slowfast_ext import ops

OPERATOR = torch.ops.slowfast_ext.conv3d_bn_relu_pair.default
OPERATOR_OUT = torch.ops.slowfast_ext.conv3d_bn_relu_pair.out


@dataclass(frozen=True)
class Convolution:
    out_channels: int
    kernel: tuple = (1, 1, 1)
    stride: tuple = (1, 1, 1)
    padding: tuple = (0, 0, 0)


@dataclass(frozen=True)
class Case:
    x: tuple
    first: Convolution
    shortcut: Convolution

    @property
    def convolutions(self):
        return self.first, self.shortcut

    @property
    def terms(self):
        return [self.x[1] * math.prod(convolution.kernel) for convolution in self.convolutions]

    @property
    def geometry(self):
        """Keyword arguments of the operator."""
        return {
            "stride": self.first.stride,
            "padding": self.first.padding,
            "stride_shortcut": self.shortcut.stride,
            "padding_shortcut": self.shortcut.padding,
        }


IN_TIME = {"kernel": (3, 1, 1), "padding": (1, 0, 0)}
STRIDE_2 = {"stride": (1, 2, 2)}
CASES = {
    "slow_res2": Case((2, 80, 2, 7, 5), Convolution(64), Convolution(256)),
    "slow_res3": Case((1, 64, 2, 8, 8), Convolution(32), Convolution(128, **STRIDE_2)),
    "slow_res4_in_time": Case((1, 64, 4, 5, 6), Convolution(24, **IN_TIME), Convolution(96, **STRIDE_2)),
    "fast_res2": Case((1, 8, 8, 7, 7), Convolution(8, **IN_TIME), Convolution(32)),
    "fast_res3": Case((2, 32, 5, 7, 9), Convolution(16, **IN_TIME), Convolution(64, **STRIDE_2)),
    "basic_block": Case(
        (1, 16, 2, 7, 8), Convolution(24, (1, 3, 3), (1, 2, 2), (0, 1, 1)), Convolution(24, **STRIDE_2)
    ),
    "one_frame": Case((2, 16, 1, 5, 5), Convolution(24, **IN_TIME), Convolution(8)),
    "all_ones": Case((1, 1, 1, 1, 1), Convolution(1), Convolution(1)),
    "odd_channels": Case((1, 5, 3, 7, 5), Convolution(7, (3, 3, 3), (2, 2, 1), (1, 1, 1)), Convolution(3, **STRIDE_2)),
    "shortcut_larger_than_y": Case((1, 12, 3, 6, 7), Convolution(4, (2, 2, 4), (1, 3, 2)), Convolution(33)),
    "empty_batch": Case((0, 8, 2, 4, 4), Convolution(8, **IN_TIME), Convolution(32, **STRIDE_2)),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def make_inputs(case, device="cpu", dtype=torch.float32, requires_grad=False):
    """x, weight, bias, weight_shortcut and bias_shortcut of unit size, in the layout the kernels like."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape, dtype=dtype):
        tensor = torch.randn(shape, generator=generator).to(device, dtype)
        tensor = tensor.to(memory_format=torch.channels_last_3d) if len(shape) == 5 else tensor
        return tensor.requires_grad_(requires_grad)

    bias_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = [random(*case.x)]
    for convolution in case.convolutions:
        tensors.append(random(convolution.out_channels, case.x[1], *convolution.kernel))
        tensors.append(random(convolution.out_channels, dtype=bias_dtype))
    return tensors


def expected(x, weight, bias, weight_shortcut, bias_shortcut, case, relu=True, relu_shortcut=False):
    """Plain PyTorch in float64."""
    results = []
    for convolution, weight, bias, relu in (  # noqa: B020
        (case.first, weight, bias, relu),
        (case.shortcut, weight_shortcut, bias_shortcut, relu_shortcut),
    ):
        bias = None if bias is None else bias.double()
        y = F.conv3d(x.double(), weight.double(), bias, convolution.stride, convolution.padding)
        results.append(y.relu() if relu else y)
    return results


def make_outs(inputs, case):
    """Float32 tensors full of NaN, for both results."""
    return [
        torch.full_like(result, torch.nan, dtype=torch.float32, memory_format=torch.channels_last_3d)
        for result in expected(*inputs, case)
    ]


def assert_like(actual, reference, case):
    # The reference operator rounds twice to a 16-bit dtype, the kernels once.
    for result, expected_result, terms in zip(actual, reference, case.terms, strict=True):
        limits = tolerance(result.dtype, terms, roundings=2, scale=math.sqrt(terms + 1))
        assert_close(result.double(), expected_result, **limits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@cases
def test_equals_plain_pytorch_in_float64(case, dtype, device):
    inputs = make_inputs(case, device, dtype)
    results = ops.conv3d_bn_relu_pair(*inputs, **case.geometry)
    for result in results:
        assert result.dtype == dtype
        assert result.is_contiguous(memory_format=torch.channels_last_3d)
    assert_like(results, expected(*inputs, case), case)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("relu_shortcut", [False, True])
@pytest.mark.parametrize("with_bias", [(False, True), (True, False), (False, False)])
def test_bias_and_relu_of_each_are_optional(with_bias, relu_shortcut, relu, device):
    case = CASES["fast_res3"]
    x, weight, bias, weight_shortcut, bias_shortcut = make_inputs(case, device)
    bias, bias_shortcut = (bias if with_bias[0] else None), (bias_shortcut if with_bias[1] else None)
    inputs = x, weight, bias, weight_shortcut, bias_shortcut
    flags = {"relu": relu, "relu_shortcut": relu_shortcut}
    assert_like(ops.conv3d_bn_relu_pair(*inputs, **case.geometry, **flags), expected(*inputs, case, **flags), case)


def test_one_number_stands_for_all_three(device):
    case = Case((1, 8, 5, 5, 5), Convolution(8, (3, 3, 3), (2, 2, 2), (1, 1, 1)), Convolution(16, (1, 1, 1), (2, 2, 2)))
    inputs = make_inputs(case, device)
    numbers = {"stride": 2, "padding": 1, "stride_shortcut": 2, "padding_shortcut": 0}
    assert_like(ops.conv3d_bn_relu_pair(*inputs, **numbers), expected(*inputs, case), case)


def test_float64_is_exact_on_a_cpu():
    case = CASES["odd_channels"]
    inputs = make_inputs(case, dtype=torch.float64)
    results = ops.conv3d_bn_relu_pair(*inputs, **case.geometry)
    assert_close(list(results), expected(*inputs, case), rtol=1e-12, atol=1e-12)


def test_the_reference_for_other_devices_equals_the_operator():
    case = CASES["slow_res4_in_time"]
    inputs = make_inputs(case)
    reference = ops.conv3d_bn_relu_pair_reference(*inputs, *case.geometry.values(), True, False, False)
    assert_like(reference, expected(*inputs, case), case)


@pytest.mark.parametrize("layout", ["contiguous", "every_second_frame", "slice_of_channels"])
@pytest.mark.parametrize("name", ["slow_res2", "odd_channels"])
def test_any_layout_of_the_inputs(name, layout, device):
    case = CASES[name]
    x, weight, bias, weight_shortcut, bias_shortcut = make_inputs(case, device)
    n, c, t, h, w = x.shape
    if layout == "contiguous":
        x = x.contiguous()
    else:
        frames = layout == "every_second_frame"
        shape = (n, c, 2 * t, h, w) if frames else (n, c + 16, t, h, w)
        wide = torch.full(shape, torch.nan, device=device).to(memory_format=torch.channels_last_3d)
        x = (wide[:, :, ::2] if frames else wide[:, 8 : 8 + c]).copy_(x)
    inputs = x, weight.contiguous(), bias, weight_shortcut.contiguous(), bias_shortcut
    assert_like(ops.conv3d_bn_relu_pair(*inputs, **case.geometry), expected(*inputs, case), case)


@pytest.mark.parametrize("offset", [0, 1, 64])
def test_slices_of_wider_buffers_are_filled_and_nothing_else(offset, device):
    case = CASES["fast_res3"]
    inputs = make_inputs(case, device)
    reference = expected(*inputs, case)
    buffers, outs = [], []
    for result in reference:
        n, k, *rest = result.shape
        buffers.append(torch.full((n, k + 66, *rest), 7.0, device=device).to(memory_format=torch.channels_last_3d))
        outs.append(buffers[-1][:, offset : offset + k])
    results = ops.conv3d_bn_relu_pair(*inputs, **case.geometry, out=outs[0], out_shortcut=outs[1])
    assert results[0] is outs[0]
    assert results[1] is outs[1]
    assert_like(results, reference, case)
    for buffer, out in zip(buffers, outs, strict=True):
        assert (buffer[:, :offset] == 7).all()
        assert (buffer[:, offset + out.shape[1] :] == 7).all()


def test_both_results_may_be_slices_of_one_buffer(device):
    case = CASES["fast_res2"]
    inputs = make_inputs(case, device)
    buffer = torch.full((1, 40, 8, 7, 7), torch.nan, device=device).to(memory_format=torch.channels_last_3d)
    outs = {"out": buffer[:, :8], "out_shortcut": buffer[:, 8:]}
    ops.conv3d_bn_relu_pair(*inputs, **case.geometry, **outs)
    assert_like(buffer.tensor_split([8], 1), expected(*inputs, case), case)


@pytest.mark.parametrize("relus", [(True, False), (False, True)])
@cases
def test_gradients_equal_autograd_of_plain_pytorch_in_float64(case, relus, device):
    inputs = make_inputs(case, device, requires_grad=True)
    relu, relu_shortcut = relus
    results = ops.conv3d_bn_relu_pair(*inputs, **case.geometry, relu=relu, relu_shortcut=relu_shortcut)
    reference = expected(*inputs, case, relu, relu_shortcut)
    # A ReLU on either side of zero has another gradient: leave those elements out.
    grads = [torch.randn_like(result) * (result.abs() > 1e-3) for result in reference]
    actual = torch.autograd.grad(results, inputs, [grad.float() for grad in grads])
    for gradient, gradient_of_reference in zip(actual, torch.autograd.grad(reference, inputs, grads), strict=True):
        sums = [result[:, 0].numel() for result in results]
        back = [convolution.out_channels * math.prod(convolution.kernel) for convolution in case.convolutions]
        terms = max(*case.terms, *sums, sum(back))
        assert_close(gradient, gradient_of_reference.float(), **tolerance(torch.float32, terms))


@pytest.mark.parametrize("wanted", range(5))
def test_a_gradient_wanted_alone_is_the_same(wanted):
    case = CASES["fast_res3"]
    inputs = make_inputs(case, requires_grad=True)
    everything = torch.autograd.grad(sum(map(torch.sum, ops.conv3d_bn_relu_pair(*inputs, **case.geometry))), inputs)
    inputs = [tensor.detach().requires_grad_(index == wanted) for index, tensor in enumerate(inputs)]
    alone = torch.autograd.grad(sum(map(torch.sum, ops.conv3d_bn_relu_pair(*inputs, **case.geometry))), inputs[wanted])
    assert_close(alone[0], everything[wanted])


def test_a_result_that_is_not_used_has_no_gradient_to_give():
    case = CASES["fast_res3"]
    inputs = make_inputs(case, requires_grad=True)
    _, shortcut = ops.conv3d_bn_relu_pair(*inputs, **case.geometry)
    _, weight_grad, bias_grad, weight_shortcut_grad, _ = torch.autograd.grad(shortcut.sum(), inputs)
    assert not weight_grad.any()
    assert not bias_grad.any()
    assert weight_shortcut_grad.any()


def test_gradients_are_differentiable_again():
    case = Case((1, 2, 2, 3, 3), Convolution(3, **IN_TIME), Convolution(2, **STRIDE_2))
    inputs = make_inputs(case, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda *tensors: ops.conv3d_bn_relu_pair(*tensors, **case.geometry, relu_shortcut=True), inputs
    )


def test_out_refuses_inputs_that_want_gradients(device):
    case = CASES["one_frame"]
    inputs = make_inputs(case, device, requires_grad=True)
    out, out_shortcut = make_outs(inputs, case)
    with pytest.raises(RuntimeError, match="conv3d_bn_relu_pair: with out, no argument may require gradients"):
        ops.conv3d_bn_relu_pair(*inputs, **case.geometry, out=out, out_shortcut=out_shortcut)


def test_opcheck(device):
    case = CASES["slow_res4_in_time"]
    rest = (*case.geometry.values(), True, False, False)
    for requires_grad in (False, True):
        torch.library.opcheck(OPERATOR, (*make_inputs(case, device, requires_grad=requires_grad), *rest))
    inputs = make_inputs(case, device)
    torch.library.opcheck(OPERATOR_OUT, (*inputs, *rest, *make_outs(inputs, case)))


def test_autocast_casts_x_and_weights_and_keeps_biases_and_outs(device):
    case = CASES["slow_res2"]
    inputs = make_inputs(case, device, requires_grad=True)
    detached = [tensor.detach() for tensor in inputs]
    outs = make_outs(detached, case)
    halves = [out.bfloat16() for out in outs]
    with torch.autocast(device.type, torch.bfloat16):
        results = ops.conv3d_bn_relu_pair(*inputs, **case.geometry)
        ops.conv3d_bn_relu_pair(*detached, **case.geometry, out=outs[0], out_shortcut=outs[1])
        ops.conv3d_bn_relu_pair(*detached, **case.geometry, out=halves[0], out_shortcut=halves[1])
    assert {result.dtype for result in results} == {torch.bfloat16}
    assert_like(outs, expected(*detached, case), case)
    x, weight, bias, weight_shortcut, bias_shortcut = inputs
    rounded = x.bfloat16(), weight.bfloat16(), bias, weight_shortcut.bfloat16(), bias_shortcut
    assert_like(results, expected(*rounded, case), case)
    assert_like(halves, expected(*rounded, case), case)
    sum(result.sum() for result in results).backward()
    assert {tensor.grad.dtype for tensor in inputs} == {torch.float32}


def test_compiles_to_one_graph_also_with_out(device):
    case = CASES["fast_res2"]
    inputs = make_inputs(case, device)

    def both(*inputs):
        results = ops.conv3d_bn_relu_pair(*inputs, **case.geometry)
        buffer = torch.zeros_like(torch.cat(results, 1))
        parts = {"out": buffer[:, :8], "out_shortcut": buffer[:, 8:]}
        ops.conv3d_bn_relu_pair(*inputs, **case.geometry, **parts)
        return results, buffer

    results, buffer = torch.compile(both, fullgraph=True, backend="aot_eager")(*inputs)
    for actual in (results, buffer.tensor_split([8], 1)):
        assert_like(actual, expected(*inputs, case), case)


def test_stays_one_node_in_an_exported_program_with_dynamic_batch():
    class Block(torch.nn.Module):
        def forward(self, x):
            weights = torch.ones(4, 8, 3, 1, 1), None, torch.ones(6, 8, 1, 1, 1), None
            return ops.conv3d_bn_relu_pair(x, *weights, padding=(1, 0, 0), stride_shortcut=(1, 2, 2))

    batch = torch.export.Dim("batch")
    program = torch.export.export(Block(), (torch.randn(2, 8, 4, 5, 5),), dynamic_shapes=({0: batch},))
    assert [node.target for node in program.graph.nodes].count(OPERATOR) == 1
    x = torch.randn(3, 8, 4, 5, 5)
    assert_close(program.module()(x), Block()(x))


class RecordOperators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def test_it_is_one_call_of_one_operator(device):
    inputs = make_inputs(CASES["slow_res2"], device)
    with RecordOperators() as recorded:
        ops.conv3d_bn_relu_pair(*inputs, **CASES["slow_res2"].geometry)
    assert recorded.names == ["slowfast_ext::conv3d_bn_relu_pair"]


X, WEIGHT, SHORTCUT = (2, 8, 4, 5, 5), (16, 8, 3, 1, 1), (6, 8, 1, 1, 1)
Y, Y_SHORTCUT = (2, 16, 2, 5, 5), (2, 6, 4, 3, 3)


def arguments_with(change, device):
    """Arguments of a call that is right but for ``change``."""
    arguments = {
        "x": torch.zeros(X),
        "weight": torch.zeros(WEIGHT),
        "bias": None,
        "weight_shortcut": torch.zeros(SHORTCUT),
        "bias_shortcut": None,
        "stride_shortcut": (1, 2, 2),
    }
    arguments |= change
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def test_the_arguments_that_are_changed_below_are_right(device):
    y, shortcut = ops.conv3d_bn_relu_pair(**arguments_with({}, device))
    assert (tuple(y.shape), tuple(shortcut.shape)) == (Y, Y_SHORTCUT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(8, 4, 5, 5)}, r"x must be \(N, C, T, H, W\), got \(8, 4, 5, 5\)"),
        ({"weight": torch.zeros(16, 7, 3, 1, 1)}, r"weight must be \(K, 8, .*got \(16, 7, 3, 1, 1\)"),
        ({"weight_shortcut": torch.zeros(6, 8, 1, 1)}, r"weight_shortcut must be \(K, 8, .*got \(6, 8, 1, 1\)"),
        ({"weight": torch.zeros(WEIGHT).half()}, "weight must .*dtype of x"),
        ({"weight_shortcut": torch.zeros(SHORTCUT).half()}, "weight_shortcut must .*dtype of x"),
        ({"weight": torch.zeros(16, 8, 5, 1, 1)}, "weight's kernel must fit .*, got kernel 5 for 4 elements"),
        (
            {"weight_shortcut": torch.zeros(6, 8, 1, 7, 1), "padding_shortcut": (0, 0, 1)},
            "weight_shortcut's kernel must fit into the padded input, got kernel 7 for 5 elements in dimension 3",
        ),
        ({"bias": torch.zeros(15)}, r"bias must be \(16,?\), got \(15,?\)"),
        ({"bias_shortcut": torch.zeros(16)}, r"bias_shortcut must be \(6,?\), got \(16,?\)"),
        ({"bias_shortcut": torch.zeros(6).half()}, "bias_shortcut must be .*float32"),
        ({"stride": (0, 1, 1)}, r"stride must be three positive integers, got \(0, 1, 1\)"),
        ({"stride_shortcut": (1, 1, -1)}, r"stride_shortcut must be three positive integers, got \(1, 1, -1\)"),
        ({"padding": (0, -1, 0)}, r"padding must be three integers of at least 0, got \(0, -1, 0\)"),
        ({"padding_shortcut": (-1, 0, 0)}, r"padding_shortcut must be three integers of at least 0, got \(-1, 0, 0\)"),
        (
            {
                "x": torch.zeros(X).long(),
                "weight": torch.zeros(WEIGHT).long(),
                "weight_shortcut": torch.zeros(SHORTCUT).long(),
            },
            "x must be .*float",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(change, message, device):
    with pytest.raises(RuntimeError, match="conv3d_bn_relu_pair: " + message):
        ops.conv3d_bn_relu_pair(**arguments_with(change, device))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": torch.zeros(2, 16, 4, 5, 5)}, r"out must be \(2, 16, 2, 5, 5\), got \(2, 16, 4, 5, 5\)"),
        ({"out_shortcut": torch.zeros(2, 16, 2, 5, 5)}, r"out_shortcut must be \(2, 6, 4, 3, 3\), got \(2, 16, 2"),
        ({"out": torch.zeros(Y).half()}, "out must .*dtype of x"),
        ({"out_shortcut": torch.zeros(Y_SHORTCUT).half()}, "out_shortcut must .*dtype of x"),
        ({"out": torch.zeros(Y)}, "out must be channels_last_3d or a slice"),
        ({"out_shortcut": torch.zeros(Y_SHORTCUT)}, "out_shortcut must be channels_last_3d or a slice"),
        ({"out": None}, "out_shortcut must be given exactly if out is, got one without the other"),
        ({"out_shortcut": None}, "out_shortcut must be given exactly if out is, got one without the other"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_out_that_cannot_be_written_is_refused(change, message, device):
    layout = {"memory_format": torch.channels_last_3d}
    outs = {"out": torch.zeros(Y).to(**layout), "out_shortcut": torch.zeros(Y_SHORTCUT).to(**layout)}
    with pytest.raises(RuntimeError, match="conv3d_bn_relu_pair: " + message):
        ops.conv3d_bn_relu_pair(**arguments_with(outs | change, device))


@pytest.mark.parametrize("name", ["weight", "bias", "weight_shortcut", "bias_shortcut", "out", "out_shortcut"])
def test_tensors_on_two_devices_are_named(name):
    biases = {"bias": torch.zeros(16), "bias_shortcut": torch.zeros(6)}
    layout = {"memory_format": torch.channels_last_3d}
    outs = {"out": torch.zeros(Y).to(**layout), "out_shortcut": torch.zeros(Y_SHORTCUT).to(**layout)}
    arguments = arguments_with(biases | outs, "meta")
    arguments[name] = torch.zeros(arguments[name].shape)
    with pytest.raises(RuntimeError, match=f"conv3d_bn_relu_pair: {name} must be on the device of x, meta, got cpu"):
        ops.conv3d_bn_relu_pair(**arguments)
