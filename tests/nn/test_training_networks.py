"""Networks of other code bases in training: results, gradients and statistics are the plain ones, and less is kept."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from foreign_networks import NETWORKS, BranchedBlock, SequentialBlock, TemporalConv
from fused_cases import lively
from kept import KeptTensors
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from training_steps import EXACT, assert_same_scaled_steps, assert_same_step, pair, step

from slowfast_ext import accelerate, explain, restore
from slowfast_ext.nn import FusedBlock

networks = pytest.mark.parametrize("name", NETWORKS)
pytestmark = pytest.mark.filterwarnings("ignore:accelerate. . of .* candidates are kept")


def build(name):
    """In float64, as a step with it is the same but for the order of sums."""
    return lively(NETWORKS[name]()).double().train()


def block(dtype=torch.float64):
    return lively(SequentialBlock(TemporalConv, 4, 6, 2)).to(dtype).train()


def clip(channels=3, size=(24, 20), dtype=torch.float64):
    return torch.randn(2, channels, 8, *size, dtype=dtype)


def last_forwards(model):
    return {module.last_forward for module in model.modules() if isinstance(module, FusedBlock)}


@networks
def test_a_step_is_the_plain_networks(name):
    plain, twin = pair(build(name))
    assert_same_step(plain, twin, clip())
    assert last_forwards(twin) == {"fused"}
    assert_same_step(plain, twin, clip())  # with the statistics moved once


@networks
def test_a_step_with_frozen_batch_norms_is_the_plain_networks(name):
    plain, twin = pair(build(name).eval())
    assert_same_step(plain, twin, clip())
    assert last_forwards(twin) == {"fused"}


@networks
def test_errors_are_no_larger_than_the_plain_networks(name):
    """Against float64, of the plain network in the layout that the twins compute in."""
    exact, x = build(name), clip().float()
    plain, twin = pair(copy.deepcopy(exact).float())
    for module in plain.modules():
        if isinstance(module, nn.Conv3d):
            module.register_forward_hook(lambda conv, x, y: y.contiguous(memory_format=torch.channels_last_3d))
    _, expected = step(exact, x.double())
    errors = []
    for model in (plain, twin):
        _, gradients = step(model, x.contiguous(memory_format=torch.channels_last_3d))
        pairs = [(a.double() - b).flatten() for a, b in zip(gradients, expected, strict=True) if b is not None]
        errors.append(torch.cat(pairs).norm())
    assert errors[1] <= 1.5 * errors[0]


# Of what the plain network keeps; blocks of two convolutions save one tensor of four, those of three two of six.
KEPT = {"sequential": 0.8, "factorised": 0.75, "two_pathways": 0.65, "conv_modules": 0.7, "flat": 0.85}


@networks
def test_less_is_kept_for_the_backward_pass(name):
    plain, twin = pair(build(name).float())
    x = clip(dtype=torch.float32, size=(48, 40)).contiguous(memory_format=torch.channels_last_3d)
    kept = []
    for model in (plain, twin):
        with KeptTensors([model]) as keeping:
            model(x)
        kept.append(keeping.bytes - 4 * x.numel())
    assert kept[1] < KEPT[name] * kept[0]


def test_a_block_keeps_one_tensor_for_each_convolution():
    twin = accelerate(BranchedBlock(4, 3, 6, 2).double().train(), mode="training")
    x = clip(4, (6, 6)).contiguous(memory_format=torch.channels_last_3d)
    with KeptTensors([twin]) as kept:
        y = twin(x)
    statistics = 2 * (3 + 3 + 6 + 6)
    # The results of two convolutions, and y; those of the last one and of the shortcut are computed again.
    convolved = 3 * (2 * 8 * 6 * 6) + 3 * (2 * 8 * 3 * 3)
    assert kept.bytes == 8 * (x.numel() + convolved + y.numel() + statistics)


def test_convolutions_without_batch_norm_train_plain_with_a_reason():
    model = accelerate(build("flat"), mode="training")
    model(clip())
    row = explain(model).rows[0]
    assert row.outcome == "FusedTraced, layer by layer: no batch norm follows conv4, conv5"
    with torch.no_grad():
        model.eval()(clip())
    assert explain(model).rows[0].outcome == "FusedTraced"
    alone = accelerate(nn.Sequential(nn.Conv3d(3, 4, 1), nn.ReLU()).train(), mode="training")
    alone(clip(dtype=torch.float32))
    assert explain(alone).rows[0].reason == "none of its convolutions has a batch norm"


def freeze(block, *names):
    for name in names:
        block.get_submodule(name).eval()


CHANGES = {
    "one frozen": lambda block: freeze(block, "conv2.1"),
    "eval": lambda block: block.eval(),
    "weight": lambda block: block.conv1[0].requires_grad_(False),
    "first": lambda block: block.conv1.requires_grad_(False),
    "shortcut": lambda block: block.downsample.requires_grad_(False),
    "all": lambda block: block.requires_grad_(False),
    "cumulative average": lambda block: setattr(block.conv1[1], "momentum", None),
    "synchronised": lambda block: setattr(block.conv2[1], "__class__", nn.SyncBatchNorm),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_frozen_parts_and_kinds_of_batch_norm_are_respected(change):
    plain, twin = pair(block())
    change(plain)
    change(twin)
    for _ in range(2):
        assert_same_step(plain, twin, clip(4, (6, 6)))
    assert twin.last_forward == "fused"


def test_a_recorded_module_that_is_gone_is_noticed():
    plain = SequentialBlock(TemporalConv, 4, 4)
    plain.downsample = nn.Sequential(nn.Conv3d(4, 4, 1), nn.BatchNorm3d(4))
    plain, twin = pair(lively(plain).double().train())
    plain.downsample = twin.downsample = None
    assert_same_step(plain, twin, clip(4, (6, 6)))
    assert twin.last_forward == "the module has been changed since accelerate()"


def test_a_recorded_module_in_another_mode_trains_plain():
    plain, twin = pair(block())
    for module in (plain, twin):
        module.conv1.eval()
    assert_same_step(plain, twin, clip(4, (6, 6)))
    assert twin.last_forward == "conv1 is not in training mode, unlike the module around it"


@pytest.mark.parametrize("path", ["conv1", "conv1.0", "conv2.1", "relu"])
def test_a_hook_on_what_was_recorded_runs(path):
    plain, twin = pair(block())
    calls = []
    twin.get_submodule(path).register_forward_hook(lambda *arguments: calls.append(path))
    assert_same_step(plain, twin, clip(4, (6, 6)))
    assert calls == [path]
    assert "has hooks, which a fused block cannot run" in twin.last_forward


def test_a_gradient_scaler_updates_as_with_plain_blocks_and_skips_what_overflows():
    plain, twin = pair(block(dtype=torch.float32))
    assert_same_scaled_steps(plain, twin, clip(4, (6, 6), torch.float32))


def test_checkpointing_recomputes_the_same():
    plain, twin = pair(block())
    x = clip(4, (6, 6))
    _, theirs = step(plain, x)
    _, ours = step(twin, x, lambda x: checkpoint(twin, x, use_reentrant=False))
    for mine, their in zip(ours, theirs, strict=True):
        assert_close(mine, their, **EXACT)


def test_a_step_compiles_in_one_graph():
    torch._dynamo.reset()
    plain, twin = pair(build("flat"))
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    assert_same_step(plain, twin, clip(), lambda module: compiled if module is twin else module)


def test_gradients_of_distributed_data_parallel_are_the_plain_networks():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        plain, twin = pair(build("conv_modules"))
        assert_same_step(plain, twin, clip(), nn.parallel.DistributedDataParallel)
        assert last_forwards(twin) == {"fused"}
    finally:
        dist.destroy_process_group()


def test_a_second_derivative_is_refused():
    twin = accelerate(block(), mode="training")
    x = clip(4, (6, 6)).requires_grad_()
    (grad,) = torch.autograd.grad(twin(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_clip_without_a_batch_is_an_error_as_it_is_in_torch():
    plain, twin = pair(block())
    for module in (plain, twin):
        with pytest.raises(ValueError, match=r"got \(4, 8, 6, 6\)|got 4D input"):
            module(clip(4, (6, 6))[0])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_trains_by_itself(duplicate):
    plain, twin = pair(build("conv_modules"))
    other, before = duplicate(twin), copy.deepcopy(twin.state_dict())
    assert_same_step(plain, other, clip())
    assert last_forwards(other) == {"fused"}
    assert_close(twin.state_dict(), before, rtol=0, atol=0)


@networks
def test_restoring_is_exact_after_a_step(name):
    model = build(name)
    modules, keys = dict(model.named_modules()), list(model.state_dict())
    attributes = {name: dict(module.__dict__) for name, module in modules.items()}
    twin = accelerate(model, mode="training")
    step(twin, clip())
    assert list(twin.state_dict()) == keys
    assert restore(twin) is model
    assert dict(model.named_modules()) == modules
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == attributes


def test_evaluation_after_training_is_folded_and_the_mode_can_be_changed():
    plain, twin = pair(block())
    x = clip(4, (6, 6))
    for module in (plain, twin):
        step(module, x)
    with torch.inference_mode():
        assert_close(twin.eval()(x), plain.eval()(x), **EXACT)
    accelerate(twin).train()(x)
    assert twin.last_forward == "it is in training mode"
