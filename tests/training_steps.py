"""A step of training of a plain module and of its twin, and what is kept for the backward pass."""

import copy

import torch
from torch import nn
from torch.testing import assert_close

from slowfast_ext import accelerate


def pair(plain):
    """A module and its twin, for training."""
    return plain, accelerate(copy.deepcopy(plain), mode="training")


def step(module, x, forward=None):
    """The result, and the gradients of input and parameters of its sum with fixed random weights."""
    module.zero_grad()
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


class Kept:
    """While it is entered, counts what autograd keeps, but for parameters and buffers; each storage once."""

    def __init__(self, module: nn.Module):
        self.own = {tensor.untyped_storage().data_ptr() for tensor in [*module.parameters(), *module.buffers()]}
        self.storages = {}

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *exception):
        self.hooks.__exit__(*exception)

    def _pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())
