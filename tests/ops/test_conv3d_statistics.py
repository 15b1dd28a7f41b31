"""conv3d_statistics against plain PyTorch in float64: values, layouts, registrations, messages, where it is of use."""

import importlib
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tolerances import tolerance
from torch.testing import assert_close

from slowfast_ext import ops
from slowfast_ext.models import build_model

OPERATOR = torch.ops.slowfast_ext.conv3d_statistics.default
EPSILON = 0.25
CASES = {  # x, weight, stride, padding
    "slow_1x1x1_80_channels": ((2, 80, 2, 7, 5), (64, 80, 1, 1, 1), (1, 1, 1), (0, 0, 0)),
    "slow_1x3x3_stride_2": ((1, 64, 3, 9, 10), (64, 64, 1, 3, 3), (1, 2, 2), (0, 1, 1)),
    "fast_3x1x1_8_channels": ((2, 8, 8, 7, 7), (8, 8, 3, 1, 1), (1, 1, 1), (1, 0, 0)),
    "fast_1x1x1_widens": ((1, 8, 4, 9, 9), (32, 8, 1, 1, 1), (1, 1, 1), (0, 0, 0)),
    "slow_stem_1x7x7": ((1, 3, 2, 19, 17), (64, 3, 1, 7, 7), (1, 2, 2), (0, 3, 3)),
    "one_frame": ((2, 16, 1, 5, 5), (24, 16, 3, 3, 3), (1, 1, 1), (1, 1, 1)),
    "odd_channels": ((1, 5, 3, 7, 5), (7, 5, 3, 3, 3), (2, 2, 1), (1, 1, 1)),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def make_inputs(case, device="cpu", dtype=torch.float32):
    """x and weight with entries of unit size, in the layout the kernels like."""
    generator = torch.Generator().manual_seed(0)
    tensors = (torch.randn(shape, generator=generator).to(device, dtype) for shape in case[:2])
    return [tensor.to(memory_format=torch.channels_last_3d) for tensor in tensors]


def call(x, weight, case):
    return ops.conv3d_statistics(x, weight, stride=case[2], padding=case[3], eps=EPSILON)


def assert_statistics(y, mean, variance, inverse_std):
    """Those of ``y`` as it is, in the dtype of sums.

    Each is a sum over the elements of a channel, of deviation of the largest of them, or of their squares, over the
    number of elements.
    """
    values = y.double().transpose(0, 1).flatten(1)
    exact = torch.var_mean(values, 1, correction=0)
    count, scale = values.shape[1], values.abs().max().item()
    sums = torch.float64 if y.dtype == torch.float64 else torch.float32
    for actual, expected, size in ((mean, exact[1], scale), (variance, exact[0], scale**2)):
        assert actual.shape == (1, y.shape[1])
        assert actual.dtype == sums
        assert_close(actual[0].double(), expected, **tolerance(sums, count, scale=size / math.sqrt(count)))
    assert inverse_std.dtype == sums
    expected = (variance.double() + EPSILON).rsqrt()
    assert_close(inverse_std.double(), expected, **tolerance(sums, 1, scale=expected.max().item()))


@dtypes
@cases
def test_equals_plain_pytorch_in_float64(case, dtype, device):
    x, weight = make_inputs(case, device, dtype)
    y, *statistics = call(x, weight, case)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    assert_close(
        y.double(), F.conv3d(x.double(), weight.double(), None, *case[2:]), **tolerance(dtype, weight[0].numel())
    )
    assert_statistics(y, *statistics)


def test_float64_is_exact_on_a_cpu():
    case = CASES["odd_channels"]
    x, weight = make_inputs(case, dtype=torch.float64)
    y, *statistics = call(x, weight, case)
    assert_close(y, F.conv3d(x, weight, None, *case[2:]), rtol=1e-12, atol=1e-12)
    assert_statistics(y, *statistics)


@dtypes
def test_a_mean_far_from_zero_leaves_the_variance_right(dtype, device):
    case = CASES["fast_1x1x1_widens"]
    x, weight = make_inputs(case, device, dtype)
    x[:, 0], weight[:, 0] = 1, 3000
    y, mean, variance, _ = call(x, weight, case)
    values = y.double().transpose(0, 1).flatten(1)
    # A roundoff of the mean is the least error that a deviation has, and cancels but for its square.
    expected, roundoff = values.var(1, correction=0), 3000 * 2.0**-24
    assert_close(mean[0].double(), values.mean(1), rtol=2.0**-20, atol=0)
    assert_close(variance[0].double(), expected, rtol=2.0**-10, atol=(16 * roundoff) ** 2)


def test_outputs_are_those_of_conv3d_bn_relu(device):
    case = CASES["slow_1x3x3_stride_2"]
    x, weight = make_inputs(case, device)
    plain = ops.conv3d_bn_relu(x, weight, stride=case[2], padding=case[3], relu=False)
    assert_close(call(x, weight, case)[0], plain, **tolerance(torch.float32, weight[0].numel()))


def test_the_reference_for_other_devices_equals_the_operator():
    case = CASES["slow_1x3x3_stride_2"]
    x, weight = make_inputs(case)
    y, *statistics = ops.conv3d_statistics_reference(x, weight, *case[2:], EPSILON)
    assert_close(y, call(x, weight, case)[0], **tolerance(torch.float32, weight[0].numel()))
    assert_statistics(y, *statistics)


@pytest.mark.parametrize("layout", ["contiguous", "slice_of_channels"])
@pytest.mark.parametrize("name", ["slow_1x1x1_80_channels", "odd_channels"])
def test_any_layout_of_x(name, layout, device):
    case = CASES[name]
    x, weight = make_inputs(case, device)
    expected = F.conv3d(x.double(), weight.double(), None, *case[2:])
    if layout == "contiguous":
        x = x.contiguous()
    else:
        n, c, t, h, w = x.shape
        wide = torch.full((n, c + 16, t, h, w), torch.nan, device=device).to(memory_format=torch.channels_last_3d)
        x = wide[:, 8 : 8 + c].copy_(x)
    y, *statistics = call(x, weight.contiguous(), case)
    assert_close(y.double(), expected, **tolerance(torch.float32, weight[0].numel()))
    assert_statistics(y, *statistics)


def test_one_number_serves_for_all_three_dimensions(device):
    x, weight = make_inputs(CASES["odd_channels"], device)
    results = [ops.conv3d_statistics(x, weight, stride=s, padding=p) for s, p in ((2, 1), ((2,) * 3, (1,) * 3))]
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


def test_statistics_of_no_elements_are_zero(device):
    x, weight = torch.empty(0, 8, 2, 3, 3, device=device), torch.ones(16, 8, 1, 1, 1, device=device)
    y, *statistics = ops.conv3d_statistics(x, weight, eps=0.25)
    assert y.shape == (0, 16, 2, 3, 3)
    assert [each.tolist() for each in statistics] == [[[value] * 16] for value in (0.0, 0.0, 2.0)]


def test_opcheck(device):
    case = CASES["fast_3x1x1_8_channels"]
    torch.library.opcheck(OPERATOR, (*make_inputs(case, device), *case[2:], EPSILON, False))


def test_autocast_casts_both_arguments(device):
    case = CASES["fast_3x1x1_8_channels"]
    x, weight = make_inputs(case, device)
    with torch.autocast(device.type, torch.bfloat16):
        y, *statistics = call(x, weight, case)
    assert torch.equal(y, call(x.bfloat16(), weight.bfloat16(), case)[0])
    assert_statistics(y, *statistics)


def test_compiles_to_one_graph(device):
    case = CASES["slow_1x3x3_stride_2"]
    inputs = make_inputs(case, device)
    compiled = torch.compile(lambda x, weight: call(x, weight, case), fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(*inputs), call(*inputs, case), strict=True):
        assert torch.equal(actual, expected)


X, WEIGHT = (2, 8, 4, 5, 5), (16, 8, 1, 3, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(8, 4, 5, 5)}, r"x must be \(N, C, T, H, W\), got \(8, 4, 5, 5\)"),
        ({"weight": torch.zeros(16, 7, 1, 3, 3)}, r"weight must be \(K, 8, .*got \(16, 7, 1, 3, 3\)"),
        ({"weight": torch.zeros(WEIGHT).half()}, "weight must .*dtype of x"),
        ({"weight": torch.zeros(16, 8, 5, 3, 3)}, "kernel must fit into the padded input, got kernel 5 for 4 elements"),
        ({"stride": (0, 1, 1)}, r"stride must be three positive integers, got \(0, 1, 1\)"),
        ({"padding": (0, -1, 0)}, r"padding must be three integers of at least 0, got \(0, -1, 0\)"),
        ({"eps": -1.0}, "eps must be at least 0, got -1.0"),
        ({"x": torch.zeros(X).long(), "weight": torch.zeros(WEIGHT).long()}, "x must be .*float"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(change, message, device):
    arguments = {"x": torch.zeros(X), "weight": torch.zeros(WEIGHT)} | change
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match="conv3d_statistics: .*" + message):
        ops.conv3d_statistics(**arguments)


