import pytest
import torch

from slowfast_ext.data import EpochSampler


def shares(length, world_size, **options):
    return [list(EpochSampler(length, rank=rank, world_size=world_size, **options)) for rank in range(world_size)]


def test_an_epoch_is_the_permutation_of_seed_plus_epoch():
    sampler = EpochSampler(10, seed=3)
    sampler.set_epoch(4)
    assert list(sampler) == torch.randperm(10, generator=torch.Generator().manual_seed(7)).tolist()
    first = list(sampler)
    sampler.set_epoch(5)
    assert list(sampler) != first


def test_processes_take_turns_and_padding_begins_again_at_the_front():
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0)).tolist()
    padded = [*order, *order[:2]]
    assert shares(10, 4) == [padded[rank::4] for rank in range(4)]
    assert shares(3, 8, shuffle=False) == [[0], [1], [2], [0], [1], [2], [0], [1]]


@pytest.mark.parametrize(("length", "world_size"), [(10, 4), (3, 8), (12, 3), (1, 1)])
def test_without_padding_each_index_comes_once(length, world_size):
    parts = shares(length, world_size, shuffle=False, pad=False)
    assert sorted(index for part in parts for index in part) == list(range(length))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for rank, part in enumerate(parts):
        assert part == list(range(rank, length, world_size))
        assert len(EpochSampler(length, rank=rank, world_size=world_size, pad=False)) == len(part)


def test_an_epoch_goes_on_at_a_position():
    sampler = EpochSampler(11, seed=1)
    everything = list(sampler.batches(4))
    assert [len(batch) for batch in everything] == [4, 4, 3]
    assert sampler.num_batches(4) == 3
    sampler.set_position(2)
    assert list(sampler.batches(4)) == everything[2:]
    assert list(sampler.batches(4, drop_last=True)) == []
    assert sampler.num_batches(4, drop_last=True) == 2
    sampler.set_epoch(0)
    assert list(sampler.batches(4)) == everything


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"length": 3, "rank": 2, "world_size": 2}, r"rank must be in \[0, 2\), got 2"),
    ],
)
def test_impossible_arguments_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        EpochSampler(**arguments)
    with pytest.raises(ValueError, match="position must be at least 0, got -1"):
        EpochSampler(3).set_position(-1)
