"""The cache of folded weights notices every change of what it was made from."""

import copy
import pickle

import pytest
import torch
from fused_cases import CASES, block_tolerance, build, inputs, lively
from torch import nn
from torch.testing import assert_close

from slowfast_ext import accelerate
from slowfast_ext.models import ConvBNReLU3d
from slowfast_ext.nn import FusedConvBNReLU3d, folding
from slowfast_ext.nn.folding import FoldedWeights

CASE = CASES["conv"]


def load(block):
    block.load_state_dict(lively(build(CASE)).state_dict())


def load_by_assignment(block):
    block.load_state_dict(lively(build(CASE)).state_dict(), assign=True)


def take_an_optimiser_step(block):
    optimizer = torch.optim.SGD(block.parameters(), lr=0.5)
    for parameter in block.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def train_one_step_without_a_gradient(block):
    block.train()
    block(torch.randn(CASE.shapes[0]) * 3 + 1)
    block.eval()


def train_the_batch_norm_alone(block):
    block.bn.train()
    block.bn(torch.randn(2, 7, 2, 3, 3) * 3 + 1)
    block.bn.eval()


def give_the_batch_norm_other_statistics(block):
    block.bn.running_mean = torch.full_like(block.bn.running_mean, -0.5)


def edit_the_statistics_in_place(block):
    block.bn.running_var.mul_(2)


def edit_the_weight_in_place(block):
    block.conv.weight.mul_(2)


def edit_one_element_through_a_detached_view(block):
    block.bn.bias.detach()[3] += 1


def replace_the_weight(block):
    block.conv.weight = nn.Parameter(block.conv.weight * 2)


def replace_the_weight_by_an_alias_of_its_version_and_edit_the_original(block):
    weight = block.conv.weight
    alias = nn.Parameter(weight.data)
    while alias._version < weight._version:
        alias.mul_(1)
    block.conv.weight = alias
    weight.mul_(2)


def replace_the_data_of_the_weight(block):
    block.conv.weight.data = block.conv.weight.data * 2


def round_to_half_and_back(block):
    block.conv.weight.mul_(1000.3)
    with torch.inference_mode():
        block(*inputs(CASE))
    block.half().float()


def swap_the_batch_norm(block):
    block.bn = lively(nn.BatchNorm3d(7)).eval()


def change_eps(block):
    block.bn.eps = 0.5


def add_a_bias(block):
    block.conv.bias = nn.Parameter(torch.ones(7))


def drop_the_batch_norm(block):
    block.bn = None


