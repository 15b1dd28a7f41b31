"""Twins of modules of any class: their forward is recorded, and computes what the plain one computes."""

import copy
import operator
import pickle

import pytest
import torch
import torch.nn.functional as F
from foreign_networks import NETWORKS, ConvModuleBlock, FlatNetwork, SequentialBlock, TemporalConv
from fused_cases import block_tolerance, lively
from test_fused_blocks import RecordOperators
from torch import nn
from torch.testing import assert_close

from slowfast_ext import accelerate, explain, restore
from slowfast_ext.models import Bottleneck3d
from slowfast_ext.nn import FusedBlock, FusedSequential, FusedTraced

networks = pytest.mark.parametrize("name", NETWORKS)
# The convolutions that each network keeps.
KEPT = {
    "conv_modules": {"preactivation.conv"},
    "flat": {"grouped", "dilated", "bare", "unused", "classifier"},
}
pytestmark = pytest.mark.filterwarnings("ignore:accelerate. . of .* candidates are kept")


def build(name):
    return lively(NETWORKS[name]()).eval()


def clip(dtype=torch.float32, batch=2, frames=8):
    return torch.randn(batch, 3, frames, 24, 20, dtype=dtype)


def close(actual, expected, module, dtype=torch.float32):
    assert actual.dtype == expected.dtype
    assert_close(actual, expected, **block_tolerance(module, dtype, expected))


def twins(model):
    return [module for module in model.modules() if isinstance(module, FusedBlock)]


@networks
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_foreign_network_gives_the_same_scores(name, dtype):
    model, x = build(name).to(dtype), clip(dtype)
    with torch.inference_mode():
        expected = model(x)
        model = accelerate(model)
        close(model(x), expected, model, dtype)
    assert {twin.last_forward for twin in twins(model)} == {"fused"}


@networks
def test_every_convolution_is_one_operator_or_has_a_reason(name):
    plain = build(name)
    convolutions = {name for name, module in plain.named_modules() if isinstance(module, nn.Conv3d)}
    model, x = accelerate(plain), clip()
    kept = {row.name for row in explain(model).kept}
    assert kept == KEPT.get(name, set())
    with torch.no_grad():
        model(x)
        with RecordOperators() as recorded:
            model(x)
    assert recorded.names.count("slowfast_ext::conv3d_bn_relu") == len(convolutions - kept)
    if name not in KEPT:
        assert not {"aten::native_batch_norm", "aten::relu_", "aten::add.Tensor", "aten::add_"} & set(recorded.names)


def test_what_cannot_be_fused_is_named_with_its_reason():
    rows = {row.name: row.reason for row in explain(accelerate(build("flat"))).kept}
    assert rows == {
        "grouped": "conv has 4 groups",
        "dilated": "conv has dilation (2, 2, 2)",
        "bare": "no batch norm, addition or ReLU follows it that could be fused with it",
        "unused": "the forward does not call it",
        "classifier": "no batch norm, addition or ReLU follows it that could be fused with it",
    }
    with pytest.raises(RuntimeError, match="with strict every candidate must be fused, got 5 that cannot"):
        accelerate(build("flat"), strict=True)


def test_residual_blocks_have_a_twin_each():
    model = accelerate(build("sequential"))
    names = [name for name, module in model.named_modules() if isinstance(module, FusedBlock)]
    assert names == ["stem", "layer1.0", "layer1.1", "layer2.0"]


def test_blocks_inside_a_recorded_forward_keep_their_own_twins():
    model = accelerate(build("flat"))
    assert type(model) is FusedTraced
    assert type(model.layer1[0]) is type(model.layer1[1]) is FusedTraced
    assert len(twins(model)) == 3
    model.layer1[0].register_forward_hook(lambda module, inputs, output: output * 2)
    with torch.inference_mode():
        expected = type(model.plain).forward(restore(copy.deepcopy(model)), x := clip())
        close(model(x), expected, model)
    assert {twin.last_forward for twin in twins(model)} == {"fused"}


@networks
def test_keys_are_untouched_and_restore_is_exact(name):
    model = build(name)
    modules, keys = dict(model.named_modules()), list(model.state_dict())
    attributes = {name: dict(module.__dict__) for name, module in modules.items()}
    with torch.inference_mode():
        twin = accelerate(model)
        twin(clip())
    assert list(twin.state_dict()) == keys
    assert restore(twin) is model
    assert dict(model.named_modules()) == modules
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == attributes


