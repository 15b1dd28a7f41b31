import numpy as np
import pytest

from slowfast_ext.data import ClipSampling, centred_offsets, clip_indices, even_clip_indices, random_offsets


def generator(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("num_frames", "num_clips", "offsets"),
    [
        (300, 10, [11, 35, 59, 82, 106, 130, 154, 177, 201, 225]),
        (250, 10, [9, 28, 46, 65, 84, 102, 121, 140, 158, 177]),
        (64, 10, [0] * 10),
        (63, 10, [0] * 10),
        (300, 1, [118]),
        (250, 1, [93]),
        (100, 1, [18]),
        (64, 1, [0]),
    ],
)
def test_test_clips_sit_where_mmaction2_puts_them(num_frames, num_clips, offsets):
    assert centred_offsets(num_frames, 32, 2, num_clips).tolist() == offsets


def test_a_clip_takes_every_second_frame():
    indices = clip_indices(centred_offsets(300, 32, 2, 10), 300, 32, 2)
    assert indices.shape == (10, 32)
    assert indices.dtype == np.int64
    assert indices[0].tolist() == list(range(11, 75, 2))


@pytest.mark.parametrize(("num_frames", "last"), [(63, 62), (64, 62), (50, 12), (1, 0)])
def test_short_videos_loop(num_frames, last):
    indices = clip_indices(centred_offsets(num_frames, 32, 2, 10), num_frames, 32, 2)
    assert indices[:, -1].tolist() == [last] * 10
    assert indices.max() < num_frames


def test_repeat_last_stays_at_the_last_frame_that_the_clip_reached():
    # 49 is in the video but not in the clip: its even frames end at 48.
    indices = clip_indices(np.array([0, 1]), 50, 32, 2, out_of_bound="repeat_last")
    assert indices[0].tolist() == list(range(0, 50, 2)) + [48] * 7
    assert indices[1].tolist() == list(range(1, 50, 2)) + [49] * 7


def test_start_index_shifts_all_frames():
    assert clip_indices(np.array([3]), 10, 2, 1, start_index=1).tolist() == [[4, 5]]


def test_jitter_moves_each_frame_forward_by_less_than_the_interval():
    plain = clip_indices(np.arange(8), 300, 32, 4)
    moved = clip_indices(np.arange(8), 300, 32, 4, jitter=generator()) - plain
    assert sorted(set(moved.ravel().tolist())) == [0, 1, 2, 3]


def test_twice_sample_adds_the_beginnings_of_the_parts():
    offsets = centred_offsets(300, 32, 2, 3, twice_sample=True)
    assert offsets.tolist() == [39, 118, 197, 0, 79, 158]
    assert centred_offsets(10, 32, 2, 3, twice_sample=True).tolist() == [0] * 6


def test_training_clips_fall_into_their_own_parts():
    draws = np.stack([random_offsets(300, 32, 2, 4, generator(seed)) for seed in range(400)])
    part = (300 - 64 + 1) // 4  # 59
    assert (draws // part == np.arange(4)).all()
    assert draws.min(axis=0).tolist() == [0, 59, 118, 177]
    assert draws.max(axis=0).tolist() == [58, 117, 176, 235]


def test_training_is_reproducible_from_the_generator():
    assert random_offsets(300, 32, 2, 1, generator(5)) == random_offsets(300, 32, 2, 1, generator(5))


def test_training_clips_of_a_barely_long_video_are_sorted_draws():
    draws = np.stack([random_offsets(66, 32, 2, 5, generator(seed)) for seed in range(100)])  # 3 starts for 5 clips
    assert (np.diff(draws) >= 0).all()
    assert set(draws.ravel().tolist()) == {0, 1, 2}


def test_training_clips_of_a_video_as_long_as_a_clip_start_at_its_beginning():
    assert random_offsets(64, 32, 2, 4, generator()).tolist() == [0, 0, 0, 1]  # round(c / 4): 0, .25, .5 and .75
    assert random_offsets(40, 32, 2, 4, generator()).tolist() == [0] * 4


def test_keep_tail_frames_reaches_the_starts_that_whole_parts_leave_out():
    draws = np.stack([random_offsets(300, 32, 2, 10, generator(s), keep_tail_frames=True) for s in range(400)])
    assert draws.max() == 236
    assert max(random_offsets(300, 32, 2, 10, generator(s)).max() for s in range(400)) == 229
    assert random_offsets(63, 32, 2, 2, generator(), keep_tail_frames=True).tolist() == [0, 0]


def test_pyslowfast_clips_spread_their_frames_to_both_ends_of_the_span():
    indices = even_clip_indices(300, 30.0, 32, 2, 10)
    assert indices[0].tolist() == [k * 63 // 31 for k in range(32)]
    assert indices[:, 0].tolist() == [int(23.6 * k) for k in range(10)]
    assert indices[9, -1] == int(23.6 * 9 + 63)


def test_pyslowfast_clips_last_the_same_time_at_any_frame_rate():
    assert even_clip_indices(600, 60.0, 32, 2, 1)[0, -1] == 127
    assert even_clip_indices(600, 15.0, 32, 2, 1)[0, -1] == 31
    assert even_clip_indices(600, 0.0, 32, 2, 1)[0, -1] == 63


def test_pyslowfast_clips_of_short_videos_repeat_the_last_frame():
    indices = even_clip_indices(10, 30.0, 32, 2, 10)
    assert indices.min() == 0
    assert (indices[:, 5:] == 9).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda: centred_offsets(0, 32, 2, 10),
        lambda: random_offsets(300, 0, 2, 1, generator()),
        lambda: even_clip_indices(300, 30.0, 32, 0, 1),
    ],
)
def test_counts_below_one_are_rejected(call):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        call()


