"""What a checkpoint says about its network beside the weights, read as text and never run."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from typing import Any

from ..models import Normalization, SlowFastConfig

CONFIG_ENTRY = "slowfast_ext_config"


def read_settings(extras: dict[str, Any], source: str) -> tuple[dict[str, Any], list[str]]:
    """Fields of :class:`SlowFastConfig` that the file states, and remarks.

    Args:
        extras: what the file holds beside the weights.
        source: the code base of its weights, as :func:`~slowfast_ext.checkpoints.keys.recognise` returns it.

    Raises:
        ValueError: the settings are damaged, or of a network that this library does not have.
    """
    text = own_settings(extras)
    if text is not None:
        try:
            return _read_own(text), []
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"load_checkpoint: the stored network configuration is damaged ({error})") from error
    fields, notes = (_read_mmaction2 if source == "mmaction2" else _read_pyslowfast)(extras)
    return {name: value for name, value in fields.items() if value is not None}, notes


def own_settings(extras: dict[str, Any]) -> str | None:
    """The configuration that :func:`~slowfast_ext.checkpoints.convert` stored, if the file has one."""
    text = extras.get(CONFIG_ENTRY) or _as_dict(extras.get("meta")).get(CONFIG_ENTRY)
    return text if isinstance(text, str) else None


def _read_own(text: str) -> dict[str, Any]:
    config = SlowFastConfig.from_dict(json.loads(text))
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _read_mmaction2(extras: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """From ``meta.config`` (0.x) or ``meta.cfg`` (1.x): the full text of the Python configuration."""
    meta = _as_dict(extras.get("meta"))
    text = meta.get("config") or meta.get("cfg")
    if not isinstance(text, str):
        return {}, []
    try:
        config = _assignments(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}, ["its configuration text could not be parsed and was not used"]
    model = _as_dict(config.get("model"))
    backbone, head = _as_dict(model.get("backbone")), _as_dict(model.get("cls_head"))
    steps = {}
    if isinstance(config.get("test_pipeline"), list):
        steps = {str(_as_dict(step).get("type")): _as_dict(step) for step in config["test_pipeline"]}
    frames, scale = steps.get("SampleFrames", {}), steps.get("Resize", {}).get("scale")
    crop = next((kind for kind in ("ThreeCrop", "CenterCrop") if kind in steps), None)
    statistics = steps.get("Normalize") or _as_dict(model.get("data_preprocessor"))
    fields = {
        "resample_rate": _number(backbone.get("resample_rate")),
        "speed_ratio": _number(backbone.get("speed_ratio")),
        "dropout": _number(head.get("dropout_ratio")),
        "clip_len": _number(frames.get("clip_len")),
        "frame_interval": _number(frames.get("frame_interval")),
        "test_clips": _number(frames.get("num_clips", 1)) if frames else None,
        "test_crops": crop and {"ThreeCrop": 3, "CenterCrop": 1}[crop],
        "test_crop_size": crop and _number(steps[crop].get("crop_size")),
        "test_short_side": _number(scale[1]) if isinstance(scale, tuple) and len(scale) == 2 else None,  # (-1, 256)
        "normalization": _normalization(statistics.get("mean"), statistics.get("std"), scale=1),
    }
    return fields, []


def _read_pyslowfast(extras: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """From ``cfg``, the YAML text of PySlowFast's configuration."""
    text = extras.get("cfg")
    if not isinstance(text, str):
        return {}, []
    values, notes = _yaml_sections(text), []

    def number(name: str) -> int | float | None:
        return _number(_literal_text(values.get(name)))

    if values.get("RESNET.STRIDE_1X1") == "true":
        raise ValueError("load_checkpoint: networks with RESNET.STRIDE_1X1 are not supported, got one")
    if values.get("DETECTION.ENABLE") == "true":
        notes.append("trained for detection: its last stage was dilated and its head pooled regions")
    activation = values.get("MODEL.HEAD_ACT", "softmax")
    if activation != "softmax":
        notes.append(f"its scores are {activation}(logits), not softmax")
    crop, test_crop = number("DATA.TRAIN_CROP_SIZE"), number("DATA.TEST_CROP_SIZE")
    statistics = [[_literal_text(item) for item in values.get(f"DATA.{name}", [])] for name in ("MEAN", "STD")]
    fields = {
        "resample_rate": number("SLOWFAST.ALPHA"),
        "speed_ratio": number("SLOWFAST.ALPHA"),
        "dropout": number("MODEL.DROPOUT_RATE"),
        "clip_len": number("DATA.NUM_FRAMES"),
        "frame_interval": number("DATA.SAMPLING_RATE"),
        "test_clips": number("TEST.NUM_ENSEMBLE_VIEWS"),
        "test_crops": number("TEST.NUM_SPATIAL_CROPS"),
        "test_crop_size": test_crop,
        "test_short_side": test_crop,
        "head_window": (crop // 32,) * 2 if crop else None,
        "head_pooling": None if activation == "softmax" else "sliding",
        "normalization": _normalization(*statistics, scale=255),
    }
    return fields, notes


def _as_dict(value) -> dict:
    return value if isinstance(value, dict) else {}


def _number(value) -> int | float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _normalization(mean, std, scale: int) -> Normalization | None:
    """``None`` unless both are three numbers; ``scale`` brings them to the 0 to 255 scale."""
    for item in (mean, std):
        if not isinstance(item, list | tuple) or len(item) != 3 or None in map(_number, item):
            return None
    return Normalization(*(tuple(scale * value for value in item) for item in (mean, std)))


def _assignments(source: str) -> dict[str, Any]:
    """The top-level assignments of a Python file, as far as they are literals, ``dict(...)`` and names of such."""
    names: dict[str, Any] = {}
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            names[statement.targets[0].id] = _literal(statement.value, names)
    return names


def _literal(node: ast.expr, names: dict[str, Any]) -> Any:
    """The value of an expression; ``None`` where it would have to be computed."""
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            return names.get(node.id)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List():
            return [_literal(item, names) for item in node.elts]
        case ast.Tuple():
            return tuple(_literal(item, names) for item in node.elts)
        case ast.Dict(keys=keys, values=values):
            keys = [key and _literal(key, names) for key in keys]
            pairs = zip(keys, [_literal(value, names) for value in values], strict=True)
        case ast.Call(func=ast.Name(id="dict"), args=[]):
            pairs = [(keyword.arg, _literal(keyword.value, names)) for keyword in node.keywords]
        case _:
            return None
    result = {}
    for key, value in pairs:
        if key is None:  # **other
            result.update(_as_dict(value))
        elif isinstance(key, str | int):
            result[key] = value
    return result


def _literal_text(text) -> Any:
    """The number in a piece of YAML, else ``None``."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None


def _yaml_sections(text: str) -> dict[str, str | list[str]]:
    """``SECTION.KEY`` to its text, or to a list of texts, for the two-level YAML that PySlowFast writes."""
    values: dict[str, str | list[str]] = {}
    section = key = ""
    for line in text.splitlines():
        if match := re.fullmatch(r"(\w+):\s*", line):
            section = match[1]
        elif match := re.fullmatch(r"  (\w+):\s*(.*?)\s*", line):
            key = f"{section}.{match[1]}"
            flow = re.fullmatch(r"\[(.*)\]", match[2])
            values[key] = [item.strip() for item in flow[1].split(",")] if flow else match[2] or []
        elif (match := re.fullmatch(r"  - (\S+)\s*", line)) and isinstance(values.get(key), list):
            values[key].append(match[1])
    return values
