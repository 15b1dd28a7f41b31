"""A network of the zoo, with weights if wanted."""

from __future__ import annotations

import os

from torch import nn

from ..models import build_model
from .load import load_checkpoint


def create_model(
    name: str | os.PathLike, *, num_classes: int | None = None, checkpoint: str | os.PathLike | None = None
) -> nn.Module:
    """A SlowFast network of the zoo, in training mode.

    Args:
        name: one of :func:`list_models`, or the path of a configuration of that name, of which only the stem is used
            (``configs/recognition/slowfast/<name>.py``).
        num_classes: width of the classifier; the zoo's own by default.
        checkpoint: weights to load into it, of any kind that :func:`load_checkpoint` knows; ``.load_report`` of the
            result then says what fitted. If ``num_classes`` differs from the file's, the classifier keeps its
            initial values.

    Raises:
        ValueError: unknown name, or a file that is no SlowFast checkpoint.
        FileNotFoundError: no such checkpoint.
    """
    model = build_model(name, num_classes)
    return model if checkpoint is None else load_checkpoint(checkpoint, model, num_classes=num_classes)
