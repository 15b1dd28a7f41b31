"""Videos to network input: lists, decoding, frame sampling, spatial transforms, test views, datasets and loaders."""

from .annotations import Entry, read_annotations
from .datasets import ClipDataset, RawFrameDataset, Sample, VideoDataset
from .decoding import DECODERS, Video, VideoError, open_video
from .frame_folders import FrameFolder, check_filename_template
from .loading import ClipLoader, Failure, build_loader
from .samplers import EpochSampler
from .sampling import ClipSampling, centred_offsets, clip_indices, even_clip_indices, random_offsets
from .streams import Capture, FrameRing, StreamWindows, Window
from .transforms import (
    SpatialTransform,
    center_crop,
    normalize,
    random_resized_crop,
    resize_short_side,
    short_side_size,
    three_crops,
    uniform_crops,
)
from .views import VideoViews, ViewPlan, cut_views, read_views
from .workers import TaskFailure, WorkerPool

__all__ = [
    "DECODERS",
    "Capture",
    "ClipDataset",
    "ClipLoader",
    "ClipSampling",
    "Entry",
    "EpochSampler",
    "Failure",
    "FrameFolder",
    "FrameRing",
    "RawFrameDataset",
    "Sample",
    "SpatialTransform",
    "StreamWindows",
    "TaskFailure",
    "Video",
    "VideoDataset",
    "VideoError",
    "VideoViews",
    "ViewPlan",
    "Window",
    "WorkerPool",
    "build_loader",
    "center_crop",
    "centred_offsets",
    "check_filename_template",
    "clip_indices",
    "cut_views",
    "even_clip_indices",
    "normalize",
    "open_video",
    "random_offsets",
    "random_resized_crop",
    "read_annotations",
    "read_views",
    "resize_short_side",
    "short_side_size",
    "three_crops",
    "uniform_crops",
]
