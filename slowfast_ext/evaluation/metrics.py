"""Accuracies of single-label classification, as mmaction2 defines them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

METRICS = ("top_k_accuracy", "mean_class_accuracy")


def top_k_accuracy(scores: Tensor, labels: Tensor, topk: Sequence[int] = (1, 5)) -> list[float]:
    """For each k the share of samples whose label is among the k largest scores.

    Args:
        scores (Tensor[N, num_classes]): larger is better; of equal scores the one of the higher class counts as larger,
            as it does where a stable ascending sort is read from its end.
        labels (int64 Tensor[N]): the right classes.
        topk: at least 1; with no more classes than k the share is 1.
    """
    _check("top_k_accuracy", scores, labels)
    if any(k < 1 for k in topk):
        raise ValueError(f"top_k_accuracy: topk must be at least 1, got {tuple(topk)}")
    target = scores.gather(1, labels[:, None])
    higher_class = torch.arange(scores.shape[1], device=scores.device) > labels[:, None]
    better = ((scores > target) | ((scores == target) & higher_class)).sum(1)
    return [(better < k).double().mean().item() for k in topk]


def mean_class_accuracy(scores: Tensor, labels: Tensor) -> float:
    """Mean over the classes of the share of their samples that are recognised.

    The mean runs over all classes that occur among the labels or among the predictions; a class that is only predicted
    counts as 0.

    Args:
        scores, labels: as :func:`top_k_accuracy`, but of equal scores the first class is predicted.
    """
    _check("mean_class_accuracy", scores, labels)
    num_classes = scores.shape[1]
    predicted = scores.argmax(1)
    samples = torch.bincount(labels, minlength=num_classes)
    hits = torch.bincount(labels[predicted == labels], minlength=num_classes)
    occurring = (samples + torch.bincount(predicted, minlength=num_classes)) > 0
    return (hits[occurring] / samples[occurring].clamp(min=1)).double().mean().item()


def evaluate(
    scores: Tensor, labels: Tensor, metrics: Iterable[str] = METRICS, *, topk: Sequence[int] = (1, 5)
) -> dict[str, float]:
    """The named metrics, as ``top{k}_acc`` for each k of ``topk`` and ``mean_class_accuracy``.

    Raises:
        ValueError: unknown metric, or scores and labels that do not belong together.
    """
    results = {}
    for metric in metrics:
        if metric == "top_k_accuracy":
            shares = top_k_accuracy(scores, labels, topk)
            results |= {f"top{k}_acc": share for k, share in zip(topk, shares, strict=True)}
        elif metric == "mean_class_accuracy":
            results["mean_class_accuracy"] = mean_class_accuracy(scores, labels)
        else:
            raise ValueError(f"evaluate: metrics must be among {', '.join(METRICS)}, got {metric!r}")
    return results


def _check(function: str, scores: Tensor, labels: Tensor) -> None:
    if scores.dim() != 2 or labels.shape != scores.shape[:1] or not len(labels):
        raise ValueError(
            f"{function}: scores and labels must be (N, num_classes) and (N,) with N at least 1, "
            f"got {tuple(scores.shape)} and {tuple(labels.shape)}"
        )
    if labels.min() < 0 or labels.max() >= scores.shape[1]:
        raise ValueError(
            f"{function}: labels must be in [0, {scores.shape[1]}), got {labels.min().item()} to {labels.max().item()}"
        )
