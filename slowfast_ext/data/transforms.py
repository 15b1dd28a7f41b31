"""Spatial steps of training and testing, and normalisation. Pictures are uint8 (H, W, 3) until on the device."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from .sampling import PROTOCOLS

_CROP_ATTEMPTS = 10  # mmaction2's RandomResizedCrop


@dataclass(frozen=True)
class SpatialTransform:
    """What happens to the pictures of a clip. The defaults are those of training on Kinetics-400, without the flip.

    Training: scale the short side, cut out a random part, scale it to the crop size, turn it around or not; the same
    for all frames of a clip. Testing: scale the short side, cut out one crop or three.

    Attributes:
        crop_size: side of the square crops.
        short_side: to which pictures are scaled first; None leaves them as they are (random crops only).
        crop: ``random_resized`` for training, ``center`` or ``three`` for testing.
        flip: probability of exchanging left and right, for training.
        flip_labels: labels that change with it; both directions are listed, as ``{2: 4, 4: 2}``.
        area_range, aspect_ratio_range: of random crops, see `random_resized_crop`.
        protocol: ``mmaction2`` or ``pyslowfast`` (also pytorchvideo, testing only): decides how the long side is
            rounded and in which order three crops come; mmaction2's three crops need a short side of the crop size.
    """

    crop_size: int = 224
    short_side: int | None = 256
    crop: str = "random_resized"
    flip: float = 0.0
    flip_labels: Mapping[int, int] | None = None
    area_range: tuple[float, float] = (0.08, 1.0)
    aspect_ratio_range: tuple[float, float] = (3 / 4, 4 / 3)
    protocol: str = "mmaction2"

    def __post_init__(self):
        def check(valid, name, expected):
            if not valid:
                raise ValueError(f"SpatialTransform: {name} must be {expected}, got {getattr(self, name)!r}")

        check(self.crop_size >= 1, "crop_size", "at least 1")
        check(self.crop in ("random_resized", "center", "three"), "crop", "random_resized, center or three")
        check(self.protocol in PROTOCOLS, "protocol", "'mmaction2' or 'pyslowfast'")
        check(0 <= self.flip <= 1, "flip", "a probability")
        if self.crop == "random_resized":
            check(self.short_side is None or self.short_side >= 1, "short_side", "at least 1 or None")
            low, high = self.area_range
            check(0 < low <= high <= 1, "area_range", "increasing, in (0, 1]")
            low, high = self.aspect_ratio_range
            check(0 < low <= high, "aspect_ratio_range", "increasing and positive")
            check(self.protocol == "mmaction2", "protocol", "mmaction2 for random crops")
            return
        check(self.flip == 0, "flip", f"0 for crop {self.crop!r}")
        check(self.short_side is not None, "short_side", f"a number for crop {self.crop!r}")
        check(self.crop_size <= self.short_side, "crop_size", f"at most short_side {self.short_side}")
        if self.crop == "three" and self.protocol == "mmaction2":
            check(self.crop_size == self.short_side, "crop_size", f"short_side {self.short_side} for three crops")

    @property
    def is_random(self) -> bool:
        """Whether the transform is one for training."""
        return self.crop == "random_resized"

    @property
    def num_crops(self) -> int:
        """Crops of a picture."""
        return 3 if self.crop == "three" else 1

    def resize(self, picture: np.ndarray) -> np.ndarray:
        """A uint8 picture (H, W, 3) with its short side scaled to ``short_side``."""
        if self.short_side is None:
            return picture
        rounding = "nearest" if self.protocol == "mmaction2" else "floor"
        return resize_short_side(picture, self.short_side, rounding=rounding)

    def test_crops(self, height: int, width: int) -> list[tuple[int, int]]:
        """Top and left edges of the crops in a resized picture."""
        if self.crop == "center":
            return center_crop(height, width, self.crop_size)
        place = three_crops if self.protocol == "mmaction2" else uniform_crops
        return place(height, width, self.crop_size)

    def augment(
        self, pictures: Iterable[np.ndarray], generator: np.random.Generator, size: tuple[int, int] | None = None
    ) -> tuple[np.ndarray, bool]:
        """Pictures for training, all treated alike.

        Args:
            pictures: uint8 (H, W, 3), of one size, at least one.
            generator: source of randomness; the numbers drawn from it do not depend on ``size``.
            size: height and width of the result instead of ``crop_size``.

        Returns:
            uint8 array (T, height, width, 3), and whether left and right were exchanged.
        """
        height, width = size or (self.crop_size, self.crop_size)
        box, flipped, result = None, False, []
        for picture in map(self.resize, pictures):
            if box is None:
                box = random_resized_crop(*picture.shape[:2], generator, self.area_range, self.aspect_ratio_range)
                flipped = bool(generator.random() < self.flip)
            top, left, box_height, box_width = box
            cut = picture[top : top + box_height, left : left + box_width]
            scaled = cv2.resize(cut, (width, height), interpolation=cv2.INTER_LINEAR)
            result.append(scaled[:, ::-1] if flipped else scaled)
        return np.stack(result), flipped

    def flipped_label(self, label: int) -> int:
        """The label of a video whose left and right are exchanged."""
        return (self.flip_labels or {}).get(label, label)


def short_side_size(height: int, width: int, size: int, *, rounding: str = "nearest") -> tuple[int, int]:
    """Height and width of a picture scaled so that its short side is ``size``.

    Args:
        rounding: of the long side: ``nearest`` (mmaction2) or ``floor`` (PySlowFast, pytorchvideo).
    """
    if rounding not in ("nearest", "floor"):
        raise ValueError(f"short_side_size: rounding must be 'nearest' or 'floor', got {rounding!r}")
    short = min(height, width)
    long = max(height, width)
    # The order of the operations is that of the originals: it decides sizes that fall on a boundary.
    long_size = int(long * (size / short) + 0.5) if rounding == "nearest" else math.floor(long / short * size)
    return (size, long_size) if height <= width else (long_size, size)


def resize_short_side(picture: np.ndarray, size: int, *, rounding: str = "nearest") -> np.ndarray:
    """Scale a uint8 picture (H, W, 3) to a short side of ``size``: bilinear, without anti-aliasing, as in training."""
    height, width = short_side_size(*picture.shape[:2], size, rounding=rounding)
    if (height, width) == picture.shape[:2]:
        return picture
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_LINEAR)


def random_resized_crop(
    height: int,
    width: int,
    generator: np.random.Generator,
    area_range: tuple[float, float] = (0.08, 1.0),
    aspect_ratio_range: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """A random part of a picture: top, left, height, width (mmaction2's RandomResizedCrop).

    The first of ten candidates that fits; if none does, the square in the middle.

    Args:
        height, width: of the picture.
        generator: source of randomness.
        area_range: of the area over that of the picture, uniform.
        aspect_ratio_range: of width over height, uniform in its logarithm.
    """
    ratios = np.exp(generator.uniform(*np.log(aspect_ratio_range), _CROP_ATTEMPTS))
    areas = generator.uniform(*area_range, _CROP_ATTEMPTS) * height * width
    heights = np.round(np.sqrt(areas / ratios)).astype(int)
    widths = np.round(np.sqrt(areas * ratios)).astype(int)
    down, right = generator.random(2)
    for box_height, box_width in zip(heights.tolist(), widths.tolist(), strict=True):
        if 1 <= box_height <= height and 1 <= box_width <= width:
            top, left = int(down * (height - box_height + 1)), int(right * (width - box_width + 1))
            return top, left, box_height, box_width
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def center_crop(height: int, width: int, size: int) -> list[tuple[int, int]]:
    """Top and left edge of the one square crop in the middle."""
    _check_crop(height, width, size)
    return [((height - size) // 2, (width - size) // 2)]


def three_crops(height: int, width: int, size: int) -> list[tuple[int, int]]:
    """Top and left edges of mmaction2's three crops along the long side: first end, second end, middle, in its order.

    One side of the picture must be ``size``. The second end is two whole steps from the first.
    """
    _check_crop(height, width, size)
    if size not in (height, width):
        raise ValueError(f"three_crops: one side of the picture must be {size}, got {height}x{width}")
    if height == size:
        step = (width - size) // 2
        return [(0, 0), (0, 2 * step), (0, step)]
    step = (height - size) // 2
    return [(0, 0), (2 * step, 0), (step, 0)]


def uniform_crops(height: int, width: int, size: int) -> list[tuple[int, int]]:
    """Top and left edges of PySlowFast's three crops along the long side: first end, middle, second end."""
    _check_crop(height, width, size)
    top, left = math.ceil((height - size) / 2), math.ceil((width - size) / 2)
    if height > width:
        return [(0, left), (top, left), (height - size, left)]
    return [(top, 0), (top, left), (top, width - size)]


def normalize(views: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
    """Network input from raw views, on the device where they are.

    Args:
        views (uint8 Tensor[M, T, H, W, 3]): RGB.
        mean, std: of each channel, on the 0 to 255 scale.
        dtype: of the result; the arithmetic is float32.

    Returns:
        Tensor[M, 3, T, H, W]: ``(views - mean) / std``, channels last in memory.
    """
    if views.dtype != torch.uint8 or views.ndim != 5 or views.shape[-1] != 3:
        raise ValueError(f"normalize: views must be uint8 (M, T, H, W, 3), got {views.dtype} {tuple(views.shape)}")
    mean = torch.tensor(mean, device=views.device)
    scale = 1 / torch.tensor(std, device=views.device)
    return views.float().sub_(mean).mul_(scale).to(dtype).permute(0, 4, 1, 2, 3)


def _check_crop(height: int, width: int, size: int) -> None:
    if size > min(height, width):
        raise ValueError(f"crop: size must be at most the picture's short side {min(height, width)}, got {size}")
