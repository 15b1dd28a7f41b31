"""Trained networks at work: views of videos to probabilities and features, what these are worth, and files for them."""

from .metrics import METRICS, evaluate, mean_class_accuracy, top_k_accuracy

__all__ = ["METRICS", "evaluate", "mean_class_accuracy", "top_k_accuracy"]
