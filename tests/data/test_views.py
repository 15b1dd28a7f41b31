import numpy as np
import pytest
import torch
from sample_videos import real_clip, write_video

from slowfast_ext.data import ViewPlan, open_video, read_views, resize_short_side


def test_a_view_is_the_crop_of_the_frames_of_its_clip():
    path = real_clip("carphone_pristine")
    plan = ViewPlan(clip_len=4, frame_interval=8, num_clips=2, short_side=96, crop_size=96)
    views = read_views(path, plan, "pyav")
    assert len(views) == 6
    # 120 frames of 176x144 become 117x96: crops at 0, 20, 10; clips of span 32 in 89 starts at 22 and 66.
    with open_video(path, "pyav") as video:
        for view, (start, left) in enumerate([(22, 0), (66, 0), (22, 20), (66, 20), (22, 10), (66, 10)]):
            frames = video.frames(range(start, start + 32, 8))
            expected = np.stack([resize_short_side(frame, 96)[:, left : left + 96] for frame in frames])
            assert torch.equal(views[view : view + 1][0], torch.from_numpy(expected))


def test_the_zoo_default_is_30_views_of_32_frames_at_256():
    views = read_views(real_clip("bikes"), ViewPlan())
    assert len(views) == 30
    assert views[28:40].shape == (2, 32, 256, 256, 3)
    assert views[:1].dtype == torch.uint8
    assert len(views.frames) == len(np.unique(ViewPlan().sampling.centred_clips(250, 25.0)))  # each frame is kept once


def test_the_pyslowfast_protocol_changes_clips_and_crops():
    plan = ViewPlan(short_side=96, crop_size=96, protocol="pyslowfast")
    views = read_views(real_clip("carphone_pristine"), plan, "pyav")
    assert views.crops == [(0, 0), (0, 11), (0, 21)]
    assert plan.sampling.centred_clips(300, 30.0)[0, -1] == 63
    assert ViewPlan().sampling.centred_clips(300, 30.0)[0, -1] == 73


def test_a_video_of_one_frame_fills_all_its_clips(tmp_path):
    plan = ViewPlan(num_clips=2, num_crops=1, short_side=48, crop_size=48)
    for protocol_plan in (plan, ViewPlan(num_clips=2, num_crops=1, short_side=48, crop_size=48, protocol="pyslowfast")):
        views = read_views(write_video(tmp_path / "one.mp4", 1), protocol_plan)
        assert views.frames.shape == (1, 48, 64, 3)
        assert views[:].shape == (2, 32, 48, 48, 3)
        assert torch.equal(views[0:1][0, 0], views[1:2][0, 31])


def test_a_smaller_center_crop_lies_inside_the_scaled_picture():
    plan = ViewPlan(num_clips=1, num_crops=1, short_side=128, crop_size=112)
    views = read_views(real_clip("carphone_pristine"), plan)
    assert views.frames.shape[1:] == (128, 156, 3)
    assert views.crops == [(8, 22)]
    assert views[:].shape == (1, 32, 112, 112, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_clips": 0}, "num_clips must be at least 1, got 0"),
        ({"num_crops": 2}, "num_crops must be 1 or 3, got 2"),
        ({"crop_size": 300}, "crop_size must be at most short_side 256, got 300"),
        ({"crop_size": 224}, "crop_size must be short_side 256 for three crops, got 224"),
        ({"protocol": "other"}, "protocol must be 'mmaction2' or 'pyslowfast', got 'other'"),
    ],
)
def test_an_impossible_plan_is_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        ViewPlan(**arguments)


def test_views_move_to_a_device_with_their_frames(device):
    plan = ViewPlan(clip_len=2, num_clips=1, num_crops=1, short_side=32, crop_size=32)
    views = read_views(real_clip("carphone_pristine"), plan)
    moved = views.to(device)
    assert moved[:].device.type == device.type
    assert torch.equal(moved[:].cpu(), views[:])
