"""Where each buffer of a plan lies in one arena."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .plan import Step, Value

ALIGNMENT = 256  # bytes, as cudaMalloc gives; the kernels' widest accesses and TMA need less


@dataclass(frozen=True)
class Lifetime:
    """A buffer is written first in step ``first`` and read last in step ``last``, both counted."""

    buffer: Value
    first: int
    last: int


def lifetimes(steps: Sequence[Step]) -> dict[str, list[Lifetime]]:
    """The buffers of a plan in groups whose memory can be shared within the group, by its name.

    The steps of a pathway run one after the other, but nothing orders the two pathways except where one waits for the
    other's result. So each has memory of its own, and what both touch gets a lifetime that holds whatever the order:

    - a concatenation, which the fast pathway may fill long before the slow one is there, lives from the beginning;
    - the clip, which both read, and what the last step reads and writes, live all the time.
    """
    groups: dict[str, list[Lifetime]] = {"slow": [], "fast": [], "both": []}
    first, last, pathways = {}, {}, {}
    for index, step in enumerate(steps):
        for value in (*step.inputs, *step.outputs):
            first.setdefault(value.buffer, index)
            last[value.buffer] = index
            pathways.setdefault(value.buffer, set()).add(step.pathway)
    final = len(steps) - 1
    written = {value.buffer for step in steps for value in step.outputs}
    for buffer in first:
        if last[buffer] == final or buffer not in written:
            groups["both"].append(Lifetime(buffer, 0, final))
        elif len(pathways[buffer]) == 2:
            groups["slow"].append(Lifetime(buffer, 0, last[buffer]))
        else:
            groups[pathways[buffer].pop()].append(Lifetime(buffer, first[buffer], last[buffer]))
    return groups


def place(group: Sequence[Lifetime]) -> tuple[dict[str, int], int]:
    """Offsets by buffer name, and the bytes needed.

    Largest first, each at the lowest offset where it meets no buffer that lives at the same time ("greedy by size" of
    Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference", arXiv 2001.03288).
    """
    offsets: dict[str, int] = {}
    placed: list[tuple[Lifetime, int, int]] = []
    for lifetime in sorted(group, key=lambda lifetime: -lifetime.buffer.bytes):
        size = -(-lifetime.buffer.bytes // ALIGNMENT) * ALIGNMENT
        start = 0
        for other, other_start, other_end in sorted(placed, key=lambda item: item[1]):
            if other.last < lifetime.first or lifetime.last < other.first:
                continue
            if start + size <= other_start:
                break
            start = max(start, other_end)
        placed.append((lifetime, start, start + size))
        offsets[lifetime.buffer.name] = start
    return offsets, max((end for *_, end in placed), default=0)


def place_all(steps: Sequence[Step]) -> tuple[dict[str, int], int]:
    """As `place`, for all groups one behind the other."""
    offsets, total = {}, 0
    for group in lifetimes(steps).values():
        places, size = place(group)
        offsets |= {name: total + offset for name, offset in places.items()}
        total += size
    return offsets, total


class Arena:
    """One allocation, and the tensors of a plan in it."""

    def __init__(self, steps: Sequence[Step], device: torch.device):
        self.offsets, self.bytes = place_all(steps)
        self._memory = torch.empty(self.bytes, dtype=torch.uint8, device=device)

    def tensor(self, value: Value) -> Tensor:
        """In the value's shape: (N, C, T, H, W) in channels_last_3d, or a slice of channels; other ranks are dense."""
        buffer = value.buffer
        start = self.offsets[buffer.name]
        flat = self._memory[start : start + buffer.bytes].view(buffer.dtype)
        if len(buffer.shape) != 5 or buffer.dtype == torch.uint8:
            return flat.view(buffer.shape)
        n, channels, *sizes = buffer.shape
        tensor = flat.view(n, *sizes, channels).permute(0, 4, 1, 2, 3)
        return tensor if value.parent is None else tensor[:, value.offset : value.offset + value.shape[1]]
