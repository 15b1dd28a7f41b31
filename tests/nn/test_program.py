"""Forwards of all kinds are computed as they are written, or are kept with a reason."""

import copy

import pytest
import torch
import torch.nn.functional as F
from foreign_networks import SequentialNetwork, TemporalConv
from fused_cases import block_tolerance, lively
from torch import nn
from torch.testing import assert_close

from slowfast_ext import accelerate, explain
from slowfast_ext.nn import FusedBlock

pytestmark = pytest.mark.filterwarnings("ignore:accelerate. . of . candidates are kept")


def close(actual, expected, module):
    assert actual.dtype == expected.dtype
    assert_close(actual, expected, **block_tolerance(module, torch.float32, expected))


class Forward(nn.Module):
    """A forward given as a function of two convolutions with batch norms, a module for ReLU, and x."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.conv1, self.bn1, self.conv2, self.bn2 = (
            nn.Conv3d(4, 4, 1),
            nn.BatchNorm3d(4),
            nn.Conv3d(4, 4, 1),
            nn.BatchNorm3d(4),
        )
        self.relu = nn.ReLU(inplace=True)
        self.count = nn.Buffer(torch.zeros(()))

    def forward(self, x):
        return self.function(self, x)


def changed_later(m, x):
    y = m.conv1(x)
    z = m.relu(x)
    return m.bn1(y) + z


def sum_into_the_input(m, x):
    x += m.bn1(m.conv1(x))
    return x.relu()


def sum_seen_by_another(m, x):
    identity = y = m.bn1(m.conv1(x)).sigmoid()
    y += m.bn2(m.conv2(y))
    y *= 0.5
    return y + identity


def used_twice(m, x):
    y = m.conv1(x)
    return m.bn1(y) + y


def of_one_by_itself(m, x):
    y = m.bn1(m.conv1(x))
    return F.relu(y + y)


def broadcast(m, x):
    mean = x.mean((2, 3, 4), keepdim=True)
    return (m.bn1(m.conv1(x)) + mean).relu()


def two_branches(m, x):
    return torch.add(m.bn1(m.conv1(x)), m.bn2(m.conv2(x))).relu_()


def number(m, x):
    return (m.bn1(m.conv1(x)) + 1).relu()


def scaled_sum(m, x):
    return torch.add(m.bn1(m.conv1(x)), x, alpha=2).relu()


def shared(m, x):
    return m.bn2(m.conv1(m.bn1(m.conv1(x)))).relu()


def wider_residual(m, x):
    wide = x.double()
    return m.bn1(m.conv1(x)) + wide


def wider_residual_in_place(m, x):
    wide = x.double()
    y = m.bn1(m.conv1(x))
    y += wide
    return y.relu()


def number_of_the_input(m, x):
    size = x.shape[0]
    return (size + m.bn1(m.conv1(x))).relu()


def nested_results(m, x):
    return {"a": (m.bn1(m.conv1(x)), [x[:, 1:3]])}["a"][0]


FORWARDS = [
    changed_later,
    sum_into_the_input,
    sum_seen_by_another,
    used_twice,
    of_one_by_itself,
    broadcast,
    two_branches,
    number,
    scaled_sum,
    shared,
    wider_residual,
    wider_residual_in_place,
    number_of_the_input,
    nested_results,
]


@pytest.mark.parametrize("function", FORWARDS, ids=lambda function: function.__name__)
def test_a_forward_is_computed_as_it_is_written(function):
    plain = lively(Forward(function)).eval()
    twin, x = accelerate(copy.deepcopy(plain)), torch.randn(2, 4, 3, 5, 5)
    copies = x.clone(), x.clone()
    with torch.inference_mode():
        expected, actual = plain(copies[0]), twin(copies[1])
    close(actual, expected, plain)
    assert_close(copies[1], copies[0])  # what it does to its input, too
    assert not isinstance(twin, FusedBlock) or twin.last_forward == "fused"


def control_flow(m, x):
    return m.bn1(m.conv1(x)) if x.sum() > 0 else x


def writes(m, x):
    m.seen = m.bn1(m.conv1(x))
    return m.seen


def counts(m, x):
    m.count += 1
    return m.bn1(m.conv1(x))


def without_gradients(m, x):
    with torch.no_grad():
        y = m.bn1(m.conv1(x))
    return y + x


def in_float32(m, x):
    with torch.autocast("cpu", enabled=False):
        return m.bn1(m.conv1(x))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (without_gradients, "Forward around it is kept: its forward turns gradients or checkpointing on or off"),
        (in_float32, "Forward around it is kept: its forward turns autocast on or off"),
        (control_flow, "Forward around it is kept: its forward cannot be traced (TraceError: "),
        (writes, "Forward around it is kept: its forward sets attributes"),
        (counts, "Forward around it is kept: its forward "),
    ],
)
def test_what_cannot_be_recorded_has_its_reason_and_is_left_as_it_was(function, reason):
    model = Forward(function).eval()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    assert accelerate(model) is model
    rows = {row.name: row.reason for row in explain(model).rows}
    assert rows["conv1"].startswith(reason)
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    assert model.count == 0


def test_recording_leaves_modes_and_hooks_alone():
    model, called = SequentialNetwork().train(), []
    model.layer1[0].eval()
    model.stem.register_forward_hook(lambda *arguments: called.append(1))
    modes = [module.training for module in model.modules()]
    accelerate(model)
    explain(model)
    assert [module.training for module in model.modules()] == modes
    assert not called


class OtherConv(nn.Conv3d):
    def forward(self, x):
        return super().forward(x) * 2


def test_a_convolution_that_computes_something_else_is_kept():
    model = nn.Sequential(
        OtherConv(3, 4, 1), nn.BatchNorm3d(4), nn.ReLU(), TemporalConv(4, 4), nn.BatchNorm3d(4)
    ).eval()
    x = torch.randn(1, 3, 2, 4, 4)
    with torch.inference_mode():
        expected = model(x)
        twin = accelerate(model)
        close(twin(x), expected, model)
    assert {row.name: row.reason for row in explain(twin).kept} == {
        "0": "conv is a OtherConv, which computes something else than Conv3d"
    }
