"""Which frames of a video a clip is made of.

A clip is ``clip_len`` frames, ``frame_interval`` apart; its span is ``clip_len * frame_interval`` frames.
mmaction2 places clips by whole frames (`random_offsets`, `centred_offsets`, `clip_indices`), PySlowFast and
pytorchvideo by fractions of a span in seconds (`even_clip_indices`). Randomness comes from a NumPy generator only.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

PROTOCOLS = ("mmaction2", "pyslowfast")


@dataclass(frozen=True)
class ClipSampling:
    """Which clips of a video are seen. The defaults are those of training on Kinetics-400.

    Attributes:
        clip_len, frame_interval: frames of a clip and their distance in the video.
        num_clips: clips of a video.
        out_of_bound: what stands for frames behind the end, ``loop`` or ``repeat_last``, see `clip_indices`.
        temporal_jitter: random clips only: each frame moves forward by its own random part of the interval.
        keep_tail_frames: random clips only, see `random_offsets`.
        twice_sample: centred clips only, see `centred_offsets`; doubles the number of clips.
        protocol: ``mmaction2`` or ``pyslowfast`` (also pytorchvideo; has no random clips and none of the four above).
    """

    clip_len: int = 32
    frame_interval: int = 2
    num_clips: int = 1
    out_of_bound: str = "loop"
    temporal_jitter: bool = False
    keep_tail_frames: bool = False
    twice_sample: bool = False
    protocol: str = "mmaction2"

    def __post_init__(self):
        for name in ("clip_len", "frame_interval", "num_clips"):
            if getattr(self, name) < 1:
                raise ValueError(f"ClipSampling: {name} must be at least 1, got {getattr(self, name)}")
        _check_out_of_bound(self.out_of_bound)
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"ClipSampling: protocol must be 'mmaction2' or 'pyslowfast', got {self.protocol!r}")
        if self.protocol == "pyslowfast":
            plain = ClipSampling(self.clip_len, self.frame_interval, self.num_clips)
            for name in ("out_of_bound", "temporal_jitter", "keep_tail_frames", "twice_sample"):
                if getattr(self, name) != getattr(plain, name):
                    raise ValueError(
                        f"ClipSampling: {name} must be {getattr(plain, name)!r} for the protocol pyslowfast, "
                        f"got {getattr(self, name)!r}"
                    )

    @property
    def num_test_clips(self) -> int:
        """Clips of `centred_clips`."""
        return self.num_clips * (2 if self.twice_sample else 1)

    def with_frames(self, clip_len: int) -> "ClipSampling":
        """As many frames of the same span of the video, as multigrid training varies them."""
        span = self.clip_len * self.frame_interval
        if clip_len < 1 or span % clip_len:
            raise ValueError(f"ClipSampling: clip_len must divide the span of {span} frames, got {clip_len}")
        return replace(self, clip_len=clip_len, frame_interval=span // clip_len)

    def random_clips(self, num_frames: int, generator: np.random.Generator) -> np.ndarray:
        """Frame numbers of training clips: int64 array (num_clips, clip_len), 0-based."""
        if self.twice_sample or self.protocol != "mmaction2":
            raise ValueError(f"ClipSampling: random clips must be mmaction2's, without twice_sample, got {self}")
        frames = num_frames, self.clip_len, self.frame_interval
        offsets = random_offsets(*frames, self.num_clips, generator, keep_tail_frames=self.keep_tail_frames)
        jitter = generator if self.temporal_jitter else None
        return clip_indices(offsets, *frames, out_of_bound=self.out_of_bound, jitter=jitter)

    def centred_clips(self, num_frames: int, fps: float) -> np.ndarray:
        """Frame numbers of the validation and test clips: int64 array (clips, clip_len), 0-based."""
        if self.temporal_jitter or self.keep_tail_frames:
            raise ValueError(
                f"ClipSampling: test clips must have no temporal_jitter and no keep_tail_frames, got {self}"
            )
        frames = num_frames, self.clip_len, self.frame_interval
        if self.protocol == "pyslowfast":
            return even_clip_indices(num_frames, fps, self.clip_len, self.frame_interval, self.num_clips)
        offsets = centred_offsets(*frames, self.num_clips, twice_sample=self.twice_sample)
        return clip_indices(offsets, *frames, out_of_bound=self.out_of_bound)


def random_offsets(
    num_frames: int,
    clip_len: int,
    frame_interval: int,
    num_clips: int,
    generator: np.random.Generator,
    *,
    keep_tail_frames: bool = False,
) -> np.ndarray:
    """First frames of training clips: one random clip in each of ``num_clips`` equal parts (mmaction2).

    Args:
        num_frames: length of the video, N.
        clip_len, frame_interval: frames of a clip and their distance; span = clip_len * frame_interval.
        num_clips: clips of one video.
        generator: source of randomness.
        keep_tail_frames: parts of fractional length, so that the last starts can be drawn as well.

    Returns:
        int64 array (num_clips,), 0-based. Videos shorter than a clip start at 0 and leave the rest to `clip_indices`.
    """
    _check_positive(num_frames=num_frames, clip_len=clip_len, frame_interval=frame_interval, num_clips=num_clips)
    span = clip_len * frame_interval
    starts = num_frames - span + 1
    if keep_tail_frames:
        if starts < 1:
            return np.zeros(num_clips, dtype=np.int64)
        part = starts / num_clips
        return (np.arange(num_clips) * part + generator.uniform(0, part, num_clips)).astype(np.int64)
    part = starts // num_clips
    if part > 0:
        return np.arange(num_clips) * part + generator.integers(part, size=num_clips)
    if num_frames > max(num_clips, span):
        return np.sort(generator.integers(starts, size=num_clips))
    if part == 0:
        return np.around(np.arange(num_clips) * (starts / num_clips)).astype(np.int64)
    return np.zeros(num_clips, dtype=np.int64)


def centred_offsets(
    num_frames: int, clip_len: int, frame_interval: int, num_clips: int, *, twice_sample: bool = False
) -> np.ndarray:
    """First frames of validation and test clips: the middle of each of ``num_clips`` equal parts (mmaction2 0.x).

    Args:
        num_frames, clip_len, frame_interval, num_clips: as `random_offsets`.
        twice_sample: add the clips at the beginning of each part.

    Returns:
        int64 array (num_clips,) or (2 * num_clips,), 0-based; zeros for videos shorter than a clip.
    """
    _check_positive(num_frames=num_frames, clip_len=clip_len, frame_interval=frame_interval, num_clips=num_clips)
    starts = num_frames - clip_len * frame_interval + 1
    if starts < 1:
        return np.zeros(num_clips * (2 if twice_sample else 1), dtype=np.int64)
    part = starts / num_clips
    base = np.arange(num_clips) * part
    offsets = (base + part / 2).astype(np.int64)
    return np.concatenate([offsets, base.astype(np.int64)]) if twice_sample else offsets


def clip_indices(
    offsets: np.ndarray,
    num_frames: int,
    clip_len: int,
    frame_interval: int,
    *,
    out_of_bound: str = "loop",
    jitter: np.random.Generator | None = None,
    start_index: int = 0,
) -> np.ndarray:
    """Frame numbers of the clips that begin at ``offsets``.

    Args:
        offsets: int array (num_clips,), 0-based.
        num_frames, clip_len, frame_interval: as `random_offsets`.
        out_of_bound: ``loop`` begins again at the first frame; ``repeat_last`` repeats the clip's last real one.
        jitter: if given, each frame moves forward by its own random 0 to frame_interval - 1.
        start_index: number of the first frame: 0 for videos, 1 for folders of pictures.

    Returns:
        int64 array (num_clips, clip_len).
    """
    _check_positive(num_frames=num_frames, clip_len=clip_len, frame_interval=frame_interval)
    _check_out_of_bound(out_of_bound)
    indices = np.asarray(offsets, dtype=np.int64)[:, None] + np.arange(clip_len) * frame_interval
    if jitter is not None:
        indices = indices + jitter.integers(frame_interval, size=indices.shape)
    if out_of_bound == "loop":
        indices = indices % num_frames
    else:
        inside = indices < num_frames
        last = np.where(inside, indices, 0).max(axis=1, keepdims=True)
        indices = np.where(inside, indices, last)
    return indices + start_index


def even_clip_indices(
    num_frames: int, fps: float, clip_len: int, sampling_rate: int, num_clips: int, *, target_fps: float = 30.0
) -> np.ndarray:
    """Frame numbers of the test clips of PySlowFast and pytorchvideo.

    A clip lasts ``sampling_rate * clip_len / target_fps`` seconds whatever the frame rate of the video, its frames are
    evenly spread from its first to its last, and clip k of n begins at k/n of what the video is longer than a clip.

    Args:
        num_frames: length of the video.
        fps: its frames per second; 0 (unknown) counts as ``target_fps``.
        clip_len, sampling_rate: frames of a clip and their distance at ``target_fps``.
        num_clips: clips of one video.

    Returns:
        int64 array (num_clips, clip_len), 0-based; beyond the end the last frame repeats.
    """
    _check_positive(num_frames=num_frames, clip_len=clip_len, sampling_rate=sampling_rate, num_clips=num_clips)
    span = sampling_rate * clip_len * (fps or target_fps) / target_fps
    starts = [max(num_frames - span, 0) * k / num_clips for k in range(num_clips)]
    # In float32 as the originals do, so that positions which fall on a whole frame are cut to the same one.
    clips = [torch.linspace(start, start + span - 1, clip_len).clamp(0, num_frames - 1).long() for start in starts]
    return torch.stack(clips).numpy()


def _check_out_of_bound(out_of_bound: str) -> None:
    if out_of_bound not in ("loop", "repeat_last"):
        raise ValueError(f"frame sampling: out_of_bound must be 'loop' or 'repeat_last', got {out_of_bound!r}")


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"frame sampling: {name} must be at least 1, got {value}")
