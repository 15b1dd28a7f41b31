"""Batches of clips from processes that survive whatever a video does to them."""

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .datasets import ClipDataset, ClipSize, Sample
from .samplers import EpochSampler
from .views import VideoViews
from .workers import TaskFailure, WorkerPool

# More unreadable videos in a row than this are no accident: the data are gone, or the settings are wrong.
MOST_REPLACEMENTS = 10

Index = int | tuple[int, ClipSize]


@dataclass(frozen=True)
class Failure:
    """A video that could not be read, however often it was tried.

    Attributes:
        index: in the dataset.
        path: of the video.
        reason: what happened.
        replacement: index of the video that was tried in its place; None in testing.
    """

    index: int
    path: str
    reason: str
    replacement: int | None


@dataclass(eq=False)
class _Request:
    """A place in a batch: the video that is being read for it, and what has come of it."""

    index: int
    size: ClipSize | None
    asked: int
    tries: int = 0
    sample: Sample | None = None
    failures: list[Failure] = field(default_factory=list)


class ClipLoader:
    """Batches of a dataset, see `build_loader`. A context manager; its processes live until it is closed.

    Attributes:
        failures (Counter[str]): how often each path could not be read, since the loader was made.
    """

    def __init__(
        self,
        dataset: ClipDataset,
        batch_size: int | None,
        sampler: EpochSampler | Iterable[list[Index]],
        pool: WorkerPool,
        *,
        workers: int,
        retries: int,
        prefetch: int,
        drop_last: bool,
        expand_views: bool,
        pin_memory: bool,
    ):
        self.dataset, self.batch_size, self.sampler = dataset, batch_size, sampler
        self.failures = Counter()
        self._pool = pool
        self._ahead = workers * prefetch
        self._retries, self._drop_last = retries, drop_last
        self._expand_views, self._pin_memory = expand_views, pin_memory
        self._iterating = False

    def __len__(self) -> int:
        """Batches in an epoch, wherever it begins."""
        if self.batch_size is None:
            return len(self.sampler)
        return self.sampler.num_batches(self.batch_size, self._drop_last)

    def __iter__(self) -> Iterator[dict]:
        if self._iterating:
            raise RuntimeError("ClipLoader: one iteration must end before the next begins, got a second one")
        self._iterating = True
        by_size = self.batch_size is not None
        batches = self.sampler.batches(self.batch_size, self._drop_last) if by_size else iter(self.sampler)
        pending = deque()
        try:
            self._start(batches, pending)
            while pending:
                while any(request.sample is None for request in pending[0]):
                    for request, outcome in self._pool.wait():
                        self._settle(request, outcome)
                requests = pending.popleft()
                self._start(batches, pending)  # before the caller is busy with the batch
                yield self._collate(requests)
        finally:
            self._iterating = False
            self._pool.cancel()

    def _start(self, batches: Iterator[list[Index]], pending: deque) -> None:
        """Ask for batches, until enough samples are under way beyond the next batch."""
        while not pending or sum(map(len, pending)) - len(pending[0]) < self._ahead:
            batch = next(batches, None)
            if batch is None:
                return
            requests = []
            for item in batch:
                index, size = item if isinstance(item, tuple) else (item, None)
                requests.append(_Request(index, size, asked=index))
            pending.append(requests)
            for request in requests:
                self._read(request)

    def _read(self, request: _Request) -> None:
        request.tries += 1
        item = request.index if request.size is None else (request.index, request.size)
        self._pool.submit(request, (self.dataset.epoch, item))

    def _settle(self, request: _Request, outcome: Sample | TaskFailure) -> None:
        """Keep a sample; where there is none, try again, then another video."""
        if isinstance(outcome, Sample) and outcome.error is None:
            request.sample = outcome
        elif request.tries <= self._retries:
            self._read(request)
        else:
            self._give_up(request, outcome.error if isinstance(outcome, Sample) else outcome.reason)

    def _give_up(self, request: _Request, reason: str) -> None:
        dataset, path = self.dataset, self.dataset.path(request.index)
        self.failures[path] += 1
        if dataset.test:
            request.failures.append(Failure(request.index, path, reason, None))
            request.sample = Sample(request.index, path, dataset.label(request.index), error=reason)
            return
        attempt = len(request.failures) + 1
        if attempt > MOST_REPLACEMENTS:
            raise RuntimeError(f"{attempt} videos in a row cannot be read, the last is '{path}': {reason}")
        replacement = dataset.replacement(request.asked, attempt)
        request.failures.append(Failure(request.index, path, reason, replacement))
        request.index, request.tries = replacement, 0
        self._read(request)

    def _collate(self, requests: list[_Request]) -> dict:
        samples = [request.sample for request in requests if request.sample.error is None]
        batch = {
            "label": self._labels(samples),
            "index": torch.tensor([sample.index for sample in samples], dtype=torch.int64),
            "errors": [failure for request in requests for failure in request.failures],
        }
        clips = [sample.clip for sample in samples]
        if self.dataset.test and not self._expand_views:
            return {"views": [self._pinned(views) for views in clips]} | batch
        return {"clip": self._stack(clips)} | batch

    def _labels(self, samples: list[Sample]) -> Tensor:
        if self.dataset.multi_label:
            empty = torch.zeros(0, self.dataset.num_classes)
            return torch.stack([sample.label for sample in samples]) if samples else empty
        return torch.tensor([sample.label for sample in samples], dtype=torch.int64)

    def _stack(self, clips: list[Tensor | VideoViews]) -> Tensor:
        if not clips:
            sampling, transform = self.dataset.sampling, self.dataset.transform
            views = transform.num_crops * sampling.num_test_clips
            return torch.zeros(
                0, views, sampling.clip_len, transform.crop_size, transform.crop_size, 3, dtype=torch.uint8
            )
        first = clips[0][:]
        stack = torch.empty(len(clips), *first.shape, dtype=torch.uint8, pin_memory=self._pin_memory)
        stack[0] = first
        for place, clip in enumerate(clips[1:], start=1):
            stack[place] = clip[:]
        return stack

    def _pinned(self, views: VideoViews) -> VideoViews:
        if not self._pin_memory:
            return views
        return VideoViews(views.frames.pin_memory(), views.clips.pin_memory(), views.crops, views.crop_size)

    def close(self) -> None:
        """End the processes."""
        self._pool.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


