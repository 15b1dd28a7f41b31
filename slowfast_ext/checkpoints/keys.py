"""The names of the same weights in the four code bases, translated to mmaction2's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

_PATHWAYS = ("slow_path", "fast_path")
_CAFFE2_BN = {"s": "weight", "b": "bias", "rm": "running_mean", "riv": "running_var"}


def _lateral(fusion: int) -> str:
    """The lateral connection after the stem (0) or after a stage."""
    return "backbone.slow_path." + ("conv1_lateral" if fusion == 0 else f"layer{fusion}_lateral")


def _convolution(letter: str) -> str:
    return f"conv{'abc'.index(letter) + 1}"


def _mmaction2(key: str) -> str | None:
    return key if key.startswith(("backbone.slow_path.", "backbone.fast_path.", "cls_head.fc_cls.")) else None


def _pyslowfast(key: str) -> str | None:
    if match := re.fullmatch(r"head\.projection\.(weight|bias)", key):
        return f"cls_head.fc_cls.{match[1]}"
    if match := re.fullmatch(r"s1\.pathway([01])_stem\.(conv|bn)\.(\w+)", key):
        return f"backbone.{_PATHWAYS[int(match[1])]}.conv1.{match[2]}.{match[3]}"
    if match := re.fullmatch(r"s([1-4])_fuse\.(conv_f2s|bn)\.(\w+)", key):
        return f"{_lateral(int(match[1]) - 1)}.{match[2].removesuffix('_f2s')}.{match[3]}"
    if match := re.fullmatch(r"s([2-5])\.pathway([01])_res(\d+)\.(branch1|branch2\.([abc]))(_bn)?\.(\w+)", key):
        stage, pathway, block, _, letter, norm, entry = match.groups()
        module = _convolution(letter) if letter else "downsample"
        prefix = f"backbone.{_PATHWAYS[int(pathway)]}.layer{int(stage) - 1}.{block}"
        return f"{prefix}.{module}.{'bn' if norm else 'conv'}.{entry}"
    return None


def _pytorchvideo(key: str) -> str | None:
    if match := re.fullmatch(r"blocks\.6\.proj\.(weight|bias)", key):
        return f"cls_head.fc_cls.{match[1]}"
    if match := re.fullmatch(r"blocks\.0\.multipathway_blocks\.([01])\.(conv|norm)\.(\w+)", key):
        return f"backbone.{_PATHWAYS[int(match[1])]}.conv1.{match[2].replace('norm', 'bn')}.{match[3]}"
    if match := re.fullmatch(r"blocks\.([0-3])\.multipathway_fusion\.(conv_fast_to_slow|norm)\.(\w+)", key):
        return f"{_lateral(int(match[1]))}.{'bn' if match[2] == 'norm' else 'conv'}.{match[3]}"
    block = r"blocks\.([1-4])\.multipathway_blocks\.([01])\.res_blocks\.(\d+)"
    if match := re.fullmatch(block + r"\.(?:branch1_(conv|norm)|branch2\.(conv|norm)_([abc]))\.(\w+)", key):
        stage, pathway, index, shortcut, kind, letter, entry = match.groups()
        module = _convolution(letter) if letter else "downsample"
        kind = (shortcut or kind).replace("norm", "bn")
        return f"backbone.{_PATHWAYS[int(pathway)]}.layer{stage}.{index}.{module}.{kind}.{entry}"
    return None


def _caffe2(key: str) -> str | None:
    if key in ("pred_w", "pred_b"):
        return "cls_head.fc_cls." + ("weight" if key == "pred_w" else "bias")
    if match := re.fullmatch(r"t_(?:pool1|res([2-4])_\d+_branch2c_bn)_subsample_(?:w|bn_(s|b|rm|riv))", key):
        lateral = _lateral(int(match[1]) - 1 if match[1] else 0)
        return f"{lateral}.bn.{_CAFFE2_BN[match[2]]}" if match[2] else f"{lateral}.conv.weight"
    pathway = _PATHWAYS[key.startswith("t_")]
    key = key.removeprefix("t_")
    if match := re.fullmatch(r"conv1_w|res_conv1_bn_(s|b|rm|riv)", key):
        return f"backbone.{pathway}.conv1." + (f"bn.{_CAFFE2_BN[match[1]]}" if match[1] else "conv.weight")
    if match := re.fullmatch(r"res([2-5])_(\d+)_branch(?:1|2([abc]))_(?:w|bn_(s|b|rm|riv))", key):
        stage, block, letter, entry = match.groups()
        module = _convolution(letter) if letter else "downsample"
        kind = f"bn.{_CAFFE2_BN[entry]}" if entry else "conv.weight"
        return f"backbone.{pathway}.layer{int(stage) - 1}.{block}.{module}.{kind}"
    return None


# Of each code base: a weight that every one of its SlowFast checkpoints has, and the translation of a name.
_SOURCES: dict[str, tuple[str, Callable[[str], str | None]]] = {
    "mmaction2": ("backbone.slow_path.conv1.conv.weight", _mmaction2),
    "pyslowfast": ("s1.pathway0_stem.conv.weight", _pyslowfast),
    "pytorchvideo": ("blocks.0.multipathway_blocks.0.conv.weight", _pytorchvideo),
    "caffe2": ("t_conv1_w", _caffe2),
}


def strip_wrappers(key: str) -> str:
    """``module.`` comes from data parallelism, ``model.`` from pytorchvideo networks trained inside PySlowFast."""
    while key.startswith(("module.", "model.")):
        key = key.split(".", 1)[1]
    return key


def recognise(keys: Iterable[str]) -> str | None:
    """Which code base wrote these names (without wrappers): a key of the table above, or ``None``."""
    keys = set(keys)
    return next((source for source, (landmark, _) in _SOURCES.items() if landmark in keys), None)


def to_mmaction2(key: str, source: str) -> str | None:
    """mmaction2's name of a weight, or ``None`` if it has no place in a SlowFast network.

    Args:
        key: the name in the file, without wrappers.
        source: ``"mmaction2"``, ``"pyslowfast"``, ``"pytorchvideo"`` or ``"caffe2"``.
    """
    return _SOURCES[source][1](key)
