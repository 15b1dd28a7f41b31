"""Load a SlowFast checkpoint, whoever wrote it."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..models import SlowFastConfig, build_model
from .describe import describe
from .keys import recognise, strip_wrappers, to_mmaction2
from .read import CheckpointFile, read_checkpoint
from .settings import own_settings, read_settings

_CLASSIFIER = ("cls_head.fc_cls.weight", "cls_head.fc_cls.bias")
# Properties of a network that its weights depend on but that loading does not change.
_BEHAVIOUR = ("frame_sampling", "normalization", "head_pooling", "resample_rate", "speed_ratio")


@dataclass(frozen=True)
class Mismatch:
    """An entry whose shape in the file differs from that in the model; the model's values were kept."""

    name: str
    file_shape: tuple[int, ...]
    model_shape: tuple[int, ...]


@dataclass
class LoadReport:
    """What :func:`load_checkpoint` did. ``print`` it.

    Args:
        path: the file.
        source_format: who wrote it: "mmaction2 0.x", "mmaction2 1.x", "mmaction2", "PySlowFast", "PySlowFast (Caffe2)",
            "pytorchvideo" or "slowfast_ext".
        matched: entries of the model that were loaded.
        missing: entries of the model that are not in the file and kept their values.
        unexpected: entries of the file, under its own names, that have no place in the model.
        mismatched: entries that are in both with different shapes.
        notes: what else is worth knowing, a sentence each.
        differing: what the weights were trained with, by its name in :class:`~slowfast_ext.models.SlowFastConfig`,
            where a given model has something else.
    """

    path: str
    source_format: str
    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[Mismatch] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    differing: dict[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.source_format} checkpoint, {len(self.matched)} entries loaded"]
        for title, names in (
            ("missing in the file", self.missing),
            ("unexpected in the file", self.unexpected),
            ("of another shape", [f"{m.name} {m.file_shape} -> {m.model_shape}" for m in self.mismatched]),
        ):
            if names:
                lines.append(f"  {len(names)} {title}: {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def load_checkpoint(
    path: str | os.PathLike, model: nn.Module | None = None, *, num_classes: int | None = None
) -> nn.Module:
    """Load SlowFast weights of mmaction2 (0.x, 1.x), PySlowFast (``.pyth``, Caffe2 ``.pkl``), pytorchvideo or our own.

    The kind of file is told by its content. Nothing in it is run: ``torch.load(weights_only=True)`` reads it, or, where
    a file holds foreign objects beside the weights, a reader that leaves those objects inert.

    Args:
        path: the file.
        model: a network to load into, in place. Without it, the network that the weights describe is built: depth
            of each pathway, temporal kernels, fusion kernel, lateral norm, classes; and, after the settings in the file
            or else the habits of the code base that wrote it: frame sampling, frame rates, normalisation, head pooling.
        num_classes: width of a classifier that differs from the file's. The classifier is then left at its initial
            values and reported as mismatched. A given ``model`` must already have that width.

    Returns:
        The model, in training mode if it was built here, with a :class:`LoadReport` as ``load_report``. With a given
        ``model`` a warning repeats the report if entries are missing or differ in shape (other than through
        ``num_classes``), or if the weights want other input than the model gives them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no checkpoint, truncated, of another kind of network, or of a SlowFast that cannot be built.
    """
    if model is not None and num_classes not in (None, width := _classes(model)):
        raise ValueError(f"load_checkpoint: num_classes must be that of the given model ({width}), got {num_classes}")
    file = read_checkpoint(path)
    source, weights, unexpected = _translate(file, path)
    report = LoadReport(os.fspath(path), _source_format(source, file), unexpected=unexpected)
    if file.ignored:
        report.notes.append(f"objects of these kinds were left out: {', '.join(file.ignored)}")

    if model is None:
        settings, notes = read_settings(file.extras, source)
        report.notes += notes
        description = describe(weights, source, settings)
        if _CLASSIFIER[0] not in weights and num_classes is None:
            raise ValueError("load_checkpoint: num_classes must be given for a file without a classifier, got None")
        if description.assumed:
            values = ", ".join(f"{name}={getattr(description.config, name)}" for name in description.assumed)
            report.notes.append(f"not recorded in the file, taken from the published networks: {values}")
        model = build_model(description.config, num_classes)
        _copy(weights, model, report)
        _require_whole_backbone(report)
    else:
        _copy(weights, model, report)
        report.differing = _differing_behaviour(file, source, weights, model)
        report.notes += [
            f"the weights were trained with {name}={value}, the model has {getattr(model.config, name)}"
            for name, value in report.differing.items()
        ]
        expected = set(_CLASSIFIER) if num_classes is not None else set()
        odd = {*report.missing, *(mismatch.name for mismatch in report.mismatched)} - expected
        if odd or report.differing:
            warnings.warn(str(report), stacklevel=2)
    model.load_report = report
    return model