CHANGES = [
    load,
    load_by_assignment,
    take_an_optimiser_step,
    train_one_step_without_a_gradient,
    train_the_batch_norm_alone,
    give_the_batch_norm_other_statistics,
    edit_the_statistics_in_place,
    edit_the_weight_in_place,
    edit_one_element_through_a_detached_view,
    replace_the_weight,
    replace_the_weight_by_an_alias_of_its_version_and_edit_the_original,
    replace_the_data_of_the_weight,
    round_to_half_and_back,
    swap_the_batch_norm,
    change_eps,
    add_a_bias,
    drop_the_batch_norm,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_noticed(change):
    twin = accelerate(build(CASE))
    x = inputs(CASE)
    with torch.inference_mode():
        before = twin(*x)
    with torch.no_grad():
        change(twin)
    with torch.inference_mode():
        actual, expected = twin(*x), type(twin.plain).forward(twin, *x)
    assert twin.last_forward == "fused"
    assert not torch.allclose(expected, before)
    assert_close(actual, expected, **block_tolerance(twin, torch.float32, expected))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_another_dtype_is_noticed(dtype):
    twin = accelerate(build(CASE))
    x = inputs(CASE)
    with torch.inference_mode():
        twin(*x)
        twin.to(dtype)
        x = [tensor.to(dtype) for tensor in x]
        actual, expected = twin(*x), type(twin.plain).forward(twin, *x)
    assert twin.last_forward == "fused"
    assert actual.dtype == dtype
    assert_close(actual, expected, **block_tolerance(twin, dtype, expected))


def test_later_storages_cannot_take_the_address_of_a_folded_one():
    """What the allocator frees it gives out again at once: without a hold, half().float() could look unchanged."""
    conv, cache = nn.Conv3d(64, 64, 3), FoldedWeights()
    for _ in range(20):
        weight, _ = cache.get(conv, None, torch.float32)
        assert_close(weight, conv.weight, rtol=0, atol=0)
        conv.weight.data = conv.weight.data.half()
        conv.weight.data = conv.weight.data.float().mul_(1.5)


def test_unchanged_weights_are_folded_once_for_each_convolution(monkeypatch):
    folds = []
    fold = folding.fold
    monkeypatch.setattr(folding, "fold", lambda conv, bn, dtype: folds.append(conv) or fold(conv, bn, dtype))
    twin = accelerate(build(CASES["bottleneck_downsample"]))
    for _ in range(3):
        with torch.inference_mode():
            twin(*inputs(CASES["bottleneck_downsample"]))
    with torch.no_grad():
        twin(*inputs(CASES["bottleneck_downsample"]))
    assert len(folds) == len(set(folds)) == 4


def test_weights_are_folded_in_float32_rounded_once_and_kept_in_channels_last_3d():
    twin = accelerate(build(CASE, torch.bfloat16))
    weight, bias = twin.folded[""].get(twin.conv, twin.bn, torch.bfloat16)
    exact = build(CASE, torch.bfloat16)
    exact.load_state_dict(twin.state_dict())
    exact.double()
    scale = exact.bn.weight / (exact.bn.running_var + exact.bn.eps).sqrt()
    expected = (exact.conv.weight * scale.view(-1, 1, 1, 1, 1)).detach()
    shift = (exact.bn.bias - exact.bn.running_mean * scale).detach()
    assert weight.dtype == torch.bfloat16
    assert weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert not weight.requires_grad
    assert (weight.double() - expected).abs().le(expected.abs() * 2**-8 * (1 + 1e-4)).all()
    assert bias.dtype == torch.float32
    assert_close(bias.double(), shift, rtol=1e-6, atol=1e-6)


def test_parameters_made_in_inference_mode_have_no_versions_and_are_folded_each_time():
    with torch.inference_mode():
        twin = accelerate(build(CASE))
        x = inputs(CASE)
        before = twin(*x)
        twin.conv.weight.mul_(2)
        actual, expected = twin(*x), type(twin.plain).forward(twin, *x)
    assert twin.last_forward == "fused"
    assert not torch.allclose(expected, before)
    assert_close(actual, expected, **block_tolerance(twin, torch.float32, expected))


def test_functional_calls_use_the_parameters_given():
    twin = accelerate(build(CASE)).requires_grad_(False)
    other = build(CASE).requires_grad_(False)
    x = inputs(CASE)
    expected = other(*x)
    state = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    before = twin(*x)
    actual = torch.func.functional_call(twin, state, tuple(x))
    assert_close(actual, expected, **block_tolerance(twin, torch.float32, expected))
    assert_close(twin(*x), before, rtol=0, atol=0)


def test_copies_and_pickles_of_a_cache_are_empty():
    twin = accelerate(build(CASE))
    with torch.inference_mode():
        twin(*inputs(CASE))
    cache = twin.folded[""]
    assert cache._entry is not None
    assert copy.deepcopy(cache)._entry is None
    assert pickle.loads(pickle.dumps(cache))._entry is None


def test_training_frees_the_folded_copies():
    twin = accelerate(build(CASE))
    with torch.inference_mode():
        twin(*inputs(CASE))
    twin.train()
    assert twin.folded[""]._entry is None


def test_a_replica_for_data_parallel_runs_on_its_own_children():
    twin = accelerate(build(CASE)).requires_grad_(False)
    x = inputs(CASE)
    before = twin(*x)
    replica = twin._replicate_for_data_parallel()
    other = lively(ConvBNReLU3d(5, 7, (3, 3, 3), (2, 1, 2))).eval().requires_grad_(False)
    replica._modules = dict(other._modules)
    expected = other(*x)
    assert isinstance(replica, FusedConvBNReLU3d)
    assert_close(replica(*x), expected, **block_tolerance(other, torch.float32, expected))
    assert_close(twin(*x), before, rtol=0, atol=0)
