"""mmaction2's lists of pipeline steps, and the clips that they describe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..data import ClipSampling, SpatialTransform
from ..models import Normalization
from .network import read_normalization
from .sections import Section


@dataclass(frozen=True)
class ClipSettings:
    """How clips are cut out of videos.

    Args:
        sampling, transform: which frames, and what happens to them.
        test_mode: clips at fixed places, not at random.
        normalization: subtracted and divided out on the device.
        decoder: ``decord`` or ``pyav`` for videos, ``auto`` for frames.
    """

    sampling: ClipSampling
    transform: SpatialTransform
    test_mode: bool
    normalization: Normalization
    decoder: str = "auto"


# The order of the steps; a step may be missing unless it is needed.
_ORDER = ("init", "sample", "decode", "resize", "crop", "resize", "flip", "normalize", "format", "collect", "tensor")
_PLACES = {
    "DecordInit": "init",
    "PyAVInit": "init",
    "SampleFrames": "sample",
    "DecordDecode": "decode",
    "PyAVDecode": "decode",
    "RawFrameDecode": "decode",
    "Resize": "resize",
    "RandomResizedCrop": "crop",
    "CenterCrop": "crop",
    "ThreeCrop": "crop",
    "Flip": "flip",
    "Normalize": "normalize",
    "FormatShape": "format",
    "Collect": "collect",
    "ToTensor": "tensor",
}


def read_pipeline(steps: list[Section], where: str, *, videos: bool) -> ClipSettings:
    """Read and check a pipeline.

    Args:
        steps: are closed.
        where: path of the list, for messages.
        videos: whether the data set is of video files.

    Raises:
        ValueError: unknown or missing steps, an order that is not that of the published pipelines, wrong arguments.
    """
    sampling: dict[str, Any] = {}
    spatial: dict[str, Any] = {"short_side": None}
    other: dict[str, Any] = {}
    position, seen = 0, []
    for step in steps:
        kind = step.choice("type", tuple(_PLACES))
        place = _PLACES[kind]
        if place not in _ORDER[position:]:
            order = " ".join(_ORDER)
            raise ValueError(f"config: steps of {where} must come in the order {order}, got {kind} after {seen}")
        position += _ORDER[position:].index(place) + 1
        if place == "sample":
            sampling = _read_sample(step)
            other["test_mode"] = step.take("test_mode", False, bool)
        elif place == "decode":
            other["decoder"] = _read_decode(step, kind)
        elif place == "resize":
            after_crop = any(_PLACES[name] == "crop" for name in seen)
            spatial["crop_size" if after_crop else "short_side"] = _read_resize(step, after_crop)
        elif place == "crop":
            spatial.update(_read_crop(step, kind))
        elif place == "flip":
            spatial.update(_read_flip(step))
        elif place == "normalize":
            other["normalization"] = read_normalization(step)
        else:
            _read_form(step, kind)
        step.close()
        seen.append(kind)
    for wanted, place in (("SampleFrames", "sample"), ("a crop", "crop"), ("Normalize", "normalize")):
        if place not in [_PLACES[name] for name in seen]:
            raise ValueError(f"config: {where} must have {wanted}, got {seen}")
    if ("RawFrameDecode" in seen) == videos:
        wanted = "videos (DecordDecode or PyAVDecode)" if videos else "frames (RawFrameDecode)"
        raise ValueError(f"config: {where} must decode {wanted}, which its data set has, got {seen}")
    if "crop_size" not in spatial:
        raise ValueError(f"config: {where} must have a Resize after RandomResizedCrop, got {seen}")
    try:
        return ClipSettings(ClipSampling(**sampling), SpatialTransform(**spatial), **other)
    except ValueError as error:
        raise ValueError(f"config: {where}: {error}") from None


def _read_sample(step: Section) -> dict[str, Any]:
    return {
        "clip_len": step.count("clip_len"),
        "frame_interval": step.count("frame_interval", 1),
        "num_clips": step.count("num_clips", 1),
        "temporal_jitter": step.take("temporal_jitter", False, bool),
        "keep_tail_frames": step.take("keep_tail_frames", False, bool),
        "twice_sample": step.take("twice_sample", False, bool),
        "out_of_bound": step.choice("out_of_bound_opt", ("loop", "repeat_last"), "loop"),
    }


def _read_decode(step: Section, kind: str) -> str:
    if kind == "RawFrameDecode":
        step.fixed("io_backend", "disk")
        step.fixed("decoding_backend", "cv2")
    else:
        step.fixed("mode", "accurate")
    return {"DecordDecode": "decord", "PyAVDecode": "pyav"}.get(kind, "auto")


def _read_resize(step: Section, after_crop: bool) -> int:
    """Before the crop ``scale=(-1, short side)``, after it ``scale=(size, size), keep_ratio=False``."""
    scale = step.numbers("scale", length=2)
    step.fixed("interpolation", "bilinear")
    step.fixed("lazy", False)
    step.choice("keep_ratio", (not after_crop,), True)
    expected = "(size, size)" if after_crop else "(-1, short side)"
    if scale[0] != (scale[1] if after_crop else -1) or not isinstance(scale[1], int) or scale[1] < 1:
        raise ValueError(f"config: {step.path('scale')} must be {expected} in pixels, got {scale}")
    return scale[1]


def _read_crop(step: Section, kind: str) -> dict[str, Any]:
    step.fixed("lazy", False)
    if kind == "RandomResizedCrop":
        return {
            "crop": "random_resized",
            "area_range": step.numbers("area_range", (0.08, 1.0), length=2),
            "aspect_ratio_range": step.numbers("aspect_ratio_range", (3 / 4, 4 / 3), length=2),
        }
    size = step.take("crop_size", kind=(int, list, tuple))
    if isinstance(size, list | tuple) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    if not isinstance(size, int):
        raise ValueError(f"config: {step.path('crop_size')} must be a whole number of pixels, got {size!r}")
    return {"crop": {"CenterCrop": "center", "ThreeCrop": "three"}[kind], "crop_size": size}


def _read_flip(step: Section) -> dict[str, Any]:
    step.fixed("direction", "horizontal")
    step.fixed("lazy", False)
    labels = step.take("flip_label_map", None, dict)
    if any(not isinstance(item, int) for pair in (labels or {}).items() for item in pair):
        raise ValueError(f"config: {step.path('flip_label_map')} must map class to class, got {labels}")
    return {"flip": step.number("flip_ratio", 0.5), "flip_labels": labels}


def _read_form(step: Section, kind: str) -> None:
    """Steps that say what happens here in any case."""
    if kind in ("DecordInit", "PyAVInit"):
        step.fixed("io_backend", "disk")
        step.fixed("num_threads", 1)
    elif kind == "FormatShape":
        step.choice("input_format", ("NCTHW",))
    else:
        step.take("keys", [], (list, tuple))
        step.take("meta_keys", [], (list, tuple))
