"""Evaluation: what scores are worth."""

from .metrics import evaluate, mean_class_accuracy, top_k_accuracy

__all__ = ["evaluate", "mean_class_accuracy", "top_k_accuracy"]
