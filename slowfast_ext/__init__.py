"""Fused CUDA kernels for SlowFast video recognition under plain PyTorch."""

from . import models, nn, ops
from ._library import unavailable_reason
from .accelerate import accelerate, explain, restore
from .checkpoints import create_model, load_checkpoint
from .engine import InferenceEngine
from .models import list_models

__all__ = [
    "InferenceEngine",
    "accelerate",
    "create_model",
    "explain",
    "list_models",
    "load_checkpoint",
    "models",
    "nn",
    "ops",
    "restore",
    "unavailable_reason",
]
