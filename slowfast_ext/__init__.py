"""Fused CUDA kernels for SlowFast video recognition under plain PyTorch."""

from . import models, nn, ops
from ._library import unavailable_reason
from .checkpoints import create_model, load_checkpoint
from .models import list_models

__all__ = ["create_model", "list_models", "load_checkpoint", "models", "nn", "ops", "unavailable_reason"]
