"""Videos to network input: decoding, frame sampling, spatial transforms, test views."""

from .decoding import DECODERS, Video, VideoError, open_video
from .sampling import centred_offsets, clip_indices, even_clip_indices, random_offsets
from .transforms import center_crop, normalize, resize_short_side, short_side_size, three_crops, uniform_crops
from .views import VideoViews, ViewPlan, cut_views, read_views

__all__ = [
    "DECODERS",
    "Video",
    "VideoError",
    "VideoViews",
    "ViewPlan",
    "center_crop",
    "centred_offsets",
    "clip_indices",
    "cut_views",
    "even_clip_indices",
    "normalize",
    "open_video",
    "random_offsets",
    "read_views",
    "resize_short_side",
    "short_side_size",
    "three_crops",
    "uniform_crops",
]
