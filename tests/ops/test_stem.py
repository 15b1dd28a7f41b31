"""stem against plain PyTorch in float64: values, gradients, layouts, frames, registrations, messages."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from tolerances import tolerance
from torch.testing import assert_close

from slowfast_ext import ops

OPERATOR = torch.ops.slowfast_ext.stem.default
OPERATOR_OUT = torch.ops.slowfast_ext.stem.out
# mmaction2's normalisation, for pixels of 0 to 255.
MEAN, STD = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])


@dataclass(frozen=True)
class Case:
    x: tuple  # N, T, H, W
    channels: int = 8
    kernel_t: int = 1
    frames: tuple | None = None

    @property
    def terms(self):
        return 3 * self.kernel_t * 49


CASES = {
    "slow": Case((1, 2, 21, 19), 64),
    "slow_strided_frames": Case((2, 9, 19, 17), 64, frames=(0, 8)),
    "slow_linspace_frames": Case((1, 9, 16, 18), 64, frames=(0, 2, 5, 8)),
    "fast": Case((1, 6, 17, 15), 8, 5),
    "fast_picks_frames": Case((1, 5, 12, 13), 8, 5, frames=(4, 0, 2, 2)),
    "one_frame": Case((2, 1, 9, 11), 8, 5),
    "one_pixel": Case((1, 1, 1, 1)),
    "empty_batch": Case((0, 2, 9, 9), 16, 5),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def make_inputs(case, device="cpu", dtype=torch.float32, raw=False, requires_grad=False):
    """x, weight, bias, frames, scale and shift; normalised pixels and weights are of unit size."""
    generator = torch.Generator().manual_seed(0)
    n, t, h, w = case.x
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    scale = shift = None
    if raw:
        x = torch.randint(0, 256, (n, t, h, w, 3), generator=generator, dtype=torch.uint8).to(device)
        scale, shift = (1 / STD).to(device, accumulator), (-MEAN / STD).to(device, accumulator)
    else:
        x = torch.randn(n, 3, t, h, w, generator=generator).to(device, dtype).requires_grad_(requires_grad)
    weight = torch.randn(case.channels, 3, case.kernel_t, 7, 7, generator=generator).to(device, dtype)
    bias = torch.randn(case.channels, generator=generator).to(device, accumulator)
    frames = None if case.frames is None else torch.tensor(case.frames, device=device)
    return x, weight.requires_grad_(requires_grad), bias.requires_grad_(requires_grad), frames, scale, shift


def expected(x, weight, bias, frames, scale, shift):
    """Plain PyTorch in float64, of pixels that are rounded to the dtype of the weight once."""
    if x.dtype == torch.uint8:
        x = torch.stack([x[..., c] * scale[c] + shift[c] for c in range(3)], 1).to(weight.dtype)
    x = x if frames is None else x[:, :, frames]
    bias = None if bias is None else bias.double()
    padding = (weight.shape[2] // 2, 3, 3)
    y = F.conv3d(x.double(), weight.double(), bias, stride=(1, 2, 2), padding=padding).relu()
    return F.max_pool3d(y, (1, 3, 3), (1, 2, 2), (0, 1, 1))


def call(x, weight, bias, frames, scale, shift, out=None):
    return ops.stem(x, weight, bias, frames=frames, scale=scale, shift=shift, out=out)


def assert_like(actual, reference, case):
    # A pixel may be rounded once more where a kernel normalises with a fused multiplication and addition.
    scale = math.sqrt(case.terms + 1)
    assert_close(actual.double(), reference, **tolerance(actual.dtype, case.terms, roundings=2, scale=scale))


@pytest.mark.parametrize("raw", [False, True], ids=["normalised", "raw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@cases
def test_equals_plain_pytorch_in_float64(case, dtype, raw, device):
    inputs = make_inputs(case, device, dtype, raw)
    y = call(*inputs)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    assert_like(y, expected(*inputs), case)


def test_float64_is_exact_on_a_cpu():
    inputs = make_inputs(CASES["fast_picks_frames"], dtype=torch.float64, raw=True)
    assert_close(call(*inputs), expected(*inputs), rtol=1e-12, atol=1e-12)


def test_bias_is_optional(device):
    x, weight, _, *others = make_inputs(CASES["slow"], device)
    assert_like(call(x, weight, None, *others), expected(x, weight, None, *others), CASES["slow"])


def test_padding_is_zero_after_normalisation(device):
    # Black frames are far from zero once normalised: a kernel of ones sees how many of its pixels are in the image.
    x = torch.zeros(1, 1, 8, 8, 3, dtype=torch.uint8, device=device)
    weight, scale = torch.ones(8, 3, 1, 7, 7, device=device), torch.full((3,), 2.0, device=device)
    y = ops.stem(x, weight, scale=scale, shift=torch.ones(3, device=device))
    assert (y[0, 0, 0] == 3 * torch.tensor([[36.0, 42.0], [42.0, 49.0]], device=device)).all()


@pytest.mark.parametrize("layout", ["transposed", "every_second_frame", "slice_of_channels", "channels_moved"])
@pytest.mark.parametrize("raw", [False, True], ids=["normalised", "raw"])
def test_any_layout_of_x(raw, layout, device):
    x, *others = make_inputs(CASES["fast"], device, raw=raw)
    height, channel, time = (2, 4, 1) if raw else (3, 1, 2)
    plain = x
    if layout == "transposed":
        x = x.transpose(height, height + 1).contiguous().transpose(height, height + 1)
    elif layout == "every_second_frame":
        x = torch.stack([x, 1 - x], time + 1).flatten(time, time + 1)
        x = x[:, ::2] if raw else x[:, :, ::2]
    elif layout == "slice_of_channels":
        x = torch.cat([1 - x, x], channel).narrow(channel, 3, 3)
    else:
        x = x.movedim(channel, 5 - channel).contiguous().movedim(5 - channel, channel)
    assert x.stride() != plain.stride()
    assert_like(call(x, *others), expected(plain, *others), CASES["fast"])


@pytest.mark.parametrize("offset", [0, 1, 64])
def test_a_slice_of_a_wider_buffer_is_filled_and_nothing_else(offset, device):
    inputs = make_inputs(CASES["slow_strided_frames"], device, raw=True)
    reference = expected(*inputs)
    n, k, t, h, w = reference.shape
    buffer = torch.full((n, k + 66, t, h, w), 7.0, device=device).to(memory_format=torch.channels_last_3d)
    out = buffer[:, offset : offset + k]
    assert call(*inputs, out=out) is out
    assert_like(out, reference, CASES["slow_strided_frames"])
    assert (buffer[:, :offset] == 7).all()
    assert (buffer[:, offset + k :] == 7).all()


@pytest.mark.parametrize("form", [list, tuple, lambda frames: torch.tensor(frames, dtype=torch.int32)])
def test_frames_in_every_form(form, device):
    x, weight, bias, frames, *normalisation = make_inputs(CASES["slow_linspace_frames"], device)
    given = form(CASES["slow_linspace_frames"].frames)
    given = given.to(device) if isinstance(given, torch.Tensor) else given
    assert_close(call(x, weight, bias, given, *normalisation), call(x, weight, bias, frames, *normalisation))
    everything = call(x, weight, bias, range(x.shape[2]), *normalisation)
    assert_close(everything, call(x, weight, bias, None, *normalisation))


@cases
def test_gradients_equal_autograd_of_plain_pytorch_in_float64(case, device):
    inputs = make_inputs(case, device, torch.float64 if device.type == "cpu" else torch.float32, requires_grad=True)
    y, reference = call(*inputs), expected(*inputs)
    grad = torch.randn_like(reference)
    actual = torch.autograd.grad(y, inputs[:3], grad.to(y.dtype))
    for gradient, gradient_of_reference in zip(actual, torch.autograd.grad(reference, inputs[:3], grad), strict=True):
        terms = max(case.terms * case.channels, y[:, 0].numel())
        assert_close(gradient, gradient_of_reference.to(gradient.dtype), **tolerance(gradient.dtype, terms))


def test_raw_frames_train_weight_and_bias(device):
    x, weight, bias, *others = make_inputs(CASES["slow"], device, raw=True, requires_grad=True)
    actual = torch.autograd.grad(call(x, weight, bias, *others).sum(), (weight, bias))
    reference = torch.autograd.grad(expected(x, weight, bias, *others).sum(), (weight, bias))
    for gradient, gradient_of_reference in zip(actual, reference, strict=True):
        assert_close(gradient, gradient_of_reference, **tolerance(torch.float32, 100, scale=100))


def test_gradients_are_differentiable_again():
    inputs = make_inputs(Case((1, 3, 5, 5), 8, 1, (2, 0)), dtype=torch.float64, requires_grad=True)
    weight = inputs[1].detach()

    def function(x, bias):
        return call(x, weight, bias, *inputs[3:]) ** 2

    assert torch.autograd.gradgradcheck(function, (inputs[0], inputs[2]), fast_mode=True)


def test_out_refuses_inputs_that_want_gradients(device):
    inputs = make_inputs(CASES["one_frame"], device, requires_grad=True)
    with pytest.raises(RuntimeError, match="gradients"):
        call(*inputs, out=torch.empty_like(call(*inputs)))


@pytest.mark.parametrize("raw", [False, True], ids=["normalised", "raw"])
def test_opcheck(raw, device):
    case = Case((1, 3, 4, 5), 8, 1, (2, 0))
    for requires_grad in (False, True):
        inputs = make_inputs(case, device, raw=raw, requires_grad=requires_grad)
        torch.library.opcheck(OPERATOR, inputs)
    inputs = make_inputs(case, device, raw=raw)
    torch.library.opcheck(OPERATOR_OUT, (*inputs, torch.empty_like(call(*inputs))))


@pytest.mark.parametrize("raw", [False, True], ids=["normalised", "raw"])
def test_autocast_casts_pixels_and_weight_and_nothing_else(raw, device):
    case = CASES["slow"]
    x, weight, bias, *others = make_inputs(case, device, raw=raw, requires_grad=True)
    with torch.autocast(device.type, torch.bfloat16):
        y = call(x, weight, bias, *others)
    assert y.dtype == torch.bfloat16
    rounded = x if raw else x.bfloat16()
    assert_like(y, expected(rounded, weight.bfloat16(), bias, *others), case)
    y.sum().backward()
    assert {tensor.grad.dtype for tensor in (x, weight, bias) if tensor.requires_grad} == {torch.float32}


def test_compiles_to_one_graph_also_with_out(device):
    inputs = make_inputs(CASES["fast"], device, raw=True)

    def both(x, weight, bias, frames, scale, shift):
        y = ops.stem(x, weight, bias, frames=[0, 2, 4], scale=scale, shift=shift)
        return y, ops.stem(x, weight, bias, frames=[0, 2, 4], scale=scale, shift=shift, out=torch.zeros_like(y))

    x, weight, bias, _, *normalisation = inputs
    reference = expected(x, weight, bias, [0, 2, 4], *normalisation)
    for actual in torch.compile(both, fullgraph=True, backend="aot_eager")(*inputs):
        assert_like(actual, reference, CASES["fast"])


def test_stays_one_node_in_an_exported_program_with_dynamic_batch():
    class Stem(torch.nn.Module):
        def forward(self, x):
            return ops.stem(x, torch.ones(8, 3, 1, 7, 7), scale=torch.ones(3), shift=torch.zeros(3))

    batch, time = torch.export.Dim("batch"), torch.export.Dim("time")
    clip = torch.zeros(2, 4, 9, 9, 3, dtype=torch.uint8)
    program = torch.export.export(Stem(), (clip,), dynamic_shapes=({0: batch, 1: time},))
    assert [node.target for node in program.graph.nodes].count(OPERATOR) == 1
    x = torch.ones(3, 5, 9, 9, 3, dtype=torch.uint8)
    assert_close(program.module()(x), Stem()(x))


X, WEIGHT, VECTOR = torch.zeros(1, 4, 9, 9, 3, dtype=torch.uint8), torch.zeros(16, 3, 5, 7, 7), torch.ones(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": torch.zeros(4, 9, 9, 3)},
            r"x must be \(N, T, H, W, 3\) in uint8 or \(N, 3, T, H, W\), got \(4, 9, 9, 3\)",
        ),
        ({"x": torch.zeros(1, 4, 9, 9, 4, dtype=torch.uint8)}, r"x must be .*got \(1, 4, 9, 9, 4\)"),
        ({"x": torch.zeros(1, 4, 9, 0, 3, dtype=torch.uint8)}, "x must be of at least one frame and pixel"),
        (
            {"x": torch.zeros(1, 3, 4, 9, 9).half(), "scale": None, "shift": None},
            "x must be uint8 or in the dtype of w",
        ),
        ({"weight": torch.zeros(16, 3, 3, 7, 7)}, r"weight must be .*kernel_t 1 or 5, got \(16, 3, 3, 7, 7\)"),
        ({"weight": torch.zeros(12, 3, 5, 7, 7)}, r"weight must be .*multiple of 8 .*got \(12, 3, 5, 7, 7\)"),
        ({"weight": torch.zeros(16, 4, 5, 7, 7)}, r"weight must be \(K, 3, .*got \(16, 4, 5, 7, 7\)"),
        ({"weight": torch.zeros(16, 3, 5, 3, 3)}, r"weight must be .*7, 7\) .*got \(16, 3, 5, 3, 3\)"),
        ({"bias": torch.zeros(15)}, r"bias must be \(16,?\), got \(15,?\)"),
        ({"bias": torch.zeros(16).half()}, "bias must be .*float32"),
        ({"scale": None, "shift": None}, "scale and shift must be given for uint8"),
        ({"x": torch.zeros(1, 3, 4, 9, 9)}, "scale and shift must be given for uint8 and for no other dtype"),
        ({"scale": torch.ones(4)}, r"scale must be \(3,?\), got \(4,?\)"),
        ({"frames": [0, 4]}, r"frames must be indices from 0 to 3, got \[0, 4\]"),
        ({"frames": (-1, 2)}, r"frames must be indices from 0 to 3, got \[-1, 2\]"),
        ({"frames": []}, r"frames must be \(T',\) with T' > 0"),
        ({"frames": torch.zeros(2, 2, dtype=torch.int64)}, r"frames must be \(T',\) .*got \(2, 2\)"),
        ({"frames": torch.zeros(2)}, "frames must be int32 or int64"),
        ({"out": torch.zeros(1, 16, 4, 9, 9)}, r"out must be \(1, 16, 4, 3, 3\), got \(1, 16, 4, 9, 9\)"),
        ({"out": torch.zeros(1, 16, 4, 3, 3).half()}, "out must .*dtype of weight"),
        ({"out": torch.zeros(1, 16, 4, 3, 3)}, "out must be channels_last_3d"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(change, message, device):
    arguments = {"x": X, "weight": WEIGHT, "scale": VECTOR, "shift": VECTOR} | change
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match="stem: .*" + message):
        ops.stem(**arguments)


def test_a_tensor_of_indices_on_a_cpu_is_checked():
    with pytest.raises(RuntimeError, match=r"stem: frames must be indices from 0 to 3, got \[0, 4\]"):
        ops.stem(X, WEIGHT, frames=torch.tensor([0, 4]), scale=VECTOR, shift=VECTOR)


@pytest.mark.cuda
def test_a_frame_outside_of_the_clip_is_nan_on_cuda():
    x, weight, vector = X.cuda(), torch.ones(8, 3, 1, 7, 7, device="cuda"), VECTOR.cuda()
    y = ops.stem(x, weight, frames=torch.tensor([0, 4, -1, 3], device="cuda"), scale=vector, shift=vector)
    assert y.isnan().flatten(3).all(-1)[0, 0].tolist() == [False, True, True, False]


@pytest.mark.parametrize("name", ["weight", "bias", "frames", "scale", "shift", "out"])
def test_tensors_on_two_devices_are_named(name):
    arguments = {
        "x": X.to("meta"),
        "weight": WEIGHT.to("meta"),
        "bias": torch.zeros(16, device="meta"),
        "frames": torch.zeros(4, dtype=torch.int64, device="meta"),
        "scale": VECTOR.to("meta"),
        "shift": VECTOR.to("meta"),
        "out": torch.zeros(1, 16, 4, 3, 3, device="meta").to(memory_format=torch.channels_last_3d),
    }
    arguments[name] = torch.zeros_like(arguments[name], device="cpu")
    with pytest.raises(RuntimeError, match=f"stem: {name} must be on the device of (x|weight), meta, got cpu"):
        ops.stem(**arguments)


@pytest.mark.parametrize(
    ("convolution", "pool", "words"),
    [
        ({}, {}, None),
        ({"kernel_size": (5, 7, 7), "padding": (2, 3, 3), "out_channels": 8}, {}, None),
        ({"kernel_size": (3, 7, 7), "padding": (1, 3, 3)}, {}, "not 3x7x7 of 3"),
        ({"in_channels": 1}, {}, "not 1x7x7 of 1"),
        ({"out_channels": 12}, {}, "multiple of 8, not 12"),
        ({"stride": (2, 2, 2)}, {}, "stride"),
        ({"padding": (0, 0, 0)}, {}, "padding"),
        ({"padding_mode": "replicate"}, {}, "zeros"),
        ({}, {"kernel_size": (2, 3, 3)}, "pooling"),
        ({}, {"ceil_mode": True}, "pooling"),
        ({}, {"dilation": (1, 2, 2)}, "pooling"),
    ],
)
def test_reason_against_names_what_the_kernel_lacks(convolution, pool, words):
    plain = {"in_channels": 3, "out_channels": 64, "kernel_size": (1, 7, 7), "stride": (1, 2, 2), "padding": (0, 3, 3)}
    pooling = {"kernel_size": (1, 3, 3), "stride": (1, 2, 2), "padding": (0, 1, 1)}
    reason = ops.stem_reason_against(torch.nn.Conv3d(**(plain | convolution)), torch.nn.MaxPool3d(**(pooling | pool)))
    assert (reason is None) if words is None else words in reason
