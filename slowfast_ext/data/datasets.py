"""Datasets of labelled videos, as files or as folders of frames."""

import os
from abc import abstractmethod
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from .annotations import Entry, read_annotations
from .decoding import DECODERS, Video, VideoError, open_video
from .frame_folders import FrameFolder, check_filename_template
from .sampling import ClipSampling
from .transforms import SpatialTransform
from .views import VideoViews, cut_views

ClipSize = tuple[int, int, int]  # frames, height, width


@dataclass
class Sample:
    """One video as a network sees it.

    Attributes:
        index: in the dataset.
        path: of the video.
        label: class number; float32 Tensor[num_classes] of zeros and ones with ``multi_label``.
        clip: training: uint8 Tensor[T, H, W, 3]. Testing: the views, of which ``clip[:]`` is the uint8
            Tensor[views, T, H, W, 3]. None where the video could not be read.
        error: why it could not, else None.
    """

    index: int
    path: str
    label: int | Tensor
    clip: Tensor | VideoViews | None = None
    error: str | None = None


class ClipDataset(torch.utils.data.Dataset):
    """Videos of a list, each as one random clip (training) or as its views (testing).

    A sample depends on seed, epoch and index alone: not on the process that makes it, nor on those made before. An
    index may be a pair ``(index, (T, H, W))``, which changes the size of a training clip: as many frames over the same
    span of the video, in pictures of that size. A video that cannot be read makes a sample with an error, no exception.

    Args:
        annotation: list of the videos, see `read_annotations`.
        root: folder that its paths start from.
        sampling, transform: clips and crops. Training needs random crops of one clip, testing centre or three crops.
        num_classes: labels must be below it; needed for ``multi_label``.
        multi_label: videos have any number of labels; otherwise a second label is an error.
        raw_frames, with_offset: form of the list, see `read_annotations`.
        test: the views of the video instead of a random clip.
        seed: of all random choices.

    Raises:
        ValueError: an argument or the list is wrong; for the list, the message names file, line and value.
        NotADirectoryError: there is no folder ``root``.
    """

    def __init__(
        self,
        annotation: str | os.PathLike,
        root: str | os.PathLike,
        *,
        sampling: ClipSampling,
        transform: SpatialTransform,
        num_classes: int | None = None,
        multi_label: bool = False,
        raw_frames: bool = False,
        with_offset: bool = False,
        test: bool = False,
        seed: int = 0,
    ):
        name = type(self).__name__
        if not os.path.isdir(root):
            raise NotADirectoryError(f"{name}: root must be an existing folder, got '{os.fspath(root)}'")
        if seed < 0:
            raise ValueError(f"{name}: seed must be at least 0, got {seed}")
        if num_classes is None and multi_label:
            raise ValueError(f"{name}: num_classes must be a number with multi_label, got None")
        if transform.is_random == test:
            expected = "center or three in testing" if test else "random_resized in training"
            raise ValueError(f"{name}: crop must be {expected}, got {transform.crop!r}")
        if not test and sampling.num_clips != 1:
            raise ValueError(f"{name}: num_clips must be 1 in training, got {sampling.num_clips}")
        # Wrong combinations show in the first video, so they are looked for in one that does not exist.
        _ = sampling.centred_clips(1, 0.0) if test else sampling.random_clips(1, np.random.default_rng())
        self.entries = read_annotations(
            annotation,
            raw_frames=raw_frames,
            with_offset=with_offset,
            multi_label=multi_label,
            num_classes=num_classes,
        )
        for label in (transform.flip_labels or {}).values():
            if label < 0 or (num_classes is not None and label >= num_classes):
                raise ValueError(f"{name}: flip_labels must be in [0, {num_classes}), got {label}")
        self.root = os.fspath(root)
        self.sampling, self.transform = sampling, transform
        self.num_classes, self.multi_label = num_classes, multi_label
        self.test, self.seed, self.epoch = test, seed, 0

    def __len__(self) -> int:
        return len(self.entries)

    def set_epoch(self, epoch: int) -> None:
        """Other random choices for each epoch, counted from 0."""
        self.epoch = epoch

    def path(self, index: int) -> str:
        """Where a video lies."""
        return os.path.join(self.root, self.entries[index].path)

    def replacement(self, index: int, attempt: int) -> int:
        """The video that stands in for an unreadable one in this epoch; attempts count from 1."""
        return int(np.random.default_rng([self.seed, self.epoch, index, attempt]).integers(len(self)))

    def label(self, index: int, flipped: bool = False) -> int | Tensor:
        """The label of a video, as in `Sample`."""
        labels = self.entries[index].labels
        if flipped:
            labels = tuple(map(self.transform.flipped_label, labels))
        if not self.multi_label:
            return labels[0]
        return torch.zeros(self.num_classes).index_fill_(0, torch.tensor(labels), 1)

    def __getitem__(self, index: int | tuple[int, ClipSize]) -> Sample:
        index, size = index if isinstance(index, tuple) else (index, None)
        if size is not None and self.test:
            raise ValueError(f"{type(self).__name__}: an index must have no size in testing, got {(index, size)}")
        try:
            with self._open(self.entries[index]) as video:
                if self.test:
                    clip, flipped = cut_views(video, self.sampling, self.transform), False
                else:
                    clip, flipped = self._random_clip(video, index, size)
        except (VideoError, OSError, MemoryError, cv2.error) as error:
            reason = error.reason if isinstance(error, VideoError) else f"{type(error).__name__}: {error}"
            return Sample(index, self.path(index), self.label(index), error=reason)
        return Sample(index, self.path(index), self.label(index, flipped), clip)

    def _random_clip(self, video: Video, index: int, size: ClipSize | None) -> tuple[Tensor, bool]:
        """A random clip and whether it is flipped."""
        generator = np.random.default_rng([self.seed, self.epoch, index])
        sampling = self.sampling.with_frames(size[0]) if size else self.sampling
        distinct, rows = np.unique(sampling.random_clips(len(video), generator), return_inverse=True)
        frames, flipped = self.transform.augment(video.read(distinct.tolist()), generator, size and size[1:])
        return torch.from_numpy(frames[rows.reshape(-1)]), flipped

    @abstractmethod
    def _open(self, entry: Entry) -> Video:
        """The frames of a video; VideoError if it cannot be opened."""


