"""A step of training of a plain module and of its twin."""

import copy

import torch
from torch.testing import assert_close

from slowfast_ext import accelerate

# In float64 only the order of sums differs; gradients are compared relative to their largest element.
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def pair(plain):
    """A module and its twin, for training."""
    return plain, accelerate(copy.deepcopy(plain), mode="training")


def run(forward, tensors):
    """The result, and its sum with fixed random weights differentiated."""
    y = forward(*tensors)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if y.requires_grad:
        (y * weights.to(y.dtype)).sum().backward()
    return y


def step(module, x, forward=None):
    """The result, and the gradients of input and parameters."""
    module.zero_grad()
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    y = run(module if forward is None else forward, [x])
    return y.detach(), [x.grad, *(parameter.grad for parameter in module.parameters())]


def assert_same_gradients(ours, theirs):
    for mine, their in zip(ours, theirs, strict=True):
        assert (mine is None) == (their is None)
        if mine is not None:
            scale = max(1, their.abs().amax().item()) if their.numel() else 1
            assert_close(mine, their, rtol=1e-9, atol=1e-9 * scale)


def assert_same_buffers(twin, plain):
    for (name, mine), their in zip(twin.named_buffers(), plain.buffers(), strict=True):
        assert_close(mine, their, msg=lambda text, name=name: f"{name}: {text}", **EXACT)


def assert_same_step(plain, twin, x, forward=lambda module: module):
    (expected, theirs), (actual, ours) = (step(module, x, forward(module)) for module in (plain, twin))
    assert_close(actual, expected, **EXACT)
    assert_same_gradients(ours, theirs)
    assert_same_buffers(twin, plain)


def assert_same_scaled_steps(plain, twin, x):
    """Three updates with a gradient scaler, of which the second overflows and is skipped."""
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
