"""Multigrid training: clips change shape with the epoch and, in turn, with the batch.

Wu et al., "A Multigrid Method for Efficiently Training Video Models" (arXiv 1912.00998). Small clips come in large
batches, so that a batch costs the same in every shape. The long cycle is the one that the zoo's network was trained
with, epoch for epoch. Its lengths are computed for batches that also go through the short cycle, which was meant to run
and did not; here it runs unless ``short_cycle`` is off, and the long cycle is the same either way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle, islice

from ..data import EpochSampler
from .settings import MultigridSettings


@dataclass(frozen=True)
class Shape:
    """A batch: ``multiplier`` times the videos of a full-size batch, ``frames`` frames of ``size`` x ``size``."""

    multiplier: int
    frames: int
    size: int


@dataclass(frozen=True)
class Phase:
    """Epochs ``start`` to ``end`` - 1 of the long cycle.

    Args:
        shape: of its batches; with the short cycle, of every third of them.
        rate: multiplies the learning rate of the recipe.
    """

    start: int
    end: int
    shape: Shape
    rate: float


def long_cycle(
    settings: MultigridSettings, frames: int, epochs: int, steps: Sequence[int], gamma: float
) -> tuple[Phase, ...]:
    """The phases of a run of ``int(epochs * settings.epoch_factor)`` epochs.

    Between two steps of the learning rate the shapes take turns, from small to full size; a shape gets epochs in
    proportion to its mean batch, so that each gets as many iterations. The last phase, after the last step, is
    fine-tuning at full size, as much shortened as the phases before it; its first half keeps the rate of the step
    before, its second half has a hundredth of it.

    Args:
        settings: see there.
        frames: of a full-size clip.
        epochs, steps: of the schedule that the run replaces.
        gamma: factor of the rate at a step.
    """
    shapes = [short_cycle(settings, shape, frames) for shape in _long_shapes(settings, frames)]
    batches = [sum(shape.multiplier for shape in turn) / len(turn) for turn in shapes]
    parts: list[tuple[int, Shape, float]] = []  # index of the step, shape, epochs before they are stretched
    for index, (first, last) in enumerate(zip([0, *steps], steps, strict=False)):
        for turn, batch in zip(shapes, batches, strict=True):
            parts.append((index, turn[-1], (last - first) * batch / sum(batches)))
    iterations = sum(length / batch for (_, _, length), batch in zip(parts, cycle(batches), strict=False))
    saving = steps[-1] / iterations
    parts.append((len(steps), shapes[-1][-1], (epochs - steps[-1]) / saving * batches[-1]))

    stretch = epochs * settings.epoch_factor / sum(length for _, _, length in parts)
    ends = [round(end) for end in accumulate(length * stretch for _, _, length in parts)]
    phases = [
        Phase(start, end, shape, gamma**index * shape.multiplier)
        for (index, shape, _), start, end in zip(parts, [0, *ends], ends, strict=False)
    ]
    tuning = phases.pop()
    end = min(tuning.end, int(epochs * settings.epoch_factor))
    middle = (tuning.start + end) // 2
    before = gamma ** (len(steps) - 1) * tuning.shape.multiplier
    phases += [
        Phase(tuning.start, middle, tuning.shape, before),
        Phase(middle, end, tuning.shape, before * gamma**2),
    ]
    return tuple(phases)


def short_cycle(settings: MultigridSettings, shape: Shape, frames: int) -> tuple[Shape, ...]:
    """The three shapes that batches take in turn: two of smaller sides, then the long cycle's own.

    Args:
        settings: see there.
        shape: of the long cycle.
        frames: of a full-size clip.
    """
    smaller = [_shape(settings, frames, shape.frames, factor) for factor in settings.short_cycle_factors]
    return (*smaller, shape)


def phase_of(phases: Sequence[Phase], epoch: int) -> Phase:
    """The phase of an epoch, counted from 0."""
    return next(phase for phase in phases if epoch < phase.end)


class GridBatches:
    """The batches of an epoch in which the shape changes with the batch, for :func:`~slowfast_ext.data.build_loader`.

    Batches of the shapes come in turn, each of ``videos`` times its multiplier; an incomplete last one is left out.

    Args:
        sampler: order and position of the epoch.
        shapes: of the batches of one turn.
        videos: of a full-size batch of this process.
    """

    def __init__(self, sampler: EpochSampler, shapes: Sequence[Shape], videos: int):
        self.sampler = sampler
        self.shapes = tuple(shapes)
        self.sizes = [videos * shape.multiplier for shape in shapes]

    def __len__(self) -> int:
        """Batches of the whole epoch, wherever it begins."""
        return count_batches(len(self.sampler), self.sizes)

    def __iter__(self) -> Iterator[list[tuple[int, tuple[int, int, int]]]]:
        """From the sampler's position on: indices, each with the clip's (T, H, W)."""
        indices = list(self.sampler)
        start = 0
        for batch, (size, shape) in enumerate(islice(cycle(zip(self.sizes, self.shapes, strict=True)), len(self))):
            if batch >= self.sampler.position:
                yield [(index, (shape.frames, shape.size, shape.size)) for index in indices[start : start + size]]
            start += size


def count_batches(length: int, sizes: Sequence[int]) -> int:
    """Complete batches in ``length`` samples when their sizes repeat."""
    turns, rest = divmod(length, sum(sizes))
    return turns * len(sizes) + sum(end <= rest for end in accumulate(islice(sizes, len(sizes) - 1)))


def _long_shapes(settings: MultigridSettings, frames: int) -> list[Shape]:
    return [_shape(settings, frames, round(frames * time), factor) for time, factor in settings.long_cycle_factors]


def _shape(settings: MultigridSettings, full_frames: int, frames: int, factor: float) -> Shape:
    size = round(settings.default_size * factor)
    return Shape(round(full_frames * settings.default_size**2 / (frames * size**2)), frames, size)