class VideoDataset(ClipDataset):
    """Video files.

    Args:
        annotation, root, options: those of `ClipDataset`.
        decoder: ``decord``, ``pyav`` or ``auto``, see `open_video`.
    """

    def __init__(self, annotation: str | os.PathLike, root: str | os.PathLike, *, decoder: str = "auto", **options):
        if decoder not in DECODERS:
            raise ValueError(f"VideoDataset: decoder must be one of {', '.join(DECODERS)}, got {decoder!r}")
        self.decoder = decoder
        super().__init__(annotation, root, **options)

    def _open(self, entry):
        return open_video(os.path.join(self.root, entry.path), self.decoder)


class RawFrameDataset(ClipDataset):
    """Folders of frames.

    Args:
        annotation, root, options: those of `ClipDataset`.
        filename_template: name of a frame, as ``img_{:05}.jpg`` (Kinetics) or ``{:05}.jpg`` (Something-Something).
        start_index: number in the name of a folder's first frame.
    """

    def __init__(
        self,
        annotation: str | os.PathLike,
        root: str | os.PathLike,
        *,
        filename_template: str = "img_{:05}.jpg",
        start_index: int = 1,
        **options,
    ):
        check_filename_template(filename_template)
        self.filename_template, self.start_index = filename_template, start_index
        super().__init__(annotation, root, raw_frames=True, **options)

    def _open(self, entry):
        return FrameFolder(
            os.path.join(self.root, entry.path),
            entry.num_frames,
            filename_template=self.filename_template,
            start_index=self.start_index,
            offset=entry.offset,
        )
