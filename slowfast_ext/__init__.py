"""Fused CUDA kernels for SlowFast video recognition under plain PyTorch."""

from . import nn, ops
from ._library import unavailable_reason

__all__ = ["nn", "ops", "unavailable_reason"]
