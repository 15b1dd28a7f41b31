"""Networks of other code bases in training: results, gradients and statistics are the plain ones, and less is kept."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from foreign_networks import NETWORKS, BranchedBlock, ConvModuleBlock, SequentialBlock, TemporalConv
from fused_cases import Kept, lively
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from slowfast_ext import accelerate, explain, restore
from slowfast_ext.nn import FusedBlock
from slowfast_ext.nn.traced_training import Group

networks = pytest.mark.parametrize("name", NETWORKS)
pytestmark = pytest.mark.filterwarnings("ignore:accelerate. . of .* candidates are kept")


def build(name):
    """In float64, as a step with it is the same but for the order of sums."""
    return lively(NETWORKS[name]()).double().train()


def block(case=SequentialBlock, dtype=torch.float64):
    arguments = {SequentialBlock: (TemporalConv, 4, 6, 2), BranchedBlock: (4, 3, 6, 2), ConvModuleBlock: (4, 3, 6, 2)}
    return lively(case(*arguments[case])).to(dtype).train()


def pair(plain):
    """A module and its twin, for training."""
    return plain, accelerate(copy.deepcopy(plain), mode="training")


def clip(channels=3, size=(24, 20), dtype=torch.float64):
    return torch.randn(2, channels, 8, *size, dtype=dtype)


def twins(model):
    return [module for module in model.modules() if isinstance(module, FusedBlock)]


def last_forwards(model):
    return {twin.last_forward for twin in twins(model)}


def step(module, x, forward=None):
    """The result, and the gradients of input and parameters of its sum with fixed random weights."""
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    y = module(x) if forward is None else forward(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (y * weights.to(y.dtype)).sum().backward()
    return y.detach(), [x.grad, *(parameter.grad for parameter in module.parameters())]


def assert_same_step(plain, twin, x, forward=lambda module: module):
    (expected, theirs), (actual, ours) = (step(module, x, forward(module)) for module in (plain, twin))
    assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    for mine, their in zip(ours, theirs, strict=True):
        assert (mine is None) == (their is None)
        if mine is not None:
            assert_close(mine, their, rtol=1e-9, atol=1e-9 * max(1, their.abs().max().item()))
    for (name, mine), their in zip(twin.named_buffers(), plain.buffers(), strict=True):
        assert_close(mine, their, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


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
        with Kept(model) as keeping:
            model(x)
        kept.append(keeping.bytes - 4 * x.numel())
    assert kept[1] < KEPT[name] * kept[0]


def test_a_block_keeps_one_tensor_for_each_convolution():
    twin = accelerate(block(BranchedBlock), mode="training")
    x = clip(4, (6, 6)).contiguous(memory_format=torch.channels_last_3d)
    with Kept(twin) as kept:
        y = twin(x)
    statistics = 2 * (3 + 3 + 6 + 6)
    # The results of two convolutions, and y; those of the last one and of the shortcut are computed again.
    convolved = 3 * (2 * 8 * 6 * 6) + 3 * (2 * 8 * 3 * 3)
    assert kept.bytes == 8 * (x.numel() + convolved + y.numel() + statistics)


class Forward(nn.Module):
    """A forward given as a function of convolutions with batch norms, modules for ReLU and pooling, and x."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        for index in range(1, 5):
            setattr(self, f"conv{index}", nn.Conv3d(4, 4, 1, padding=(1, 0, 0) if index == 4 else 0))
            setattr(self, f"bn{index}", nn.BatchNorm3d(4))
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool3d(2)

    def forward(self, x):
        return self.function(self, x)


def first(m, x):
    return m.bn1(m.conv1(x))


def second(m, x):
    return m.bn2(m.conv2(x))


def third(m, x):
    return m.bn3(m.conv3(x))


def of_more_frames(m, x):
    return m.bn4(m.conv4(x))


def identity(m, x):
    return m.relu(second(m, F.relu(first(m, x))) + x)


def identity_in_place(m, x):
    y = second(m, first(m, x).relu())
    y += x
    return m.relu(y)


def identity_first(m, x):
    return torch.relu(x + first(m, x))


def shortcut_before(m, x):
    shortcut = third(m, x)
    return m.relu(shortcut + second(m, F.relu(first(m, x))))


def shortcut_after(m, x):
    y = second(m, F.relu(first(m, x)))
    return m.relu(y + third(m, x))


def shortcut_between_with_relu(m, x):
    y = F.relu(first(m, x))
    shortcut = F.relu(third(m, x))
    return m.relu(second(m, y) + shortcut)


def shortcut_after_in_place(m, x):
    y, shortcut = second(m, F.relu(first(m, x))), third(m, x)
    shortcut += y
    return m.relu(shortcut)


