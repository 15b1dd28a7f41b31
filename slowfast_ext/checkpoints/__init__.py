"""Checkpoints of SlowFast networks, whoever wrote them."""

from .convert import convert
from .create import create_model
from .load import LoadReport, Mismatch, load_checkpoint

__all__ = ["LoadReport", "Mismatch", "convert", "create_model", "load_checkpoint"]