@networks
def test_accelerating_twice_changes_nothing(name):
    model = accelerate(build(name))
    before = twins(model)
    assert accelerate(model) is model
    assert twins(model) == before


@networks
def test_training_is_the_plain_networks(name):
    plain = build(name)
    model, x = accelerate(copy.deepcopy(plain)).train(), clip()
    plain.train()
    results = []
    for network in (plain, model):
        network(x).square().sum().backward()
        results.append([*(parameter.grad for parameter in network.parameters()), *network.buffers()])
    for actual, expected in zip(results[1], results[0], strict=True):
        assert (actual is None and expected is None) or torch.equal(actual, expected)
    assert {twin.last_forward for twin in twins(model)} == {"it is in training mode"}
    with torch.inference_mode():
        close(model.eval()(x), plain.eval()(x), plain)


def test_gradients_of_parameters_in_eval_are_the_plain_networks():
    plain, x = build("sequential"), clip()
    model = accelerate(copy.deepcopy(plain))
    gradients = [torch.autograd.grad(network(x).sum(), list(network.parameters())) for network in (plain, model)]
    for actual, expected in zip(gradients[1], gradients[0], strict=True):
        assert torch.equal(actual, expected)


def test_gradients_of_the_input_pass_through_frozen_twins():
    plain, x = build("factorised").double().requires_grad_(False), clip(torch.float64).requires_grad_()
    model = accelerate(copy.deepcopy(plain))
    gradients = [torch.autograd.grad(network(x).sin().sum(), x)[0] for network in (plain, model)]
    assert {twin.last_forward for twin in twins(model)} == {"fused"}
    assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-9)


@networks
def test_autocast_gives_the_plain_dtype_and_values(name):
    model, x = build(name), clip()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        close(accelerate(model)(x), expected, model, torch.bfloat16)


@pytest.mark.parametrize("name", ["flat", "conv_modules"])
def test_a_recorded_network_compiles_to_one_graph(name):
    torch._dynamo.reset()
    model, x = build(name), clip()
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(accelerate(model), fullgraph=True, backend="eager")
        close(compiled(x), expected, model)


def test_a_recorded_network_exports_with_any_batch_and_number_of_frames():
    model = build("flat").requires_grad_(False)
    sizes = {0: torch.export.Dim("N", min=1, max=64), 2: torch.export.Dim("T", min=2, max=64)}
    with torch.no_grad():
        program = torch.export.export(accelerate(model), (clip(),), dynamic_shapes=((sizes,),)).module()
        restore(model)
        for x in (clip(batch=4, frames=12), clip(batch=1, frames=5)):
            close(program(x), model(x), model)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_is_independent_and_can_be_restored(duplicate):
    model, x = accelerate(build("flat")), clip()
    with torch.inference_mode():
        before = model(x)
        other = duplicate(model)
        assert torch.equal(other(x), before)
        assert {twin.last_forward for twin in twins(other)} == {"fused"}
        for parameter in other.parameters():
            parameter.mul_(1.1)
        changed = other(x)
        assert torch.equal(model(x), before)
        assert not torch.allclose(changed, before)
        plain = restore(other)
        assert type(plain) is FlatNetwork
        assert not twins(plain)
        close(plain(x), changed, plain)


def block():
    return lively(SequentialBlock(TemporalConv, 4, 6, 2)).eval()


def block_input():
    return torch.randn(1, 4, 4, 6, 6)


def replace_conv(block):
    block.conv2[0] = TemporalConv(6, 6)


def replace_sequential(block):
    block.conv1 = nn.Sequential(nn.Conv3d(4, 6, 1, 2))


def append_a_layer(block):
    block.conv1.append(nn.Sigmoid())


def replace_relu(block):
    block.relu = nn.Sigmoid()


def drop_the_shortcut(block):
    block.downsample = None
    block.conv1[0].stride = block.conv1[0].out_channels and (1, 1, 1)


def change_the_stride(block):
    block.conv1[0].stride = block.downsample[0].stride = (1, 1, 1)


def set_an_attribute(block):
    block.anything = 3


def drop_a_batch_norm(block):
    block.conv2[1] = nn.Identity()


