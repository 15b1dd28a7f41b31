"""A whole SlowFast network as one prepared program."""

from .ceilings import Ceilings, measure_ceilings
from .plan import Plan, Step
from .runtime import InferenceEngine

__all__ = ["Ceilings", "InferenceEngine", "Plan", "Step", "measure_ceilings"]
