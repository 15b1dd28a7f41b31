"""A network of the zoo, with weights if wanted."""

from __future__ import annotations

import os

from ..models import SlowFastRecognizer, build_model


def create_model(
    name: str | os.PathLike, *, num_classes: int | None = None, checkpoint: str | os.PathLike | None = None
) -> SlowFastRecognizer:
    """A SlowFast network of the zoo, in training mode.

    Args:
        name: one of :func:`list_models`, or the path of a configuration of that name, of which only the stem is used
            (``configs/recognition/slowfast/<name>.py``).
        num_classes: width of the classifier; the zoo's own by default.
        checkpoint: weights to load into it, of any kind that :func:`load_checkpoint` knows; ``.load_report`` of the
            result then says what fitted. A classifier of another width keeps its initialisation.

    Raises:
        ValueError: unknown name, or a file that is no SlowFast checkpoint.
        FileNotFoundError: no such checkpoint.
    """
    model = build_model(name, num_classes)
    if checkpoint is None:
        return model
    from .load import load_checkpoint

    return load_checkpoint(checkpoint, model)
