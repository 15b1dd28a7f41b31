import cv2
import numpy as np
import pytest
import torch

from slowfast_ext.data import center_crop, normalize, resize_short_side, short_side_size, three_crops, uniform_crops


def test_the_long_side_is_rounded_as_each_code_base_does():
    assert short_side_size(217, 333, 256) == (256, 393)
    assert short_side_size(217, 333, 256, rounding="floor") == (256, 392)
    assert short_side_size(333, 217, 256) == (393, 256)


def test_the_short_side_is_exact_for_every_size():
    for rounding in ("nearest", "floor"):
        for side in range(1, 700):
            assert short_side_size(side, side + 1, 256, rounding=rounding)[0] == 256
            assert short_side_size(side, side, 256, rounding=rounding) == (256, 256)


def test_resizing_interpolates_between_pixels_without_anti_aliasing():
    picture = np.zeros((4, 8, 3), np.uint8)
    picture[:, 4:] = 200
    # Halved, pixel centres fall between two source pixels; the edge lies on such a centre's border.
    assert resize_short_side(picture, 2)[0, :, 0].tolist() == [0, 0, 200, 200]
    shifted = np.zeros((4, 8, 3), np.uint8)
    shifted[:, 3:] = 200
    assert resize_short_side(shifted, 2)[0, :, 0].tolist() == [0, 100, 200, 200]


def test_a_picture_of_the_right_size_is_returned_as_it_is():
    picture = np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8)
    assert resize_short_side(picture, 64) is picture
    assert np.array_equal(resize_short_side(picture, 32), cv2.resize(picture, (40, 32)))


def test_three_crops_come_left_right_middle():
    assert three_crops(256, 341, 256) == [(0, 0), (0, 84), (0, 42)]
    assert three_crops(341, 256, 256) == [(0, 0), (84, 0), (42, 0)]
    assert three_crops(256, 256, 256) == [(0, 0)] * 3


def test_uniform_crops_come_left_centre_right():
    assert uniform_crops(256, 341, 256) == [(0, 0), (0, 43), (0, 85)]
    assert uniform_crops(341, 256, 256) == [(0, 0), (43, 0), (85, 0)]


def test_the_center_crop_rounds_towards_the_origin():
    assert center_crop(256, 341, 224) == [(16, 58)]


@pytest.mark.parametrize("place", [center_crop, three_crops, uniform_crops])
def test_a_crop_larger_than_the_picture_is_rejected(place):
    with pytest.raises(ValueError, match="size must be at most the picture's short side 100, got 128"):
        place(100, 200, 128)


def test_three_crops_need_a_side_of_their_size():
    with pytest.raises(ValueError, match="one side of the picture must be 224, got 256x341"):
        three_crops(256, 341, 224)


def test_normalization_subtracts_divides_and_reorders(device):
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    views = torch.randint(0, 256, (2, 3, 4, 5, 3), dtype=torch.uint8, device=device)
    result = normalize(views, mean, std)
    assert result.shape == (2, 3, 3, 4, 5)
    assert result.is_contiguous(memory_format=torch.channels_last_3d)
    expected = (views.double() - torch.tensor(mean, device=device)) / torch.tensor(std, device=device)
    torch.testing.assert_close(result, expected.permute(0, 4, 1, 2, 3).float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(normalize(views, mean, std, torch.bfloat16), result.bfloat16())


@pytest.mark.parametrize("views", [torch.zeros(1, 2, 4, 4, 3), torch.zeros(2, 4, 4, 3, dtype=torch.uint8)])
def test_views_that_are_not_raw_are_rejected(views):
    with pytest.raises(ValueError, match=r"views must be uint8 \(M, T, H, W, 3\), got torch"):
        normalize(views, (0, 0, 0), (1, 1, 1))
