"""Export to ONNX, checked against the network that was exported."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..accelerate import restore
from ..models import SlowFastRecognizer
from .extras import require_packages
from .files import written_then_renamed

OUTPUTS = ("logits", "probabilities")
# Both sides compute in float32 and differ in the order of sums and by batch norms folded into convolutions, which
# gives some 1e-7; a wrong frame or a transposed weight gives errors near 1.
TOLERANCE = 1e-4
# The graph is traced with two clips, so neither of these sizes is one that it could have kept as a constant.
_TRACED_BATCH = 2
_CHECKED_BATCHES = (1, 3)


@dataclass(frozen=True)
class ExportReport:
    """What :func:`export_onnx` wrote.

    Attributes:
        path: the file.
        opset: version of the operators in it.
        clip_shape: of the input ``clip``, without the batch: 3, T, H, W.
        output: name of the output, ``logits`` or ``probabilities``.
        errors: relative L2 error of ONNX Runtime's result against PyTorch's by batch size.
    """

    path: str
    opset: int
    clip_shape: tuple[int, int, int, int]
    output: str
    errors: dict[int, float]


def export_onnx(
    model: SlowFastRecognizer,
    path: str | os.PathLike,
    *,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    output: str = "logits",
    opset: int | None = None,
) -> ExportReport:
    """Write ``model`` as one ONNX file: ``clip`` float32 (batch, 3, T, H, W) -> ``output`` (batch, num_classes).

    The clip is normalised RGB; the batch may have any size. Batch norms are folded. The network's configuration, with
    the normalisation in it, is stored under ``slowfast_ext.config`` in the file's metadata. ONNX Runtime runs the file
    at two batch sizes and must give what the plain network gives before the file gets its name; an existing one is
    replaced only then.

    Args:
        model: on any device; it is not changed, and fused twins are exported as the blocks they replace.
        path: file to write.
        frames, height, width: T, H and W; by default those of the network's test clips.
        output: ``logits``, or ``probabilities``: their softmax. Right for all three head poolings.
        opset: version of the ONNX operators, 18 or newer; by default the exporter's own.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing.
        ValueError: unknown ``output``, clips that the network does not take, or an ``opset`` that cannot be produced.
        RuntimeError: the exporter fails, or the results differ by more than ``TOLERANCE``.
    """
    require_packages("export", ("onnx", "onnxscript", "onnxruntime"), "onnx")
    if output not in OUTPUTS:
        raise ValueError(f"export_onnx: output must be one of {', '.join(OUTPUTS)}, got {output!r}")
    config = model.config
    size = (frames or config.clip_len, height or config.test_crop_size, width or config.test_crop_size)
    network = restore(copy.deepcopy(model)).cpu().float().eval()
    if output == "probabilities":
        network = nn.Sequential(network, nn.Softmax(1))

    generator = torch.Generator().manual_seed(0)
    clips = [torch.randn(batch, 3, *size, generator=generator) for batch in _CHECKED_BATCHES]
    with torch.inference_mode():
        expected = [network(clip) for clip in clips]  # a clip that the network does not take is refused here
    with _quiet():
        program = torch.onnx.export(
            network,
            (torch.zeros(_TRACED_BATCH, 3, *size),),
            dynamo=True,
            input_names=["clip"],
            output_names=[output],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=opset,
            verbose=False,
        )
    written_opset = program.model.opset_imports[""]
    if opset not in (None, written_opset):
        raise ValueError(f"export_onnx: opset must be one that the exporter can produce, such as 18 to 23, got {opset}")
    program.model.metadata_props["slowfast_ext.config"] = json.dumps(config.to_dict())
    with written_then_renamed(path) as temporary:
        program.save(temporary, external_data=False)
        errors = {len(clip): _error(temporary, clip, y) for clip, y in zip(clips, expected, strict=True)}
        if not max(errors.values()) <= TOLERANCE:
            raise RuntimeError(
                f"export_onnx: ONNX Runtime must agree with PyTorch to {TOLERANCE:g}, got relative errors {errors}"
            )
    return ExportReport(os.fspath(path), written_opset, (3, *size), output, errors)


def _error(path: os.PathLike, clip: Tensor, expected: Tensor) -> float:
    """Relative L2 error of what ONNX Runtime computes."""
    import onnx
    import onnxruntime

    onnx.checker.check_model(os.fspath(path))
    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"clip": clip.numpy()})
    if result.shape != tuple(expected.shape):
        raise RuntimeError(f"export_onnx: the result must be {tuple(expected.shape)}, got {result.shape}")
    return float((torch.from_numpy(result) - expected).norm() / expected.norm())


@contextlib.contextmanager
def _quiet():
    """Without the exporter's remarks on packages that are not there, on its own future and on opsets it cannot do."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