def shortcut_behind_a_branch_with_relu(m, x):
    y = F.relu(second(m, F.relu(first(m, x))))
    return m.relu(y + third(m, x))


def shortcut_of_something_else(m, x):
    return m.relu(second(m, F.relu(first(m, x))) + third(m, x.sin()))


def shortcut_used_again(m, x):
    shortcut = third(m, x)
    return m.relu(second(m, F.relu(first(m, x))) + shortcut) * shortcut


def no_relu_at_the_end(m, x):
    return second(m, F.relu(first(m, x))) + x


def residual_of_something_else(m, x):
    residual = x.sin()
    return m.relu(second(m, F.relu(first(m, x))) + residual)


def broadcast(m, x):
    mean = x.mean((2, 3, 4), keepdim=True)
    return F.relu(first(m, mean) + second(m, x))


def broadcast_identity(m, x):
    return F.relu(of_more_frames(m, x[:, :, :1]) + x[:, :, :1])


def broadcast_input(m, x):
    x = x[:, :, :1]
    return F.relu(of_more_frames(m, x) + x)


def broadcast_shortcut(m, x):
    x = x[:, :, :1]
    return F.relu(of_more_frames(m, F.relu(first(m, x))) + second(m, x))


def number(m, x):
    return F.relu(first(m, x) + 1)


def result_used_twice(m, x):
    y = F.relu(first(m, x))
    return second(m, y) + y.sin()


def both_operands(m, x):
    y = F.relu(first(m, x))
    return F.relu(second(m, y) + y)


def no_norm_between(m, x):
    return third(m, F.relu(m.conv2(F.relu(first(m, x)))))


def pooled(m, x):
    return m.pool(second(m, F.relu(first(m, x))))


def pooled_and_used(m, x):
    y = F.relu(first(m, x))
    return m.pool(y).sum() + y


def pooled_sum(m, x):
    return m.pool(identity(m, x))


def changed_in_between(m, x):
    x = x * 1
    y = F.relu(first(m, x))
    x = torch.sigmoid_(x.clone())
    return second(m, y) + x


def one_norm_twice(m, x):
    shortcut = first(m, x)
    y = first(m, m.relu(second(m, x.exp())))
    return m.relu(y + shortcut)


def one_convolution_twice(m, x):
    return m.relu(m.bn2(m.conv1(m.bn1(m.conv1(x)))) + x)


# Forward -> its groups, each as the number of convolutions in its branch, with the addition (j), of a shortcut (s), or
# with pooling (p).
GROUPS = {
    identity: "2j",
    identity_in_place: "2j",
    identity_first: "1j",
    shortcut_before: "2js",
    shortcut_after: "2js",
    shortcut_between_with_relu: "2js",
    shortcut_after_in_place: "2 1",
    shortcut_behind_a_branch_with_relu: "2 1",
    shortcut_of_something_else: "2 1",
    shortcut_used_again: "1 2",
    no_relu_at_the_end: "2",
    residual_of_something_else: "2",
    broadcast: "1 1",
    broadcast_identity: "1",
    broadcast_input: "1j",
    broadcast_shortcut: "2js",
    number: "1",
    result_used_twice: "1 1",
    both_operands: "1 1j",
    no_norm_between: "1 1 1",
    pooled: "2p",
    pooled_and_used: "1",
    pooled_sum: "2j",
    changed_in_between: "1 1",
    one_norm_twice: "1 1 1",
    one_convolution_twice: "2j",
}


def described(group):
    return f"{len(group.branch)}{'j' * group.joins}{'s' * bool(group.shortcut)}{'p' * bool(group.pool)}"


@pytest.mark.parametrize("function", GROUPS, ids=lambda function: function.__name__)
def test_convolutions_train_in_groups_as_the_forward_is_written(function):
    plain, twin = pair(lively(Forward(function)).double().train())
    assert_same_step(plain, twin, torch.randn(2, 4, 4, 4, 4, dtype=torch.float64))
    assert twin.last_forward == "fused"
    groups = [described(group) for group, _, _ in twin.training_plan.steps if isinstance(group, Group)]
    assert " ".join(groups) == GROUPS[function]


def functional_dropout(m, x):
    return F.dropout(F.relu(first(m, x)), 0.5, m.training)


def another_way_in_training(m, x):
    return first(m, x) if m.training else second(m, x)


def stochastic_depth(m, x):
    y = second(m, F.relu(first(m, x)))
    if m.training and m.rate > 0:
        y = y * torch.rand_like(y[:, :1, :1, :1, :1])
    return m.relu(y + x)


def way_of_a_frozen_norm(m, x):
    return first(m, x) if m.training and not m.bn1.training else second(m, x)


