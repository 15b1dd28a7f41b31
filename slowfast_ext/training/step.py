"""One training step: forward, backward, update."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..data import normalize
from ..models import Normalization
from .settings import OptimizerSettings

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingStep:
    """Cross-entropy, SGD with clipped gradients, and where wanted 16-bit arithmetic and accumulated gradients.

    Args:
        model: from normalised clips to logits, or its :class:`DistributedDataParallel`.
        settings: of SGD; momentum, weight decay (on all parameters) and Nesterov's form are torch's.
        normalization: of the clips.
        label_smoothing: share of the label that is spread over all classes.
        amp: ``bf16``, ``fp16`` (with a scaled loss) or ``None`` for float32.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: OptimizerSettings,
        normalization: Normalization,
        label_smoothing: float = 0.0,
        amp: str | None = None,
    ):
        self.model = model
        self.clip_norm = settings.clip_norm
        self.normalization = normalization
        self.label_smoothing = label_smoothing
        self.device = next(model.parameters()).device
        self.amp = AMP_DTYPES[amp] if amp else None
        self.optimizer = torch.optim.SGD(
            model.parameters(),
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.nesterov,
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp == "fp16")

    def clip(self, batch: dict) -> Tensor:
        """The uint8 clips of a batch, on the device, normalised: float32 Tensor[N, 3, T, H, W]."""
        pixels = batch["clip"].to(self.device, non_blocking=True)
        return normalize(pixels, self.normalization.mean, self.normalization.std)

    def autocast(self):
        return nullcontext() if self.amp is None else torch.autocast(self.device.type, self.amp)

    def __call__(self, batch: dict, lr: float, *, parts: int = 1, update: bool = True) -> dict[str, Tensor]:
        """Add the gradients of a batch, and update the weights.

        Args:
            batch: ``clip`` (uint8 Tensor[N, T, H, W, 3]) and ``label`` (int64 Tensor[N]).
            lr: learning rate of the update.
            parts: batches whose gradients make one update; each counts with one over their number.
            update: this is the last of them. The others exchange no gradients between processes.

        Returns:
            0-dimensional tensors on the device: ``top1_acc``, ``top5_acc``, ``loss_cls``, ``loss``, and with an update
            ``grad_norm``, the L2 norm of the gradients before they are clipped.
        """
        exchange = isinstance(self.model, DistributedDataParallel) and not update
        with self.model.no_sync() if exchange else nullcontext():
            with self.autocast():
                scores = self.model(self.clip(batch))
            scores = scores.float() if self.amp else scores
            label = batch["label"].to(self.device, non_blocking=True)
            loss = F.cross_entropy(scores, label, label_smoothing=self.label_smoothing)
            self.scaler.scale(loss / parts).backward()
        result = _accuracies(scores.detach(), label)
        result |= {"loss_cls": loss.detach(), "loss": loss.detach()}
        if update:
            result["grad_norm"] = self._update(lr)
        return result

    def _update(self, lr: float) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.optimizer)
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        if self.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.detach()


def _accuracies(scores: Tensor, label: Tensor) -> dict[str, Tensor]:
    """Shares of the batch whose label is the largest, or among the five largest, of the scores."""
    target = scores.gather(1, label[:, None])
    better = (scores > target).sum(1)
    return {"top1_acc": (better < 1).float().mean(), "top5_acc": (better < 5).float().mean()}