def _classes(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    return config.num_classes if isinstance(config, SlowFastConfig) else None


def _translate(file: CheckpointFile, path) -> tuple[str, dict[str, Tensor], list[str]]:
    """The code base; the weights by mmaction2's names, classifier columns in its order; the names without a place."""
    stripped = {strip_wrappers(name): name for name in file.tensors}
    source = recognise(stripped)
    if source is None:
        raise ValueError(
            f"load_checkpoint: {path} must hold a SlowFast network of mmaction2, PySlowFast or pytorchvideo, "
            f"got entries such as {sorted(stripped)[:4]}"
        )
    nonlocal_blocks = [name for name in stripped if "nonlocal" in name or "non_local" in name]
    if nonlocal_blocks:
        raise ValueError(
            f"load_checkpoint: networks with non-local blocks are not supported, got {nonlocal_blocks[0]} in {path}"
        )
    weights, unexpected = {}, []
    for name, original in stripped.items():
        target = to_mmaction2(name, source)
        if target is None:
            unexpected.append(original)
        else:
            weights[target] = file.tensors[original]
    classifier = weights.get(_CLASSIFIER[0])
    if source != "mmaction2" and classifier is not None and classifier.dim() == 2:
        # Columns [slow | fast] become [fast | slow]; the fast ones are as many as its last stage has channels.
        last_stage = weights.get("backbone.fast_path.layer4.0.downsample.conv.weight")
        if last_stage is None:
            raise ValueError(f"load_checkpoint: {path} must hold the last stage of the fast pathway")
        fast = last_stage.shape[0]
        weights[_CLASSIFIER[0]] = torch.cat([classifier[:, -fast:], classifier[:, :-fast]], 1)
    return source, weights, unexpected


def _source_format(source: str, file: CheckpointFile) -> str:
    if source == "mmaction2":
        if own_settings(file.extras):
            return "slowfast_ext"
        meta = file.extras.get("meta")
        meta = meta if isinstance(meta, dict) else {}
        if "mmengine_version" in meta or "message_hub" in file.extras:
            return "mmaction2 1.x"
        return "mmaction2 0.x" if "mmcv_version" in meta or "mmaction_version" in meta else "mmaction2"
    return {"pyslowfast": "PySlowFast", "caffe2": "PySlowFast (Caffe2)", "pytorchvideo": "pytorchvideo"}[source]


def _copy(weights: dict[str, Tensor], model: nn.Module, report: LoadReport):
    """Load what fits into ``model`` and put the rest into the report."""
    own = model.state_dict()
    fitting = {}
    for name, value in weights.items():
        if name not in own:
            report.unexpected.append(name)
        elif own[name].shape != value.shape:
            report.mismatched.append(Mismatch(name, tuple(value.shape), tuple(own[name].shape)))
        else:
            fitting[name] = value
    if not fitting:
        raise ValueError(
            f"load_checkpoint: {report.path} must fit the model, but none of its {len(weights)} entries does"
        )
    model.load_state_dict(fitting, strict=False)
    report.matched = list(fitting)
    # Files of Caffe2 have no batch counters, and nothing depends on them at a fixed momentum.
    report.missing = [name for name in own if name not in weights and not name.endswith("num_batches_tracked")]


def _require_whole_backbone(report: LoadReport):
    """A network built from a file must get every weight from it, the classifier excepted."""
    missing = [name for name in report.missing if name not in _CLASSIFIER]
    mismatched = [mismatch for mismatch in report.mismatched if mismatch.name not in _CLASSIFIER]
    if missing or mismatched:
        raise ValueError(f"load_checkpoint: the file must hold a whole network, got\n{report}")


def _differing_behaviour(file: CheckpointFile, source: str, weights: dict[str, Tensor], model: nn.Module) -> dict:
    """What the weights were trained with and the model does not do."""
    config = getattr(model, "config", None)
    if not isinstance(config, SlowFastConfig):
        return {}
    try:
        description = describe(weights, source, read_settings(file.extras, source)[0])
    except ValueError:  # the file holds only part of a network; what fits is in the report
        return {}
    wanted = {name: getattr(description.config, name) for name in _BEHAVIOUR if name not in description.assumed}
    return {name: value for name, value in wanted.items() if value != getattr(config, name)}