CHANGES = {
    replace_conv: "conv2.0 or conv2.1 has been replaced since accelerate()",
    replace_sequential: "conv1 has been replaced since accelerate()",
    append_a_layer: "conv1 has been changed since accelerate()",
    replace_relu: "relu has been replaced since accelerate()",
    change_the_stride: "conv1.0 has been changed since accelerate()",
    set_an_attribute: "the module has been changed since accelerate()",
    drop_a_batch_norm: "conv2.0: bn is a Identity, not a BatchNorm3d",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_of_what_was_recorded_is_noticed(change):
    plain, x = block(), block_input()
    twin = accelerate(copy.deepcopy(plain))
    with torch.inference_mode():
        torch.manual_seed(1)
        change(plain)
        torch.manual_seed(1)
        change(twin)
        expected, actual = plain.eval()(x), twin.eval()(x)
    assert twin.last_forward == CHANGES[change]
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("path", ["conv1", "conv1.0", "conv1.2", "conv2.1", "downsample", "relu"])
def test_a_hook_on_what_was_recorded_is_noticed(path):
    twin, x, calls = accelerate(block()), block_input(), []
    with torch.inference_mode():
        twin.get_submodule(path).register_forward_hook(lambda *arguments: calls.append(path))
        twin(x)
    assert calls == [path]
    assert "has hooks, which a fused block cannot run" in twin.last_forward


def test_a_hook_before_keeps_the_block_and_not_what_is_inside():
    model = build("sequential")
    model.layer1[0].conv2[1].register_forward_hook(lambda *arguments: None)
    accelerate(model)
    kept = {row.name: row.reason for row in explain(model).kept}
    assert kept == {"layer1.0.conv2.0": "bn has hooks, which a fused block cannot run"}
    assert type(model.layer1[0]) is SequentialBlock
    assert type(model.layer1[0].conv1) is FusedSequential


def test_changed_weights_are_noticed():
    twin, x = accelerate(block()), block_input()
    with torch.inference_mode():
        before = twin(x)
    with torch.no_grad():
        twin.conv2[1].bias.add_(1)
    with torch.inference_mode():
        expected, actual = twin.plain(x), twin(x)
    assert twin.last_forward == "fused"
    assert not torch.allclose(actual, before)
    close(actual, expected, twin)


def test_a_twin_of_a_sequential_is_one():
    plain = lively(nn.Sequential(nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4), nn.ReLU())).eval()
    layers = list(plain)
    twin = accelerate(plain)
    assert type(twin) is FusedSequential
    assert isinstance(twin, nn.Sequential)
    assert list(twin) == layers
    assert twin[0] is layers[0]
    assert list(twin[1:]) == layers[1:]
    assert len(twin) == 3


def test_inputs_may_be_given_by_name_and_other_calls_run_plain():
    model, x = accelerate(lively(ConvModuleBlock(4, 4, 4)).eval()), torch.randn(1, 4, 2, 5, 5)
    with torch.inference_mode():
        assert torch.equal(model(x=x), model(x))
        assert model.last_forward == "fused"
        module = restore(model).conv1
        expected = module(x, activate=False)
        twin = accelerate(module)
        assert torch.equal(twin(x, activate=False), expected)
    assert twin.last_forward == "it was called with other arguments than when it was recorded"


def test_an_attribute_that_a_twin_would_hide_keeps_the_block():
    model = nn.Sequential(nn.Conv3d(3, 4, 1), nn.ReLU())
    model.program = "theirs"
    assert accelerate(model) is model
    assert explain(model).rows[0].reason == "it has the attribute program, which its twin would hide"


def test_blocks_of_this_package_inside_a_foreign_forward_get_their_twins():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.block = nn.Conv3d(3, 8, 1), nn.BatchNorm3d(8), Bottleneck3d(8, 4)

        def forward(self, x):
            return self.block(F.relu(self.bn(self.conv(x))))

    model, x = lively(Network()).eval(), torch.randn(1, 3, 2, 4, 4)
    with torch.inference_mode():
        expected = model(x)
        model = accelerate(model, strict=True)
        close(model(x), expected, model)
    assert [type(twin).__name__ for twin in twins(model)] == ["FusedTraced", "FusedBottleneck3d"]


def test_where_chooses_among_foreign_blocks():
    model = accelerate(build("sequential"), where=lambda name, module: name == "layer1.0.conv1")
    assert [type(twin) for twin in twins(model)] == [FusedSequential]
    outcomes = {row.name: row.outcome for row in explain(model).rows}
    assert outcomes["layer1.0.conv1"].startswith("FusedSequential")
    assert outcomes["layer1.1"].startswith("kept: not accelerated")


def test_operators_that_steps_call_are_the_recorded_ones():
    program = accelerate(build("flat")).program
    targets = {step.target for step, _, _ in program.steps if not hasattr(step, "conv")}
    assert operator.mul in targets
