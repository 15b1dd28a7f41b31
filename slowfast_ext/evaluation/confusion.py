"""Which classes are taken for which."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from .files import written_then_renamed


def confusion_matrix(scores: Tensor, labels: Tensor) -> Tensor:
    """How many samples of class i (row) are predicted as class j (column): int64 Tensor[num_classes, num_classes].

    Args:
        scores (Tensor[N, num_classes]): of equal ones the first class is predicted.
        labels (int64 Tensor[N]): the right classes.
    """
    num_classes = scores.shape[1]
    places = labels * num_classes + scores.argmax(1)
    return torch.bincount(places, minlength=num_classes**2).view(num_classes, num_classes)


def recalls(matrix: Tensor) -> Tensor:
    """The share of each class's samples that are recognised, NaN for a class without: float64 Tensor[num_classes]."""
    return matrix.diagonal().double() / matrix.sum(1)


def most_confused(matrix: Tensor, count: int) -> list[tuple[int, int, int]]:
    """The most frequent errors, at most ``count``, as (right class, predicted class, samples), most frequent first."""
    errors = matrix - matrix.diagonal().diag()
    samples, places = errors.flatten().sort(descending=True, stable=True)
    pairs = zip(places[:count].tolist(), samples[:count].tolist(), strict=True)
    return [(*divmod(place, len(matrix)), number) for place, number in pairs if number]


def plot_confusion(matrix: Tensor, names: list[str] | None, path: str | os.PathLike) -> None:
    """Draw the matrix, each row as shares of its class, into a file whose suffix says the format.

    Args:
        matrix: see :func:`confusion_matrix`.
        names: of the classes; written beside the rows and columns of up to 40 classes.
        path: of the picture.
    """
    from matplotlib.figure import Figure

    shares = matrix.double() / matrix.sum(1, keepdim=True).clamp(min=1)
    size = min(4 + 0.25 * len(matrix), 14)
    figure = Figure(figsize=(size, size), layout="constrained")
    axis = figure.subplots()
    picture = axis.imshow(shares.numpy(), vmin=0, vmax=1, cmap="Blues")
    axis.set_xlabel("predicted")
    axis.set_ylabel("right")
    if names and len(names) <= 40:
        axis.set_xticks(range(len(names)), names, rotation=90)
        axis.set_yticks(range(len(names)), names)
    figure.colorbar(picture, label="share of the class", shrink=0.6)
    with written_then_renamed(path) as temporary:
        figure.savefig(temporary)
