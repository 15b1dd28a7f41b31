"""Checkpoints of SlowFast networks, whoever wrote them."""

from .create import create_model

__all__ = ["create_model"]
