"""A network in the runtimes to which people take it from eager PyTorch."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from slowfast_ext.evaluation.onnx_export import export_onnx


def torchscript(model: nn.Module, clip: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # of the tracer, about the checks of shapes
        traced = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(model, clip)))

    def call() -> Tensor:
        with torch.inference_mode():
            return traced(clip)

    return call


def onnxruntime(model: nn.Module, clip: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    """From the file that ``slowfast-ext export`` writes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Else its threads go on waiting actively after a call, in the time of the variant that comes next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network.onnx")
        _, _, frames, height, width = clip.shape
        export_onnx(model, path, frames=frames, height=height, width=width)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    array = clip.numpy()
    return lambda: torch.from_numpy(session.run(None, {"clip": array})[0])


def openvino(model: nn.Module, clip: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    import openvino

    options = {
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # of the tracer, about the checks of shapes
        converted = openvino.convert_model(model, example_input=clip)
    converted.reshape(list(clip.shape))
    request = openvino.compile_model(converted, "CPU", options).create_infer_request()
    array = clip.numpy()
    return lambda: torch.from_numpy(request.infer([array])[0].copy())


RUNTIMES = {"torchscript": torchscript, "onnxruntime": onnxruntime, "openvino": openvino}
