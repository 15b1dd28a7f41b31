"""Scores of a validation set, from all processes, in its order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..data import EpochSampler, Failure, normalize
from .batches import DataSource
from .distributed import Processes
from .errors import TrainingError
from .settings import TrainingSettings


@dataclass(frozen=True)
class Scores:
    """What the network says of a validation set.

    Args:
        scores (Tensor[N, num_classes]), labels (int64 Tensor[N]): of the videos that could be read, in the set's order.
        failures: the videos that could not.
        batches: of the loader.
    """

    scores: Tensor
    labels: Tensor
    failures: list[Failure]
    batches: int


class Validation:
    """The validation set of a run, each video once, whatever the number of processes.

    Args:
        source, settings, processes: see there; ``settings.val`` is given.
    """

    def __init__(self, source: DataSource, settings: TrainingSettings, processes: Processes):
        self.processes = processes
        self.through_gpus = settings.evaluation.gpu_collect
        self.average = settings.model.average_clips
        self.normalization = settings.val.clip.normalization
        dataset = source.make_dataset(settings.val, settings.model.network.num_classes, 0)
        self.size = len(dataset)
        sampler = EpochSampler(
            self.size, rank=processes.rank, world_size=processes.world_size, shuffle=False, pad=False
        )
        self.loader = source.make_loader(
            dataset,
            settings.val_loader.videos_per_gpu,
            sampler=sampler,
            workers=settings.val_loader.workers_per_gpu,
            pin_memory=processes.device.type == "cuda",
        )

    @torch.no_grad()
    def scores(self, model: nn.Module, autocast: Callable, stopping: Callable[[], bool]) -> Scores | None:
        """Run the network over the set, in evaluation mode; the batch statistics of the main process count.

        Args:
            model: from normalised clips to logits; its mode is restored.
            autocast: makes the context of the forward pass.
            stopping: asked after each batch; when it says so in any process, all give up and the result is ``None``.
        """
        if self.processes.control is not None:
            for name, buffer in model.named_buffers():
                if name.endswith(("running_mean", "running_var")):
                    dist.broadcast(buffer, src=0)
        was_training = model.training
        model.eval()
        rows: list[tuple[int, Tensor, int]] = []
        failures: list[Failure] = []
        batches = iter(self.loader)
        try:
            # Shares may differ by a batch: the processes ask each other equally often.
            for _ in range(self.processes.maximum(len(self.loader))):
                batch = self._next(batches)
                if batch is not None:
                    failures += batch["errors"]
                    if len(batch["label"]):
                        scores = self._forward(model, batch["clip"], autocast)
                        rows += zip(batch["index"].tolist(), scores.cpu(), batch["label"].tolist(), strict=True)
                if self.processes.maximum(int(stopping())):
                    return None
        finally:
            batches.close()
            model.train(was_training)
        parts = self.processes.gather(rows, through_gpus=self.through_gpus)
        everything = sorted((row for part in parts for row in part), key=lambda row: row[0])
        failures = [failure for part in self.processes.gather(failures) for failure in part]
        if not everything:
            first = failures[0]
            raise TrainingError(f"validation must have readable videos, got none: '{first.path}': {first.reason}")
        scores = torch.stack([row[1] for row in everything])
        return Scores(scores, torch.tensor([row[2] for row in everything]), failures, len(self.loader))

    def _next(self, batches: Iterator[dict]) -> dict | None:
        try:
            return next(batches, None)
        except RuntimeError as error:
            raise TrainingError(f"the validation's loader must give a batch, got an error: {error}") from error

    def _forward(self, model: nn.Module, views: Tensor, autocast: Callable) -> Tensor:
        """uint8 Tensor[B, views, T, H, W, 3] -> float32 Tensor[B, num_classes], averaged over the views."""
        pixels = views.to(self.processes.device, non_blocking=True).flatten(0, 1)
        with autocast():
            scores = model(normalize(pixels, self.normalization.mean, self.normalization.std))
        scores = scores.float().unflatten(0, views.shape[:2])
        return (scores.softmax(2) if self.average == "prob" else scores).mean(1)

    def close(self) -> None:
        self.loader.close()