class _Reader:
    """What the processes do: a sample of an epoch."""

    def __init__(self, dataset: ClipDataset):
        self.dataset = dataset

    def __call__(self, task: tuple[int, Index]) -> Sample:
        epoch, index = task
        self.dataset.set_epoch(epoch)
        return self.dataset[index]


def build_loader(
    dataset: ClipDataset,
    batch_size: int | None,
    *,
    sampler: EpochSampler | Iterable[list[Index]],
    workers: int,
    timeout: float | None = 120.0,
    retries: int = 1,
    prefetch: int = 2,
    drop_last: bool = False,
    expand_views: bool = True,
    pin_memory: bool = False,
) -> ClipLoader:
    """Batches of videos that are decoded in other processes.

    A video that raises an error, takes longer than ``timeout`` or ends its process is tried again ``retries`` times.
    In training another one then takes its place, the same in every run; after MOST_REPLACEMENTS of them in a row the
    data are taken for lost. In testing the video is missing from its batch, which can leave it empty. The processes
    import the program that was started: it must not begin its work outside of ``if __name__ == "__main__":``.

    Args:
        dataset: where samples come from. Its epoch at the time of the iteration counts.
        batch_size: videos a batch; None if the sampler yields batches.
        sampler: an `EpochSampler`, whose position is where an iteration begins. Without ``batch_size`` any iterable of
            lists of indices, or of pairs of an index and the clip's (T, H, W), equal within a batch.
        workers: processes, at least 1.
        timeout: seconds for one try of one video, None for no limit.
        retries: further tries of a video.
        prefetch: samples that each process prepares ahead of the batch at hand.
        drop_last: leave out a last batch of fewer videos; with ``batch_size`` only.
        expand_views: testing: put the views of all videos in one tensor. Without it they stay `VideoViews`, which are
            several times smaller, cross to the device as they are and are cut there.
        pin_memory: batches are in page-locked memory, for copies to a GPU that need not be waited for.

    Returns:
        ClipLoader: an iterable of dicts

        - ``clip`` (uint8 Tensor[B, T, H, W, 3]; testing: [B, views, T, H, W, 3], or instead ``views``, a list of
          B `VideoViews`);
        - ``label`` (int64 Tensor[B], or float32 [B, num_classes] of a dataset with ``multi_label``);
        - ``index`` (int64 Tensor[B]): the videos shown, replacements included;
        - ``errors`` (list[Failure]): videos that the batch asked for and that could not be read.

    Raises:
        ValueError: an argument is wrong.
        RuntimeError: while iterating: too many replacements, or an error that is no video's fault.
    """
    for name, value, least in (("retries", retries, 0), ("prefetch", prefetch, 1)):
        if value < least:
            raise ValueError(f"build_loader: {name} must be at least {least}, got {value}")
    if batch_size is None:
        if isinstance(sampler, EpochSampler) or drop_last:
            raise ValueError("build_loader: batch_size must be a number with an EpochSampler or drop_last, got None")
    elif batch_size < 1:
        raise ValueError(f"build_loader: batch_size must be at least 1, got {batch_size}")
    elif not isinstance(sampler, EpochSampler):
        raise ValueError(f"build_loader: sampler must be an EpochSampler with batch_size, got {type(sampler).__name__}")
    elif sampler.length != len(dataset):
        raise ValueError(f"build_loader: the sampler's length must be {len(dataset)}, got {sampler.length}")
    return ClipLoader(
        dataset,
        batch_size,
        sampler,
        WorkerPool(_Reader(dataset), workers, timeout),
        workers=workers,
        retries=retries,
        prefetch=prefetch,
        drop_last=drop_last,
        expand_views=expand_views,
        pin_memory=pin_memory,
    )
