"""Which videos come in which order, in which process, from which batch on."""

from collections.abc import Iterator

import torch


class EpochSampler(torch.utils.data.Sampler):
    """The share of one process in an epoch over a dataset: every ``world_size``-th index from ``rank`` on.

    The order depends on seed and epoch alone, so that a run can stop anywhere and go on there.

    Args:
        length: of the dataset.
        rank, world_size: this process and their number.
        shuffle: another order in each epoch; otherwise that of the dataset.
        seed: of the order, added to the epoch.
        pad: as many indices for each process, by beginning again at the first ones of the epoch (training). Without it
            each index comes exactly once (testing), and some processes have one index less.
    """

    def __init__(
        self,
        length: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        pad: bool = True,
    ):
        if length < 1:
            raise ValueError(f"EpochSampler: length must be at least 1, got {length}")
        if not 0 <= rank < world_size:
            raise ValueError(f"EpochSampler: rank must be in [0, {world_size}), got {rank}")
        self.length, self.rank, self.world_size = length, rank, world_size
        self.shuffle, self.seed, self.pad = shuffle, seed, pad
        self.epoch = self.position = 0

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, counted from 0, at its first batch."""
        self.epoch, self.position = epoch, 0

    def set_position(self, batch: int) -> None:
        """Leave out the first ``batch`` batches of this epoch, which were done before."""
        if batch < 0:
            raise ValueError(f"EpochSampler: position must be at least 0, got {batch}")
        self.position = batch

    def __len__(self) -> int:
        """Indices of this process in an epoch, wherever it begins."""
        if self.pad:
            return -(-self.length // self.world_size)
        return len(range(self.rank, self.length, self.world_size))

    def __iter__(self) -> Iterator[int]:
        """All indices of this process in this epoch."""
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(self.length, generator=generator).tolist()
        else:
            order = range(self.length)
        end = len(self) * self.world_size if self.pad else self.length
        return iter([order[place % self.length] for place in range(self.rank, end, self.world_size)])

    def batches(self, batch_size: int, drop_last: bool = False) -> Iterator[list[int]]:
        """Batches from the position on; the last one may be smaller, unless it is dropped."""
        indices = list(self)
        for batch in range(self.position, self.num_batches(batch_size, drop_last)):
            yield indices[batch * batch_size : (batch + 1) * batch_size]

    def num_batches(self, batch_size: int, drop_last: bool = False) -> int:
        """Batches in an epoch, wherever it begins."""
        return len(self) // batch_size if drop_last else -(-len(self) // batch_size)