def test_an_unknown_policy_is_rejected():
    with pytest.raises(ValueError, match="out_of_bound must be 'loop' or 'repeat_last', got 'wrap'"):
        clip_indices(np.array([0]), 10, 2, 1, out_of_bound="wrap")


def test_test_clips_of_a_recipe_are_the_centred_ones():
    indices = ClipSampling(num_clips=10).centred_clips(300, 30.0)
    assert indices.shape == (10, 32)
    assert indices[:, 0].tolist() == [11, 35, 59, 82, 106, 130, 154, 177, 201, 225]
    assert (np.diff(indices) == 2).all()
    assert ClipSampling(num_clips=10).centred_clips(50, 30.0)[:, -1].tolist() == [12] * 10
    assert ClipSampling(num_clips=10, out_of_bound="repeat_last").centred_clips(50, 30.0)[0, -1] == 48
    assert ClipSampling(num_clips=3, twice_sample=True).centred_clips(300, 30.0).shape == (6, 32)
    even = ClipSampling(num_clips=10, protocol="pyslowfast").centred_clips(600, 60.0)
    assert np.array_equal(even, even_clip_indices(600, 60.0, 32, 2, 10))


def test_training_clips_of_a_recipe_are_the_random_ones():
    clip = ClipSampling().random_clips(300, generator(4))
    start = int(generator(4).integers(237, size=1)[0])
    assert clip.tolist() == [list(range(start, start + 64, 2))]
    starts = {int(ClipSampling().random_clips(70, generator(seed))[0, 0]) for seed in range(200)}
    assert starts == set(range(7))
    tail = ClipSampling(clip_len=1, frame_interval=1, num_clips=2, keep_tail_frames=True)
    assert max(tail.random_clips(3, generator(seed)).max() for seed in range(50)) == 2
    jittered = ClipSampling(temporal_jitter=True).random_clips(300, generator(4))
    assert set((jittered - clip).ravel().tolist()) == {0, 1}


def test_fewer_frames_of_a_clip_keep_its_span():
    sampling = ClipSampling(32, 2, temporal_jitter=True)
    assert sampling.with_frames(8) == ClipSampling(8, 8, temporal_jitter=True)
    for clip_len in (0, 7, 128):
        with pytest.raises(ValueError, match=f"clip_len must divide the span of 64 frames, got {clip_len}"):
            sampling.with_frames(clip_len)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frame_interval": 0}, "frame_interval must be at least 1, got 0"),
        ({"out_of_bound": "wrap"}, "out_of_bound must be 'loop' or 'repeat_last', got 'wrap'"),
        ({"protocol": "other"}, "protocol must be 'mmaction2' or 'pyslowfast', got 'other'"),
        (
            {"protocol": "pyslowfast", "twice_sample": True},
            "twice_sample must be False for the protocol pyslowfast, got True",
        ),
    ],
)
def test_an_impossible_recipe_is_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        ClipSampling(**arguments)
