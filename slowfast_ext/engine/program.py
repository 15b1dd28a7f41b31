"""What all backends' programs have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import ops
from .network import Network
from .plan import Plan, Signature, Step

POOLING = ((1, 3, 3), (1, 2, 2), (0, 1, 1))  # of a stem: kernel, stride, padding


class Program(ABC):
    """A plan that can run. Not for two threads at once.

    Attributes:
        signature: of the clips it takes.
        steps: what it runs.
        notes: what else its plan says.
    """

    signature: Signature
    steps: Sequence[Step]
    notes: tuple[str, ...]

    @abstractmethod
    def __call__(self, clip: Tensor) -> Tensor:
        """Clips of the signature, on the network's device -> Tensor[N, num_classes] or Tensor[N, C], float32."""

    @abstractmethod
    def plan(self) -> Plan:
        """What it does, for people."""


def normalisation_vectors(network: Network) -> tuple[Tensor, Tensor]:
    """``scale`` and ``shift`` (Tensor[3], float32) with which a raw pixel is normalised: ``pixel * scale + shift``."""
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in vars(network.config.normalization).values())
    return (1 / std).float().to(network.device), (-mean / std).float().to(network.device)


def slow_frames(network: Network, signature: Signature) -> list[int]:
    """Which frames of the clip the slow pathway sees."""
    return network.config.slow_frames(signature.clip[1])


def fast_frames(network: Network, signature: Signature) -> list[int] | None:
    """Which frames of the clip the fast pathway sees; None for all."""
    step = network.config.resample_rate // network.config.speed_ratio
    return None if step == 1 else list(range(0, signature.clip[1], step))


def finish(network: Network, operator: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The last step, from the feature maps (slow, fast)."""
    if operator == "features":
        return lambda slow, fast: torch.cat([x.mean((2, 3, 4), dtype=torch.float32) for x in (slow, fast)], 1)
    pooling = network.config.head_pooling
    options = {
        "window": None if pooling == "global" else network.config.head_window,
        "softmax_positions": pooling == "sliding_softmax",
    }
    return lambda slow, fast: ops.pool_head(slow, fast, network.head_weight, network.head_bias, **options)
