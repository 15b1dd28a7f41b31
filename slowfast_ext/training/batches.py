"""The batches of a run: which, in which shape, from where on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..data import ClipDataset, EpochSampler, RawFrameDataset, VideoDataset, build_loader
from .distributed import Processes
from .multigrid import GridBatches, Phase, phase_of, short_cycle
from .settings import DatasetSettings, LoaderSettings, TrainingSettings


def make_dataset(settings: DatasetSettings, num_classes: int, seed: int) -> ClipDataset:
    """The data set of a configuration. Errors name the list, its line and the value."""
    clip = settings.clip
    common = {
        "sampling": clip.sampling,
        "transform": clip.transform,
        "num_classes": num_classes,
        "test": clip.test_mode,
        "seed": seed,
    }
    if settings.videos:
        return VideoDataset(settings.ann_file, settings.data_prefix or ".", decoder=clip.decoder, **common)
    return RawFrameDataset(
        settings.ann_file,
        settings.data_prefix or ".",
        filename_template=settings.filename_tmpl,
        start_index=settings.start_index,
        with_offset=settings.with_offset,
        **common,
    )


@dataclass(frozen=True)
class DataSource:
    """Where samples and batches come from: the lists of the configuration, unless a caller has other data.

    Args:
        make_dataset: as :func:`make_dataset`.
        make_loader: as :func:`~slowfast_ext.data.build_loader`.
    """

    make_dataset: Callable[[DatasetSettings, int, int], ClipDataset] = make_dataset
    make_loader: Callable[..., Any] = build_loader


class TrainingBatches:
    """Batches of the training set, epoch by epoch. Epoch and position alone decide what they hold.

    Args:
        source, settings: see there.
        processes: each gets its share; the shares are equally long.
        seed: of order and crops, the same in all processes.
        phases: of the multigrid long cycle, or none.
        stream: another order from the same seed (precise BN has 1).
    """

    def __init__(
        self,
        source: DataSource,
        settings: TrainingSettings,
        processes: Processes,
        seed: int,
        phases: tuple[Phase, ...] = (),
        *,
        loader: LoaderSettings | None = None,
        stream: int = 0,
    ):
        self.settings, self.phases = settings, phases
        loader = loader or settings.train_loader
        self.videos = loader.videos_per_gpu
        self.dataset = source.make_dataset(settings.train, settings.model.network.num_classes, seed)
        self.sampler = EpochSampler(
            len(self.dataset),
            rank=processes.rank,
            world_size=processes.world_size,
            seed=seed + stream * 2**32,
        )
        # Parts of a batch have statistics of their own: an incomplete batch cannot be cut into them.
        self.drop_last = settings.model.norm == "sub_batch"
        self._make_loader = source.make_loader
        self._options = {"workers": loader.workers_per_gpu, "pin_memory": processes.device.type == "cuda"}
        self._loaders: dict[Any, Any] = {}

    def count(self, epoch: int) -> int:
        """Batches of this process in an epoch, wherever it begins.

        Raises:
            ValueError: none, because the data set is smaller than a batch that must be complete.
        """
        grid = self._grid(epoch)
        count = self.sampler.num_batches(self.videos, self.drop_last) if grid is None else len(grid)
        if count == 0:
            need = self.videos if grid is None else grid.sizes[0]
            raise ValueError(
                f"train: the training set must fill a batch of {need} videos in each process, "
                f"got {len(self.sampler)} videos of {len(self.dataset)}"
            )
        return count

    def epoch(self, epoch: int, position: int = 0) -> Iterator[dict]:
        """The batches of an epoch from number ``position`` on, see :func:`~slowfast_ext.data.build_loader`."""
        self.sampler.set_epoch(epoch)
        self.sampler.set_position(position)
        self.dataset.set_epoch(epoch)
        return iter(self._loader(epoch))

    def close(self) -> None:
        for loader in self._loaders.values():
            loader.close()
        self._loaders = {}

    def _grid(self, epoch: int) -> GridBatches | None:
        multigrid = self.settings.multigrid
        if not self.phases:
            return None
        shape = phase_of(self.phases, epoch).shape
        frames = self.settings.train.clip.sampling.clip_len
        shapes = short_cycle(multigrid, shape, frames) if multigrid.short_cycle else (shape,)
        return GridBatches(self.sampler, shapes, self.videos)

    def _loader(self, epoch: int):
        """One loader, with its processes, for each shape of the long cycle; only the current one is open."""
        key = phase_of(self.phases, epoch).shape if self.phases else None
        if key not in self._loaders:
            self.close()
            grid = self._grid(epoch)
            options = {"sampler": self.sampler, "drop_last": self.drop_last} if grid is None else {"sampler": grid}
            size = self.videos if grid is None else None
            self._loaders[key] = self._make_loader(self.dataset, size, **options, **self._options)
        return self._loaders[key]