@pytest.mark.cuda
def test_bad_devices_and_dtypes_are_named_on_cuda():
    x, weight = torch.zeros(X, device="cuda"), torch.zeros(WEIGHT, device="cuda")
    for change, message in (
        ({"weight": weight.cpu()}, "weight must be on the device of x"),
        ({"x": x.double(), "weight": weight.double()}, "x must be float32, float16 or bfloat16 on CUDA"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.conv3d_statistics(**({"x": x, "weight": weight} | change))


@pytest.mark.cuda
def test_the_same_bits_every_time_on_cuda():
    case = ((2, 16, 8, 28, 28), (64, 16, 1, 1, 1), (1, 1, 1), (0, 0, 0))
    first, *others = (call(*make_inputs(case, "cuda", torch.bfloat16), case) for _ in range(4))
    for other in others:
        assert all(torch.equal(one, another) for one, another in zip(first, other, strict=True))


def pretend_there_is_a_gpu(monkeypatch, capability=(9, 0), multiprocessors=132):
    properties = SimpleNamespace(major=capability[0], minor=capability[1], multi_processor_count=multiprocessors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    module = importlib.import_module("slowfast_ext.ops.paper_times")
    unavailable_reason = module.unavailable_reason
    monkeypatch.setattr(module, "unavailable_reason", lambda device: unavailable_reason(device) if device else None)


def test_r50_4x16_gains_in_as_many_layers_as_the_docstring_says(monkeypatch):
    pretend_there_is_a_gpu(monkeypatch)
    with torch.device("meta"):
        model = build_model("slowfast_r50_4x16x1_256e_kinetics400_rgb")
        clips = torch.empty(8, 3, 32, 224, 224)
    reasons = []

    def ask(layer, inputs, output):
        conv = layer.conv
        geometry = {"stride": conv.stride, "padding": conv.padding}
        reasons.append(ops.conv3d_statistics_reason_against(inputs[0].shape, conv.weight.shape, **geometry))

    for module in model.modules():
        if getattr(module, "bn", None) is not None:
            module.register_forward_hook(ask)
    model(clips)
    assert (len(reasons), reasons.count(None)) == (106, 33)


FAST_RES2, SLOW_RES2, SLOW_RES4 = (8, 32, 32, 56, 56), (8, 64, 4, 56, 56), (8, 256, 4, 14, 14)


@pytest.mark.parametrize(
    ("x", "weight", "options", "useful"),
    [
        ((8, 8, 32, 56, 56), (32, 8, 1, 1, 1), {}, True),
        (SLOW_RES2, (256, 64, 1, 1, 1), {}, True),
        ((8, 256, 4, 56, 56), (64, 256, 1, 1, 1), {}, True),
        (FAST_RES2, (64, 32, 1, 1, 1), {"stride": (1, 2, 2)}, True),
        (SLOW_RES2, (64, 64, 1, 3, 3), {"padding": (0, 1, 1)}, False),  # reads x through L2 for each tap
        (FAST_RES2, (8, 32, 3, 1, 1), {"padding": (1, 0, 0)}, False),
        (SLOW_RES4, (1024, 256, 1, 1, 1), {}, False),  # bound by operations
        (SLOW_RES4, (256, 256, 1, 3, 3), {"padding": (0, 1, 1)}, False),
        ((1, 8, 1, 4, 4), (512, 8, 1, 1, 1), {}, False),  # a few blocks, of which each reads its weights
    ],
)
def test_layers_bound_by_memory_gain(x, weight, options, useful, monkeypatch):
    pretend_there_is_a_gpu(monkeypatch)
    reason = ops.conv3d_statistics_reason_against(x, weight, **options)
    assert (reason is None) == useful
    assert useful or "times as long as cuDNN and a pass" in reason


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "torch.float16 and torch.bfloat16, not for torch.float64"),
        ({"x": (8, 3, 4, 224, 224), "weight": (64, 3, 1, 1, 1)}, "3 channels of torch.bfloat16 do not fill 16 bytes"),
        ({"x": (0, 8, 4, 9, 9)}, "times as long"),
        ({"device": "cpu"}, "CUDA-only"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_convolution_that_is_not_served_gets_a_reason(change, message, monkeypatch):
    pretend_there_is_a_gpu(monkeypatch)
    arguments = {"x": (8, 8, 32, 56, 56), "weight": (32, 8, 1, 1, 1)} | change
    assert message in ops.conv3d_statistics_reason_against(**arguments)


def test_three_products_a_term_are_of_use_less_often(monkeypatch):
    pretend_there_is_a_gpu(monkeypatch)
    x, weight = (8, 256, 4, 56, 56), (64, 256, 1, 1, 1)
    reasons = {
        allow_tf32: ops.conv3d_statistics_reason_against(x, weight, dtype=torch.float32, allow_tf32=allow_tf32)
        for allow_tf32 in (False, True)
    }
    assert reasons[True] is None
    assert reasons[False] is not None


def test_a_tile_costs_the_same_however_few_of_its_channels_there_are(monkeypatch):
    pretend_there_is_a_gpu(monkeypatch)
    reasons = [
        ops.conv3d_statistics_reason_against(SLOW_RES2, (k, 64, 1, 1, 1), dtype=torch.float32, allow_tf32=False)
        for k in (128, 136, 256)
    ]
    assert [reason is None for reason in reasons] == [True, False, True]


@pytest.mark.parametrize(("capability", "useful"), [((8, 0), True), ((8, 6), True), ((9, 0), False), ((10, 3), False)])
def test_gpus_without_other_instructions_gain_more_often(capability, useful, monkeypatch):
    pretend_there_is_a_gpu(monkeypatch, capability)
    reason = ops.conv3d_statistics_reason_against((8, 256, 4, 28, 28), (1024, 256, 1, 1, 1))
    assert (reason is None) == useful
