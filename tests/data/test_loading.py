from collections import Counter

import pytest
import torch
from faulty import FaultyDataset

from slowfast_ext.data import ClipSampling, EpochSampler, Failure, SpatialTransform, build_loader

SAMPLING = ClipSampling(clip_len=4, frame_interval=2)
TRAINING = SpatialTransform(crop_size=16, short_side=None, flip=0.5)
TESTING = SpatialTransform(crop_size=16, short_side=16, crop="three")
GOOD = [f"v-{number}" for number in range(10)]


def make(tmp_path, names, *, test=False, seed=0):
    """A dataset whose videos are labelled with their index."""
    path = tmp_path / "list.txt"
    path.write_text("".join(f"{name}.mp4 {index}\n" for index, name in enumerate(names)))
    options = {"transform": TESTING, "test": True} if test else {"transform": TRAINING}
    return FaultyDataset(path, tmp_path, sampling=SAMPLING, seed=seed, **options)


def in_order(dataset, batch_size, **options):
    options = {"workers": 2, "timeout": 20} | options
    return build_loader(dataset, batch_size, sampler=EpochSampler(len(dataset), shuffle=False, pad=False), **options)


def numbers(batch):
    """Which video each clip shows."""
    return batch["clip"].flatten(1, -2)[:, 0, 0].tolist()


def test_batches_hold_clips_labels_and_indices_in_the_sampler_s_order(tmp_path):
    dataset = make(tmp_path, GOOD)
    with in_order(dataset, 4) as loader:
        batches = list(loader)
        assert len(loader) == 3
    assert [batch["index"].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    for batch in batches:
        assert batch["clip"].dtype == torch.uint8
        assert batch["clip"].shape[1:] == (4, 16, 16, 3)
        assert batch["label"].dtype == batch["index"].dtype == torch.int64
        assert numbers(batch) == batch["label"].tolist() == batch["index"].tolist()
        assert batch["errors"] == []


def test_neither_workers_nor_a_resumption_change_a_run(tmp_path):
    dataset = make(tmp_path, GOOD, seed=3)
    runs = []
    for workers, position in [(1, 0), (3, 0), (2, 2)]:
        sampler = EpochSampler(10, seed=3)
        with build_loader(dataset, 3, sampler=sampler, workers=workers, timeout=20) as loader:
            run = []
            for epoch in range(2):
                dataset.set_epoch(epoch)
                sampler.set_epoch(epoch)
                if epoch == 1:
                    sampler.set_position(position)
                run += list(loader)
        runs.append(run)
    assert [len(run) for run in runs] == [8, 8, 6]
    resumed = [*runs[2][:4], *runs[0][4:6], *runs[2][4:]]
    for other in (runs[1], resumed):
        for first, second in zip(runs[0], other, strict=True):
            assert torch.equal(first["clip"], second["clip"])
            assert torch.equal(first["index"], second["index"])
    epochs = [torch.cat([batch["clip"] for batch in epoch]) for epoch in (runs[0][:4], runs[0][4:])]
    orders = [torch.cat([batch["index"] for batch in epoch]) for epoch in (runs[0][:4], runs[0][4:])]
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(epochs[0][orders[0].argsort()], epochs[1][orders[1].argsort()])


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("hangs", "it took longer than 1.5 s"),
        ("dies", "its process died (SIGKILL, which the system does when memory runs out)"),
    ],
)
def test_an_unreadable_video_is_replaced_in_training_and_reported(tmp_path, fault, reason):
    names = [*GOOD[:3], fault, *GOOD[3:]]
    dataset = make(tmp_path, names, seed=1)
    replacement = dataset.replacement(3, 1)
    assert replacement != 3
    for _ in range(2):  # always the same one
        with in_order(dataset, 4, timeout=1.5) as loader:
            first, *others = loader
            assert first["errors"] == [Failure(3, str(tmp_path / f"{fault}.mp4"), reason, replacement)]
            assert first["index"].tolist() == [0, 1, 2, replacement]
            assert torch.equal(first["clip"][3], dataset[replacement].clip)
            assert [batch["index"].tolist() for batch in others] == [[4, 5, 6, 7], [8, 9, 10]]
            assert loader.failures == Counter({str(tmp_path / f"{fault}.mp4"): 1})


