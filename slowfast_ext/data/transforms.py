"""Spatial steps of the test pipelines and normalisation. Pictures stay uint8 (H, W, 3) until they are on the device."""

import math
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor


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
