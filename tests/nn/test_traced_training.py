"""Which convolutions of a recorded forward train as one block, and which forwards do not train fused."""

import pytest
import torch
import torch.nn.functional as F
from foreign_networks import Branch, ConvModule
from fused_cases import lively
from torch import nn
from torch.utils.checkpoint import checkpoint
from training_steps import assert_same_step, pair, step

from slowfast_ext import accelerate, explain
from slowfast_ext.nn import FusedBlock
from slowfast_ext.nn.traced_training import Group

pytestmark = pytest.mark.filterwarnings("ignore:accelerate. . of .* candidates are kept")


def clip():
    return torch.randn(2, 4, 4, 4, 4, dtype=torch.float64)


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


class ReversedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return -grad


reverse_gradient = ReversedGradient.apply


def gradient_of_its_own(m, x):
    return second(m, reverse_gradient(F.relu(first(m, x))))


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
    gradient_of_its_own: "1 1",
    one_norm_twice: "1 1 1",
    one_convolution_twice: "2j",
}


def described(group):
    return f"{len(group.branch)}{'j' * group.joins}{'s' * bool(group.shortcut)}{'p' * bool(group.pool)}"


@pytest.mark.parametrize("function", GROUPS, ids=lambda function: function.__name__)
def test_convolutions_train_in_groups_as_the_forward_is_written(function):
    plain, twin = pair(lively(Forward(function)).double().train())
    assert_same_step(plain, twin, clip())
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


def checkpointed(m, x):
    return checkpoint(lambda x: first(m, x), x, use_reentrant=False)


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
        (checkpointed, "in training mode its forward turns gradients or checkpointing on or off"),
        (nothing_in_training, "in training mode its forward cannot be traced (RuntimeError: this is for evaluation)"),
    ],
)
def test_a_forward_that_is_another_one_in_training_mode_has_its_reason(function, reason):
    plain = lively(Forward(function)).double().train()
    plain.rate = 0.5
    plain, twin = pair(plain)
    x = clip()
    results = []
    for module in (plain, twin):
        torch.manual_seed(0)
        results.append(module(x) if function is not nothing_in_training else module.eval()(x))
    assert torch.equal(*results)
    if function is checkpointed and isinstance(twin, Forward):  # torch 2.11's checkpoint leaves no twin at all
        assert "Forward around it is kept" in str(explain(twin))
    else:
        assert twin.last_forward.startswith(reason)
        assert explain(twin).rows[0].reason == twin.last_forward


def test_a_branch_in_the_forward_that_is_never_taken_does_not_matter():
    plain = lively(Forward(stochastic_depth)).double().train()
    plain.rate = 0.0
    plain, twin = pair(plain)
    assert_same_step(plain, twin, clip())
    assert twin.last_forward == "fused"
    plain.rate = twin.rate = 0.5
    twin(clip())
    assert twin.last_forward == "the module has been changed since accelerate()"


def test_layers_in_a_row_are_one_twin_unless_one_of_them_has_a_hook():
    plain = nn.Sequential(ConvModule(4, 4, 1), ConvModule(4, 4, 3), nn.Sequential(ConvModule(4, 6, 1)))
    plain, twin = pair(lively(plain).double().train())
    assert_same_step(plain, twin, clip())
    assert [described(group) for group, _, _ in twin.training_plan.steps] == ["3"]
    branches = accelerate(nn.Sequential(Branch(4, 4, 6, 2), Branch(6, 4, 6, 1)), mode="training")
    assert [described(group) for group, _, _ in branches.training_plan.steps] == ["6"]
    plain[1].register_forward_hook(lambda module, x, y: y * 2)
    plain, twin = pair(plain)
    assert_same_step(plain, twin, clip())
    assert [name for name, module in twin.named_modules() if isinstance(module, FusedBlock)] == ["0", "1", "2.0"]


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


def test_a_hook_on_the_pooling_runs_and_the_block_stays_fused():
    plain, twin = pair(lively(Forward(pooled)).double().train())
    calls = []
    twin.pool.register_forward_hook(lambda module, x, y: calls.append(y.shape[3]))
    assert_same_step(plain, twin, clip())
    assert calls == [2]
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


def test_a_module_may_be_used_twice():
    plain, twin = pair(lively(Forward(identity)).double().train())
    assert_same_step(plain, twin, clip(), lambda module: lambda x: module(module(x)))
