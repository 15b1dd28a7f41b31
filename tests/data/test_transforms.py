import cv2
import numpy as np
import pytest
import torch

from slowfast_ext.data import (
    SpatialTransform,
    center_crop,
    normalize,
    random_resized_crop,
    resize_short_side,
    short_side_size,
    three_crops,
    uniform_crops,
)


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


def draws(height, width, count=2000, **ranges):
    return np.array(
        [random_resized_crop(height, width, np.random.default_rng(seed), **ranges) for seed in range(count)]
    )


def test_random_crops_have_the_areas_and_ratios_of_the_recipe():
    top, left, height, width = draws(256, 340).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    small = (height < 200) & (width < 250)
    assert (top + height)[small].max() == 256  # the far edges are reached
    assert (left + width)[small].max() == 340
    area, ratio = height * width / (256 * 340), width / height
    assert 0.078 < area.min() < 0.1
    assert area.max() > 0.9
    assert 0.73 < ratio.min() < 0.76
    assert 1.3 < ratio.max() < 1.37
    # Small crops always fit, so that their ratios are uniform in the logarithm: half of them are below 1.
    assert 0.42 < (ratio[area < 0.4] < 1).mean() < 0.58


def test_the_first_candidate_that_fits_is_taken():
    for seed in range(20):
        generator = np.random.default_rng(seed)
        ratios = np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3), 10))
        areas = generator.uniform(0.08, 1, 10) * 200 * 300
        heights, widths = np.round(np.sqrt(areas / ratios)), np.round(np.sqrt(areas * ratios))
        first = np.flatnonzero((heights <= 200) & (widths <= 300))[0]
        assert random_resized_crop(200, 300, np.random.default_rng(seed))[2:] == (heights[first], widths[first])


def test_without_a_candidate_that_fits_the_middle_square_is_taken():
    assert random_resized_crop(10, 401, np.random.default_rng(0), area_range=(0.9, 1)) == (0, 195, 10, 10)
    assert random_resized_crop(401, 10, np.random.default_rng(0), area_range=(0.9, 1)) == (195, 0, 10, 10)


def test_augmentation_resizes_crops_resizes_and_flips_all_pictures_alike():
    pictures = np.random.default_rng(0).integers(0, 256, (3, 48, 64, 3), np.uint8)
    transform = SpatialTransform(crop_size=20, short_side=40, flip=0.5)
    flips = set()
    for seed in range(8):
        result, flipped = transform.augment(pictures, np.random.default_rng(seed))
        generator = np.random.default_rng(seed)
        top, left, height, width = random_resized_crop(40, 53, generator)
        for picture, got in zip(pictures, result, strict=True):
            cut = cv2.resize(picture, (53, 40))[top : top + height, left : left + width]
            expected = cv2.resize(cut, (20, 20))
            assert np.array_equal(got, expected[:, ::-1] if flipped else expected)
        assert flipped == (generator.random() < 0.5)
        flips.add(flipped)
    assert flips == {True, False}


def test_without_a_short_side_the_native_picture_is_cropped_to_any_size():
    pictures = np.random.default_rng(0).integers(0, 256, (1, 30, 40, 3), np.uint8)
    result, flipped = SpatialTransform(short_side=None).augment(pictures, np.random.default_rng(2), size=(12, 18))
    top, left, height, width = random_resized_crop(30, 40, np.random.default_rng(2))
    expected = cv2.resize(pictures[0, top : top + height, left : left + width], (18, 12))
    assert not flipped
    assert np.array_equal(result[0], expected)


def test_labels_have_a_partner_on_the_other_side():
    transform = SpatialTransform(flip_labels={2: 4, 4: 2})
    assert [transform.flipped_label(label) for label in (2, 3, 4)] == [4, 3, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop_size": 0}, "crop_size must be at least 1, got 0"),
        ({"crop": "five"}, "crop must be random_resized, center or three, got 'five'"),
        ({"flip": 1.5}, "flip must be a probability, got 1.5"),
        ({"crop": "center", "flip": 0.5}, "flip must be 0 for crop 'center', got 0.5"),
        ({"short_side": 0}, "short_side must be at least 1 or None, got 0"),
        ({"crop": "center", "short_side": None}, "short_side must be a number for crop 'center', got None"),
        ({"crop": "center", "crop_size": 300}, "crop_size must be at most short_side 256, got 300"),
        ({"crop": "three"}, "crop_size must be short_side 256 for three crops, got 224"),
        ({"area_range": (0, 1)}, r"area_range must be increasing, in \(0, 1\], got \(0, 1\)"),
        ({"aspect_ratio_range": (2, 1)}, r"aspect_ratio_range must be increasing and positive, got \(2, 1\)"),
        ({"protocol": "pyslowfast"}, "protocol must be mmaction2 for random crops, got 'pyslowfast'"),
    ],
)
def test_an_impossible_transform_is_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        SpatialTransform(**arguments)