def nothing_in_training(m, x):
    if m.training:
        raise RuntimeError("this is for evaluation")
    return first(m, x)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (functional_dropout, "its forward is another one in training mode, from dropout on"),
        (another_way_in_training, "its forward is another one in training mode, from conv1 on"),
        (stochastic_depth, "its forward is another one in training mode, from getitem on"),
        (way_of_a_frozen_norm, "its forward is another one in training mode, from conv1 on"),
        (nothing_in_training, "in training mode its forward cannot be traced (RuntimeError: this is for evaluation)"),
    ],
)
def test_a_forward_that_is_another_one_in_training_mode_has_its_reason(function, reason):
    plain = lively(Forward(function)).double().train()
    plain.rate = 0.5
    plain, twin = pair(plain)
    x = torch.randn(2, 4, 4, 4, 4, dtype=torch.float64)
    results = []
    for module in (plain, twin):
        torch.manual_seed(0)
        results.append(module(x) if function is not nothing_in_training else module.eval()(x))
    assert torch.equal(*results)
    assert twin.last_forward.startswith(reason)
    assert explain(twin).rows[0].reason == twin.last_forward


def test_a_branch_in_the_forward_that_is_never_taken_does_not_matter():
    plain = lively(Forward(stochastic_depth)).double().train()
    plain.rate = 0.0
    plain, twin = pair(plain)
    assert_same_step(plain, twin, torch.randn(2, 4, 4, 4, 4, dtype=torch.float64))
    assert twin.last_forward == "fused"
    plain.rate = twin.rate = 0.5
    twin(torch.randn(2, 4, 4, 4, 4, dtype=torch.float64))
    assert twin.last_forward == "the module has been changed since accelerate()"


class NoisyConv(nn.Conv3d):
    def forward(self, x):
        y = super().forward(x)
        return y + torch.rand_like(y) if self.training else y


def test_a_convolution_that_is_another_one_in_training_mode_has_its_reason():
    twin = accelerate(nn.Sequential(NoisyConv(4, 4, 1), nn.BatchNorm3d(4)).train(), mode="training", strict=True)
    x = torch.randn(2, 4, 2, 3, 3)
    twin(x)
    assert twin.last_forward == "0 computes something else than Conv3d in training mode"
    with torch.no_grad():
        twin.eval()(x)
    assert twin.last_forward == "fused"


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


def test_a_hook_on_the_pooling_runs_and_the_block_stays_fused():
    plain, twin = pair(lively(Forward(pooled)).double().train())
    calls = []
    twin.pool.register_forward_hook(lambda module, x, y: calls.append(y.shape[3]))
    assert_same_step(plain, twin, clip(4, (6, 6)))
    assert calls == [3]
    assert twin.last_forward == "fused"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("function", [identity, identity_in_place, shortcut_after, pooled])
def test_autocast_gives_the_plain_dtype_and_values(function, layout):
    plain, twin = pair(lively(Forward(function)).train())
    x = torch.randn(2, 4, 4, 8, 8).contiguous(memory_format=layout)

    def forward(module):
        with torch.autocast("cpu", torch.bfloat16):
            return module(x)

    results = [step(module, x, lambda x, module=module: forward(module)) for module in (plain, twin)]
    assert twin.last_forward == "fused"
    (expected, theirs), (actual, ours) = results
    assert actual.dtype == expected.dtype
    assert (actual - expected).norm() < 0.02 * expected.norm()
    for mine, their in zip(ours[1:], theirs[1:], strict=True):
        assert their is None or (mine.dtype == their.dtype and (mine - their).norm() < 0.1 * max(their.norm(), 10))


def test_a_gradient_scaler_updates_as_with_plain_blocks_and_skips_what_overflows():
    plain, twin = pair(block(dtype=torch.float32))
    x = clip(4, (6, 6), torch.float32)
    for module in (plain, twin):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        for factor in (1.0, float("inf"), 1.0):
            scaler.scale(module(x).square().mean() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert scaler.get_scale() == 128.0
    for ours, theirs in zip(twin.parameters(), plain.parameters(), strict=True):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_module_may_be_used_twice():
    plain, twin = pair(lively(Forward(identity)).double().train())
    assert_same_step(plain, twin, clip(4, (6, 6)), lambda module: lambda x: module(module(x)))


def test_checkpointing_recomputes_the_same():
    plain, twin = pair(block())
    x = clip(4, (6, 6))
    _, theirs = step(plain, x)
    _, ours = step(twin, x, lambda x: checkpoint(twin, x, use_reentrant=False))
    for mine, their in zip(ours, theirs, strict=True):
        assert_close(mine, their, rtol=1e-9, atol=1e-9)


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
        assert_close(twin.eval()(x), plain.eval()(x), rtol=1e-9, atol=1e-9)
    accelerate(twin).train()(x)
    assert twin.last_forward == "it is in training mode"
