"""The views of a video that a network is tested on: a few clips, each at a few places of the picture."""

import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .decoding import Video, open_video
from .sampling import ClipSampling
from .transforms import SpatialTransform


@dataclass(frozen=True)
class ViewPlan:
    """How the views of a video are cut. The defaults are those of the Kinetics-400 rows of the zoo: 10 clips x 3 crops.

    Attributes:
        clip_len, frame_interval: frames of a clip and their distance in the video.
        num_clips: clips of a video, spread over its length.
        num_crops: 1 (centre) or 3 (along the long side).
        short_side: to which pictures are scaled.
        crop_size: side of the square crops; mmaction2's three crops need it equal to ``short_side``.
        protocol: ``mmaction2`` or ``pyslowfast`` (also pytorchvideo): the code base the weights come from decides where
            clips begin, how the long side is rounded and in which order three crops come.
    """

    clip_len: int = 32
    frame_interval: int = 2
    num_clips: int = 10
    num_crops: int = 3
    short_side: int = 256
    crop_size: int = 256
    protocol: str = "mmaction2"

    def __post_init__(self):
        if self.num_crops not in (1, 3):
            raise ValueError(f"ViewPlan: num_crops must be 1 or 3, got {self.num_crops}")
        # The rest is checked where it is used.
        _ = self.sampling, self.transform

    @property
    def sampling(self) -> ClipSampling:
        """Its clips."""
        return ClipSampling(self.clip_len, self.frame_interval, self.num_clips, protocol=self.protocol)

    @property
    def transform(self) -> SpatialTransform:
        """Its crops."""
        crop = "center" if self.num_crops == 1 else "three"
        return SpatialTransform(self.crop_size, self.short_side, crop, protocol=self.protocol)


@dataclass(frozen=True)
class VideoViews:
    """All views of one video, kept as the distinct frames they share and cut out on demand.

    The frames of 10 overlapping clips x 3 crops take less than a third of the memory of the 30 views, so they are what
    crosses to the device. View ``i`` is crop ``i // num_clips`` of clip ``i % num_clips``: crop-major, as in mmaction2.

    Attributes:
        frames (uint8 Tensor[F, H, W, 3]): the distinct frames, RGB.
        clips (int64 Tensor[num_clips, T]): rows of ``frames``.
        crops: top and left edge of each crop.
        crop_size: side of the square crops.
    """

    frames: Tensor
    clips: Tensor
    crops: list[tuple[int, int]]
    crop_size: int

    def __len__(self) -> int:
        return len(self.clips) * len(self.crops)

    def __getitem__(self, views: slice) -> Tensor:
        """Views of a slice, uint8 Tensor[M, T, crop_size, crop_size, 3], on the device of the frames."""
        size = self.crop_size
        cut = []
        for view in range(len(self))[views]:
            crop, clip = divmod(view, len(self.clips))
            top, left = self.crops[crop]
            cut.append(self.frames[:, top : top + size, left : left + size].index_select(0, self.clips[clip]))
        return torch.stack(cut)

    def to(self, device: torch.device | str) -> "VideoViews":
        """The same views with their frames on ``device``."""
        return VideoViews(self.frames.to(device), self.clips.to(device), self.crops, self.crop_size)


def cut_views(video: Video, sampling: ClipSampling, transform: SpatialTransform) -> VideoViews:
    """The views of an open video. Each frame is decoded once, and resized before the next one is.

    Raises:
        VideoError: the frames cannot be decoded.
    """
    distinct, rows = np.unique(sampling.centred_clips(len(video), video.fps), return_inverse=True)
    frames = np.stack([transform.resize(picture) for picture in video.read(distinct.tolist())])
    clips = torch.from_numpy(rows.reshape(-1, sampling.clip_len))
    return VideoViews(torch.from_numpy(frames), clips, transform.test_crops(*frames.shape[1:3]), transform.crop_size)


def read_views(path: str | os.PathLike, plan: ViewPlan, decoder: str = "auto") -> VideoViews:
    """The views of a video file.

    Args:
        path: the file.
        plan: which clips and crops.
        decoder: as `open_video`.

    Raises:
        VideoError: the file cannot be read as a video.
    """
    with open_video(path, decoder) as video:
        return cut_views(video, plan.sampling, plan.transform)
