import cv2
import numpy as np
import pytest
import torch
from sample_videos import write_video

from slowfast_ext.data import (
    ClipSampling,
    EpochSampler,
    RawFrameDataset,
    SpatialTransform,
    VideoDataset,
    VideoError,
    open_video,
    resize_short_side,
)

SAMPLING = ClipSampling(clip_len=4, frame_interval=3)
TRAINING = SpatialTransform(crop_size=32, short_side=40, flip=0.5)
TESTING = SpatialTransform(crop_size=40, short_side=40, crop="three")


def read_all(path):
    with open_video(path, "pyav") as video:
        return video.frames(range(len(video)))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two videos of different lengths, the same as folders of frames, and lists of both."""
    root = tmp_path_factory.mktemp("videos")
    write_video(root / "a.mp4", 30)
    write_video(root / "b.mp4", 9, height=64, width=40)
    (root / "bad.mp4").write_text("no video")
    (root / "list.txt").write_text("a.mp4 2\nb.mp4 5\nbad.mp4 1\nmissing.mp4 0\n")
    for name in "ab":
        (root / name).mkdir()
        for number, frame in enumerate(read_all(root / f"{name}.mp4"), start=1):
            cv2.imwrite(str(root / name / f"img_{number:05}.png"), cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    (root / "frames.txt").write_text("a 30 2\nb 9 5\n")
    (root / "parts.txt").write_text("a 6 20 2 5\n")
    return root


@pytest.fixture(scope="module")
def frames(root):
    """All frames of the first video."""
    return read_all(root / "a.mp4")


def videos(root, **options):
    options = {"sampling": SAMPLING, "transform": TRAINING, "decoder": "pyav"} | options
    return VideoDataset(root / "list.txt", root, **options)


def test_a_training_sample_is_one_random_clip(root):
    dataset = videos(root, num_classes=6)
    assert len(dataset) == 4
    sample = dataset[1]
    assert sample.clip.shape == (4, 32, 32, 3)
    assert sample.clip.dtype == torch.uint8
    assert (sample.index, sample.path, sample.label, sample.error) == (1, str(root / "b.mp4"), 5, None)


def test_a_training_clip_is_that_of_the_recipe_drawn_from_seed_epoch_and_index(root, frames):
    dataset = videos(root, seed=7)
    dataset.set_epoch(3)
    generator = np.random.default_rng([7, 3, 0])
    start = int(generator.integers(30 - 12 + 1, size=1)[0])
    expected, _ = TRAINING.augment(frames[start : start + 12 : 3], generator)
    assert torch.equal(dataset[0].clip, torch.from_numpy(expected))


def test_a_sample_does_not_depend_on_those_before_it(root):
    first, second = videos(root, seed=1), videos(root, seed=1)
    _ = first[1], first[0]
    assert torch.equal(first[0].clip, second[0].clip)
    assert not torch.equal(first[0].clip, videos(root, seed=2)[0].clip)
    second.set_epoch(1)
    assert not torch.equal(first[0].clip, second[0].clip)


def test_an_index_may_carry_the_size_of_the_clip(root):
    dataset = videos(root, sampling=ClipSampling(8, 2))
    assert dataset[0, (4, 24, 28)].clip.shape == (4, 24, 28, 3)
    # The same start, twice the interval: every second frame of the longer clip.
    same_size = dataset[0, (4, 32, 32)].clip
    assert torch.equal(same_size, dataset[0].clip[::2])
    with pytest.raises(ValueError, match="clip_len must divide the span of 16 frames, got 5"):
        dataset[0, (5, 32, 32)]


def test_a_test_sample_holds_the_views(root, frames):
    sampling = ClipSampling(4, 3, num_clips=2)
    dataset = videos(root, sampling=sampling, transform=TESTING, test=True)
    views = dataset[0].clip
    assert views[:].shape == (6, 4, 40, 40, 3)
    # 19 starts in two parts: 4 and 14. 48x64 becomes 40x53: slack 13, crops at 0, 12 and 6.
    frames = np.stack([resize_short_side(frame, 40) for frame in frames[14:26:3]])
    assert torch.equal(views[5:6][0], torch.from_numpy(frames[:, :, 6:46]))
    assert len(views.frames) == len(set(range(4, 16, 3)) | set(range(14, 26, 3)))
    with pytest.raises(ValueError, match="an index must have no size in testing"):
        dataset[0, (4, 32, 32)]


def test_validation_is_one_view_from_the_middle(root, frames):
    dataset = videos(root, transform=SpatialTransform(32, 40, "center"), test=True)
    frames = np.stack([resize_short_side(frame, 40) for frame in frames[9:21:3]])
    assert torch.equal(dataset[0].clip[:][0], torch.from_numpy(frames[:, 4:36, 10:42]))


def test_the_decoder_makes_no_difference(root):
    pytest.importorskip("decord")
    assert torch.equal(videos(root, decoder="decord")[0].clip, videos(root, decoder="pyav")[0].clip)


@pytest.mark.parametrize("test", [False, True])
def test_folders_of_frames_give_what_videos_give(root, test):
    options = {"sampling": SAMPLING, "transform": TESTING if test else TRAINING, "test": test}
    dataset = RawFrameDataset(root / "frames.txt", root, filename_template="img_{:05}.png", **options)
    for index in range(2):
        assert torch.equal(dataset[index].clip[:], videos(root, **options)[index].clip[:])
        assert dataset[index].label == (2, 5)[index]


def test_offset_start_index_and_several_labels(root, frames):
    dataset = RawFrameDataset(
        root / "parts.txt",
        root,
        sampling=ClipSampling(20, 1),
        transform=SpatialTransform(48, 48, "center"),
        filename_template="img_{:05}.png",
        start_index=2,
        with_offset=True,
        multi_label=True,
        num_classes=6,
        test=True,
    )
    sample = dataset[0]
    assert torch.equal(sample.clip[:][0], torch.from_numpy(frames[7:27, :, 8:56]))
    assert torch.equal(sample.label, torch.tensor([0.0, 0, 1, 0, 0, 1]))


def test_labels_change_with_left_and_right(root):
    dataset = videos(root, transform=SpatialTransform(32, 40, flip=1, flip_labels={2: 4, 4: 2}))
    assert dataset[0].label == 4
    assert dataset[1].label == 5
    assert videos(root, transform=SpatialTransform(32, 40, flip_labels={2: 4, 4: 2}))[0].label == 2
    several = VideoDataset(
        root / "list.txt",
        root,
        sampling=SAMPLING,
        transform=SpatialTransform(32, 40, flip=1, flip_labels={2: 4}),
        multi_label=True,
        num_classes=6,
    )
    assert several[0].label.nonzero().tolist() == [[4]]


@pytest.mark.parametrize("test", [False, True])
def test_an_unreadable_video_is_a_sample_with_an_error(root, test):
    dataset = videos(root, transform=TESTING if test else TRAINING, test=test)
    for index, label, reason in [(2, 1, "it contains text, not a video"), (3, 0, "there is no such file")]:
        sample = dataset[index]
        assert sample.clip is None
        assert (sample.index, sample.label, sample.error) == (index, label, reason)
        assert sample.path == dataset.path(index)


def test_a_video_without_frames_is_unreadable(root, monkeypatch):
    monkeypatch.setattr("slowfast_ext.data.decoding._PyAVVideo.__len__", lambda self: 0)
    with pytest.raises(VideoError, match="it has no frames"):
        open_video(root / "a.mp4", "pyav")
    assert videos(root)[0].error == "it has no frames"


def test_replacements_are_the_same_in_every_run(root):
    first, second = videos(root, seed=5), videos(root, seed=5)
    chosen = [first.replacement(2, attempt) for attempt in range(1, 20)]
    assert chosen == [second.replacement(2, attempt) for attempt in range(1, 20)]
    assert set(chosen) == {0, 1, 2, 3}
    first.set_epoch(1)
    assert chosen != [first.replacement(2, attempt) for attempt in range(1, 20)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 5}, r"list.txt, line 2: label must be in \[0, 5\), got 5"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"multi_label": True}, "num_classes must be a number with multi_label, got None"),
        ({"test": True}, "crop must be center or three in testing, got 'random_resized'"),
        ({"transform": TESTING}, "crop must be random_resized in training, got 'three'"),
        ({"sampling": ClipSampling(4, 3, 2)}, "num_clips must be 1 in training, got 2"),
        ({"sampling": ClipSampling(protocol="pyslowfast")}, "random clips must be mmaction2's"),
        ({"sampling": ClipSampling(twice_sample=True)}, "random clips must be mmaction2's, without twice_sample"),
        (
            {"sampling": ClipSampling(temporal_jitter=True), "transform": TESTING, "test": True},
            "test clips must have no temporal_jitter",
        ),
        (
            {"transform": SpatialTransform(flip=0.5, flip_labels={0: 9}), "num_classes": 6},
            r"flip_labels must be in \[0, 6\), got 9",
        ),
        ({"decoder": "opencv"}, "decoder must be one of auto, decord, pyav, got 'opencv'"),
    ],
)
def test_impossible_arguments_are_rejected(root, options, message):
    with pytest.raises(ValueError, match=message):
        videos(root, **options)


def test_a_missing_root_is_rejected(root):
    with pytest.raises(NotADirectoryError, match=r"VideoDataset: root must be an existing folder, got '.*nothing'"):
        VideoDataset(root / "list.txt", root / "nothing", sampling=SAMPLING, transform=TRAINING)
    with pytest.raises(FileNotFoundError):
        VideoDataset(root / "nothing.txt", root, sampling=SAMPLING, transform=TRAINING)


def test_the_dataset_serves_torch_as_well(root):
    dataset = VideoDataset(root / "list.txt", root, sampling=SAMPLING, transform=TRAINING)
    loader = torch.utils.data.DataLoader(
        dataset, 2, sampler=EpochSampler(4, shuffle=False), collate_fn=lambda samples: [s.error for s in samples]
    )
    assert next(iter(loader)) == [None, None]