def test_an_unreadable_video_is_an_entry_of_its_own_in_testing(tmp_path):
    dataset = make(tmp_path, ["v-0", "hangs", "v-2", "dies"], test=True)
    with in_order(dataset, 1, timeout=1.5, retries=0) as loader:
        batches = list(loader)
    assert [batch["index"].tolist() for batch in batches] == [[0], [], [2], []]
    assert [batch["label"].tolist() for batch in batches] == [[0], [], [2], []]
    assert [tuple(batch["clip"].shape) for batch in batches] == [
        (1, 3, 4, 16, 16, 3),
        (0, 3, 4, 16, 16, 3),
        (1, 3, 4, 16, 16, 3),
        (0, 3, 4, 16, 16, 3),
    ]
    assert batches[1]["errors"] == [Failure(1, str(tmp_path / "hangs.mp4"), "it took longer than 1.5 s", None)]
    assert [failure.index for failure in batches[3]["errors"]] == [3]


def test_a_video_that_can_be_read_the_second_time_is_no_failure(tmp_path):
    dataset = make(tmp_path, ["v-0", "recovers-1"])
    with in_order(dataset, 2) as loader:
        (batch,) = loader
    assert batch["index"].tolist() == [0, 1]
    assert batch["errors"] == []


def test_data_that_are_gone_end_the_run(tmp_path):
    dataset = make(tmp_path, ["dies"] * 3)
    with (
        in_order(dataset, 1, retries=0) as loader,
        pytest.raises(RuntimeError, match=r"11 videos in a row cannot be read, the last is '.*dies.mp4': its process"),
    ):
        list(loader)


def test_a_mistake_in_the_program_is_no_fault_of_a_video(tmp_path):
    dataset = make(tmp_path, ["v-0", "raises"])
    with in_order(dataset, 1) as loader, pytest.raises(RuntimeError, match=r"(?s)worker.*ZeroDivisionError: a mistake"):
        list(loader)


def test_batches_of_a_batch_sampler_may_differ_in_size(tmp_path):
    dataset = make(tmp_path, GOOD)
    batches = [[(0, (4, 8, 8)), (1, (4, 8, 8))], [(2, (2, 12, 14))], [3, 4, 5]]
    with build_loader(dataset, None, sampler=batches, workers=1) as loader:
        shapes = [tuple(batch["clip"].shape) for batch in loader]
        assert len(loader) == 3
    assert shapes == [(2, 4, 8, 8, 3), (1, 2, 12, 14, 3), (3, 4, 16, 16, 3)]


def test_views_may_stay_together_until_they_are_on_the_device(tmp_path):
    dataset = make(tmp_path, GOOD[:3], test=True)
    with in_order(dataset, 2, expand_views=False) as loader:
        batches = list(loader)
    with in_order(dataset, 2) as loader:
        for batch, expanded in zip(batches, loader, strict=True):
            assert "clip" not in batch
            for views, clip in zip(batch["views"], expanded["clip"], strict=True):
                assert torch.equal(views[:], clip)
                assert views.frames.shape == (4, 16, 19, 3)


def test_an_abandoned_iteration_leaves_nothing_behind(tmp_path):
    dataset = make(tmp_path, GOOD)
    with in_order(dataset, 2) as loader:
        iteration = iter(loader)
        next(iteration)
        with pytest.raises(RuntimeError, match="one iteration must end before the next begins"):
            next(iter(loader))
        iteration.close()
        assert len(loader._pool) == 0
        assert [batch["index"].tolist() for batch in loader] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": None}, "batch_size must be a number with an EpochSampler or drop_last, got None"),
        ({"sampler": [[0]]}, "sampler must be an EpochSampler with batch_size, got list"),
        ({"sampler": EpochSampler(9)}, "the sampler's length must be 10, got 9"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"timeout": -1}, "timeout must be positive or None, got -1"),
        ({"retries": -1}, "retries must be at least 0, got -1"),
        ({"prefetch": 0}, "prefetch must be at least 1, got 0"),
    ],
)
def test_impossible_arguments_are_rejected(tmp_path, options, message):
    options = {"batch_size": 2, "sampler": EpochSampler(10), "workers": 1} | options
    with pytest.raises(ValueError, match=message):
        build_loader(make(tmp_path, GOOD), **options)
