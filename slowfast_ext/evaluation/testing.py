"""Scores of a whole data set, each video by all of its views."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data import ClipDataset, VideoViews, build_loader
from ..engine import InferenceEngine
from .inference import PlainEngine, default_views

AVERAGES = ("score", "prob", None)


@dataclass(frozen=True)
class VideoScores:
    """What the network says of one video, or why it says nothing.

    Attributes:
        index: in the data set.
        scores (float32 array): (num_classes,), averaged over the views, or (views, num_classes); None with an error.
        error: why the video has none, else None.
    """

    index: int
    scores: np.ndarray | None
    error: str | None = None


def score_videos(
    engine: PlainEngine | InferenceEngine,
    dataset: ClipDataset,
    indices: Sequence[int],
    *,
    average: str | None = "prob",
    videos: int = 1,
    views: int | None = None,
    workers: int = 2,
) -> Iterator[VideoScores]:
    """Scores of some videos of a data set, in this order, while others are decoded.

    Args:
        engine: see :func:`~slowfast_ext.evaluation.inference.prepare`.
        dataset: in test mode.
        indices: of the videos.
        average: ``prob``, the mean over the views of softmax(logits); ``score``, of the logits; None, the logits of
            each view.
        videos: whose views may share a forward pass.
        views: run at a time; by default as many as the engine was made for.
        workers: decoding processes.
    """
    if average not in AVERAGES:
        raise ValueError(f"score_videos: average must be one of {AVERAGES}, got {average!r}")
    if not indices:
        return
    at_once = views or engine.max_views or default_views(engine.device)
    batches = [list(indices[start : start + videos]) for start in range(0, len(indices), videos)]
    pin_memory = engine.device.type == "cuda"
    with build_loader(
        dataset, None, sampler=batches, workers=workers, expand_views=False, pin_memory=pin_memory
    ) as loader:
        for asked, batch in zip(batches, loader, strict=True):
            logits = view_logits(engine, batch["views"], at_once) if batch["views"] else ()
            scored = {
                index: _average(rows, average) for index, rows in zip(batch["index"].tolist(), logits, strict=True)
            }
            errors = {failure.index: failure.reason for failure in batch["errors"]}
            for index in asked:
                scores = scored.get(index)
                if scores is not None and not np.isfinite(scores).all():
                    yield VideoScores(index, None, "the network's results are not finite numbers")
                else:
                    yield VideoScores(index, scores, errors.get(index))


def view_logits(engine: PlainEngine | InferenceEngine, videos: Sequence[VideoViews], at_once: int) -> list[Tensor]:
    """Logits of all views of some videos, float32 Tensor[views, num_classes] each; ``at_once`` views in one pass."""
    # Views of a video share frames, so they cross to the device as these and are cut there.
    videos = [video.to(engine.device) for video in videos]
    places = [(video, view) for video in videos for view in range(len(video))]
    logits = []
    for start in range(0, len(places), at_once):
        clips = [video[view : view + 1] for video, view in places[start : start + at_once]]
        logits.append(engine(torch.cat(clips)))
    return list(torch.cat(logits).split([len(video) for video in videos]))


def _average(logits: Tensor, average: str | None) -> np.ndarray:
    if average is None:
        return logits.cpu().numpy()
    return (logits.softmax(1) if average == "prob" else logits).mean(0).cpu().numpy()
