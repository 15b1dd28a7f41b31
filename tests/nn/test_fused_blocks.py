"""Fused twins against the plain blocks that they contain."""

import copy
import pickle

import pytest
import torch
from fused_cases import CASES, LAYOUTS, block_tolerance, build, inputs, lively
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from slowfast_ext import accelerate
from slowfast_ext.models import BasicBlock3d, Bottleneck3d, ConvBNReLU3d, Lateral
from slowfast_ext.nn import FusedBottleneck3d, FusedConvBNReLU3d, FusedLateral

cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
one_of_each = pytest.mark.parametrize("case", [CASES[name] for name in ("conv", "bottleneck_downsample", "lateral")])


def twin_of(plain):
    """A twin of a copy, so that ``plain`` stays as it is."""
    return accelerate(copy.deepcopy(plain), strict=True)


class RecordOperators(TorchDispatchMode):
    """The names of the operators called while it is on."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@cases
def test_a_twin_in_eval_equals_its_block(case, dtype, layout, device):
    if (device.type, dtype) == ("cuda", torch.float64):
        pytest.skip("the CUDA kernels do not compute in float64")
    plain = build(case, dtype, device)
    twin = twin_of(plain)
    x = inputs(case, dtype, device, layout)
    with torch.inference_mode():
        expected, actual = plain(*x), twin(*x)
    assert twin.last_forward == "fused"
    assert actual.dtype == dtype
    multiplied_in = "tf32" if (device.type, dtype) == ("cuda", torch.float32) else dtype
    assert_close(actual, expected, **block_tolerance(plain, multiplied_in, expected))


@cases
def test_a_twin_returns_channels_last_3d(case):
    twin = twin_of(build(case))
    with torch.inference_mode():
        assert twin(*inputs(case)).is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize(
    ("name", "operators"),
    [
        ("conv", ["conv3d_bn_relu"]),
        ("bottleneck", ["conv3d_bn_relu"] * 3),
        ("bottleneck_downsample", ["conv3d_bn_relu_pair"] + ["conv3d_bn_relu"] * 2),
        ("basic", ["conv3d_bn_relu"] * 2),
        ("basic_downsample", ["conv3d_bn_relu_pair", "conv3d_bn_relu"]),
    ],
)
def test_each_convolution_is_in_one_operator_with_nothing_after_it(name, operators):
    twin = twin_of(build(CASES[name]))
    x = inputs(CASES[name], layout="channels_last_3d")
    with torch.no_grad():
        twin(*x)
        with RecordOperators() as recorded:
            twin(*x)
    assert recorded.names == [f"slowfast_ext::{operator}" for operator in operators]


def test_a_lateral_is_one_operator_without_concatenation():
    case = CASES["lateral"]
    twin = twin_of(build(case))
    x = inputs(case, layout="channels_last_3d")
    with torch.no_grad():
        twin(*x)
        with RecordOperators() as recorded:
            twin(*x)
    assert recorded.names == ["slowfast_ext::lateral_fuse"]


def test_a_lateral_of_another_geometry_is_kept():
    plain = build(CASES["lateral"])
    plain.conv = nn.Conv3d(8, 16, (5, 1, 1), (8, 1, 1), (1, 0, 0), bias=False)
    assert "padding (1, 0, 0)" in FusedLateral.reason_against(plain)


@cases
def test_keys_and_their_order_are_the_plain_blocks(case):
    plain = build(case)
    twin = twin_of(plain)
    assert list(twin.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in twin.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in twin.named_buffers()] == [name for name, _ in plain.named_buffers()]


@cases
def test_state_dicts_load_in_both_directions(case):
    plain, other = build(case), lively(build(case))
    twin = twin_of(plain)
    x = inputs(case)
    with torch.inference_mode():
        twin(*x)
        twin.load_state_dict(other.state_dict())
        plain.load_state_dict(twin.state_dict())
        expected = other(*x)
        assert_close(twin(*x), expected, **block_tolerance(plain, torch.float32, expected))
        assert_close(plain(*x), expected, rtol=0, atol=0)


@one_of_each
def test_training_equals_the_plain_block_with_gradients_and_running_statistics(case):
    plain = build(case)
    twin = twin_of(plain)
    with torch.inference_mode():
        twin(*inputs(case))
    results = []
    for block in (plain.train(), twin.train()):
        torch.manual_seed(1)
        x = inputs(case, requires_grad=True)
        y = block(*x)
        y.sin().sum().backward()
        results.append([y, *[tensor.grad for tensor in x], *[p.grad for p in block.parameters()], *block.buffers()])
    assert twin.last_forward == "it is in training mode"
    for actual, expected in zip(results[1], results[0], strict=True):
        assert_close(actual, expected, rtol=0, atol=0)


@one_of_each
def test_gradients_of_parameters_in_eval_are_the_plain_blocks(case):
    plain = build(case)
    twin = twin_of(plain)
    results = []
    for block in (plain, twin):
        torch.manual_seed(1)
        x = inputs(case, requires_grad=True)
        block(*x).sin().sum().backward()
        results.append([*[tensor.grad for tensor in x], *[p.grad for p in block.parameters()]])
    assert "gradients of its parameters" in twin.last_forward
    for actual, expected in zip(results[1], results[0], strict=True):
        assert_close(actual, expected, rtol=0, atol=0)


@one_of_each
def test_gradients_of_the_input_pass_through_the_fused_block_when_parameters_are_frozen(case):
    plain = build(case, torch.float64).requires_grad_(False)
    twin = twin_of(plain)
    with torch.inference_mode():
        twin(*inputs(case, torch.float64))  # weights folded in inference mode must serve a backward
    gradients = []
    for block in (plain, twin):
        torch.manual_seed(1)
        x = inputs(case, torch.float64, requires_grad=True)
        gradients.append(torch.autograd.grad(block(*x).sin().sum(), x))
    assert twin.last_forward == "fused"
    for actual, expected in zip(gradients[1], gradients[0], strict=True):
        assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@one_of_each
def test_autocast_gives_the_plain_dtype_and_values_and_folds_once(case, monkeypatch):
    plain = build(case)
    twin = twin_of(plain)
    x = [tensor.bfloat16() for tensor in inputs(case)]
    folds = count_folds(monkeypatch)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected, actual = plain(*x), twin(*x)
        folded = len(folds)
        twin(*x)
    assert twin.last_forward == "fused"
    assert set(folds) == {torch.bfloat16}
    assert len(folds) == folded
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert_close(actual, expected, **block_tolerance(plain, torch.bfloat16, expected))


def test_autocast_may_come_and_go():
    twin = twin_of(build(CASES["conv"]))
    x = inputs(CASES["conv"])
    with torch.inference_mode():
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                assert twin(*x).dtype == torch.bfloat16
            assert twin(*x).dtype == torch.float32


def count_folds(monkeypatch):
    """The dtypes of all foldings from here on."""
    from slowfast_ext.nn import folding

    fold, dtypes = folding.fold, []
    monkeypatch.setattr(folding, "fold", lambda conv, bn, dtype: dtypes.append(dtype) or fold(conv, bn, dtype))
    return dtypes


def test_a_lateral_with_inputs_of_two_dtypes_promotes_as_concatenation_does():
    case = CASES["lateral"]
    plain = build(case)
    twin = twin_of(plain)
    slow, fast = inputs(case)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected, actual = plain(slow, fast), twin(slow, fast)
    assert actual.dtype == expected.dtype == torch.float32
    assert_close(actual, expected, **block_tolerance(plain, torch.bfloat16, expected))
    with torch.inference_mode():
        expected, actual = plain(slow.bfloat16(), fast), twin(slow.bfloat16(), fast)
    assert actual.dtype == expected.dtype == torch.float32
    assert_close(actual, expected, **block_tolerance(plain, torch.float32, expected))


def test_inputs_may_be_given_by_name():
    case = CASES["lateral"]
    twin = twin_of(build(case))
    slow, fast = inputs(case)
    with torch.inference_mode():
        assert_close(twin(fast=fast, slow=slow), twin(slow, fast), rtol=0, atol=0)


def test_batch_norm_in_training_mode_inside_an_eval_block_uses_the_batch_statistics():
    plain = build(CASES["bottleneck"])
    plain.conv2.bn.train()
    twin = twin_of(plain)
    x = inputs(CASES["bottleneck"])
    with torch.no_grad():
        assert_close(twin(*x), plain(*x), rtol=0, atol=0)
    assert twin.last_forward == "conv2.bn is in training mode"
    assert_close(twin.conv2.bn.running_mean, plain.conv2.bn.running_mean, rtol=0, atol=0)


def test_hooks_of_the_block_stay_and_see_the_fused_result():
    plain = build(CASES["bottleneck"])
    seen = []
    plain.register_forward_hook(lambda module, args, output: seen.append("before") or output + 1)
    twin = accelerate(plain, strict=True)
    twin.register_forward_pre_hook(lambda module, args: seen.append("after"))
    x = inputs(CASES["bottleneck"])
    with torch.inference_mode():
        y = twin(*x)
        expected = type(twin.plain).forward(twin, *x) + 1
    assert seen == ["after", "before"]
    assert twin.last_forward == "fused"
    assert_close(y, expected, **block_tolerance(twin, torch.float32, expected))


@pytest.mark.parametrize("path", ["conv2", "conv2.conv", "conv2.bn"])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_put_on_a_child_is_run_from_then_on(path, register):
    case = CASES["bottleneck"]
    twin = twin_of(build(case))
    x, calls = inputs(case), []
    with torch.inference_mode():
        twin(*x)
        assert twin.last_forward == "fused"
        handle = getattr(twin.get_submodule(path), register)(lambda *arguments: calls.append(path))
        twin(*x)
        assert calls == [path]
        assert twin.last_forward == f"{path} has hooks, which a fused block cannot run"
        handle.remove()
        twin(*x)
    assert calls == [path]
    assert twin.last_forward == "fused"


class OwnBottleneck(Bottleneck3d):
    def forward(self, x):
        return -super().forward(x)


def with_own_conv1(block):
    block.conv1 = nn.Identity()
    return block


def with_conv(block, **settings):
    conv = block.conv2.conv
    block.conv2.conv = nn.Conv3d(conv.in_channels, conv.out_channels, conv.kernel_size, **settings)
    return block


def with_attribute(block, path, name, value):
    setattr(block.get_submodule(path), name, value)
    return block


def with_hook(block):
    block.conv3.bn.register_forward_hook(print)
    return block


REASONS = {
    "FusedBottleneck3d does not know the class OwnBottleneck": lambda: OwnBottleneck(8, 4),
    "its forward has been replaced or compiled": lambda: with_attribute(Bottleneck3d(8, 4), "", "forward", print),
    "conv1 is a Identity": lambda: with_own_conv1(Bottleneck3d(8, 4)),
    "conv2.conv has 2 groups": lambda: with_conv(Bottleneck3d(8, 4), groups=2),
    "conv2.conv has dilation (1, 2, 2)": lambda: with_conv(Bottleneck3d(8, 4), dilation=(1, 2, 2)),
    "conv2.conv has padding (1, 1, 1) with padding_mode 'replicate'": lambda: with_conv(
        Bottleneck3d(8, 4), padding=1, padding_mode="replicate"
    ),
    "conv2.conv has padding 'same' with padding_mode 'zeros'": lambda: with_conv(Bottleneck3d(8, 4), padding="same"),
    "conv2.conv is a ConvTranspose3d, not a Conv3d": lambda: with_attribute(
        Bottleneck3d(8, 4), "conv2", "conv", nn.ConvTranspose3d(4, 4, 1)
    ),
    "conv2.conv is a ParametrizedConv3d, not a Conv3d": lambda: with_attribute(
        Bottleneck3d(8, 4), "conv2", "conv", nn.utils.parametrizations.weight_norm(nn.Conv3d(4, 4, 1))
    ),
    "conv1.conv has weights in torch.complex64": lambda: Bottleneck3d(8, 4).to(torch.complex64),
    "conv3.bn is a InstanceNorm3d, not a BatchNorm3d": lambda: with_attribute(
        Bottleneck3d(8, 4), "conv3", "bn", nn.InstanceNorm3d(16)
    ),
    "conv3.bn has no running statistics": lambda: with_attribute(
        Bottleneck3d(8, 4), "conv3", "bn", nn.BatchNorm3d(16, track_running_stats=False)
    ),
    "conv3.bn has hooks, which a fused block cannot run": lambda: with_hook(Bottleneck3d(8, 4)),
    "conv3.conv has had its forward replaced": lambda: with_attribute(
        Bottleneck3d(8, 4), "conv3.conv", "forward", print
    ),
    "conv3 has a ReLU before the addition": lambda: with_attribute(Bottleneck3d(8, 4), "conv3", "relu", True),
    "the kernels are CUDA-only, the tensors are on meta": lambda: Bottleneck3d(8, 4).to("meta"),
}


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize("reason", REASONS)
def test_a_block_that_cannot_be_fused_has_its_reason(reason):
    block = REASONS[reason]()
    assert FusedBottleneck3d.reason_against(block) == reason
    with pytest.raises(
        ValueError, match="FusedBottleneck3d: plain must be a block that can be replaced, got one where"
    ):
        FusedBottleneck3d(block)


@pytest.mark.parametrize("block", [ConvBNReLU3d(3, 4, (1, 1, 1)), BasicBlock3d(4, 4), Lateral(4, 5, 8, True)])
def test_a_twin_is_for_one_kind_of_block(block):
    assert FusedBottleneck3d.reason_against(block).startswith("FusedBottleneck3d does not know the class")


@pytest.mark.cuda
def test_float64_on_a_gpu_runs_plain():
    twin = twin_of(build(CASES["conv"], torch.float64)).to("cuda")
    with torch.inference_mode():
        twin(*inputs(CASES["conv"], torch.float64, "cuda"))
    assert twin.last_forward == "the CUDA kernels do not compute in float64"


def test_a_change_that_rules_fusing_out_is_noticed_in_the_next_forward():
    case = CASES["conv"]
    twin = twin_of(build(case))
    with torch.inference_mode():
        twin(*inputs(case))
        twin.conv.padding_mode = "replicate"
        twin.conv._reversed_padding_repeated_twice = [1] * 6
        twin(*inputs(case))
    assert twin.last_forward == "conv has padding (1, 1, 1) with padding_mode 'replicate'"


def test_synchronised_batch_norm_is_folded_too():
    case = CASES["bottleneck"]
    plain = build(case)
    twin = nn.SyncBatchNorm.convert_sync_batchnorm(twin_of(plain))
    x = inputs(case)
    with torch.inference_mode():
        expected, actual = plain(*x), twin(*x)
    assert twin.last_forward == "fused"
    assert_close(actual, expected, **block_tolerance(plain, torch.float32, expected))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@one_of_each
def test_a_copy_is_independent_and_can_be_restored(case, duplicate):
    twin = twin_of(build(case))
    x = inputs(case)
    with torch.inference_mode():
        before = twin(*x)
        other = duplicate(twin)
        assert_close(other(*x), before, rtol=0, atol=0)
        for parameter in other.parameters():
            parameter.mul_(1.5)
        changed = other(*x)
        assert_close(twin(*x), before, rtol=0, atol=0)
        assert not torch.allclose(changed, before)
        plain = other.restored()
        assert type(plain) is type(twin.plain)
        assert_close(plain(*x), changed, **block_tolerance(plain, torch.float32, changed))


def test_properties_of_the_blocks_class_and_its_description_are_there():
    twin = FusedBottleneck3d(Bottleneck3d(8, 4))
    assert twin.last_norm is twin.conv3.bn
    assert twin.expansion == 4
    with pytest.raises(AttributeError, match="nothing"):
        _ = twin.nothing
    assert repr(FusedConvBNReLU3d(ConvBNReLU3d(3, 4, (1, 1, 1)))).startswith(
        "FusedConvBNReLU3d(\n  relu=True\n  (conv): "
    )


@one_of_each
def test_a_twin_compiles_to_one_graph_and_notices_changed_weights(case):
    plain = build(case)
    twin = twin_of(plain)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x = inputs(case)
    with torch.no_grad():
        for block in (plain, twin):
            before = block(*x)
        first = compiled(*x)
        assert_close(first, before, **block_tolerance(plain, torch.float32, before))
        for block in (plain, twin):
            for parameter in block.parameters():
                parameter.mul_(1.25)
        expected = plain(*x)
        assert not torch.allclose(expected, before)
        assert_close(compiled(*x), expected, **block_tolerance(plain, torch.float32, expected))
    gradients = [torch.autograd.grad(block(*x).sum(), list(block.parameters())) for block in (plain, compiled)]
    for actual, expected in zip(gradients[1], gradients[0], strict=True):
        assert_close(actual, expected, rtol=1e-4, atol=1e-4)
