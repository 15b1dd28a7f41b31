import dataclasses
import importlib.util
import json

import pytest
import torch
from small_networks import lively_model, small_config

from slowfast_ext import accelerate
from slowfast_ext.evaluation import onnx_export
from slowfast_ext.evaluation.onnx_export import export_onnx
from slowfast_ext.models import SlowFastConfig

installed = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="slowfast-ext[onnx] is not installed",
)
SIZE = {"frames": 8, "height": 64, "width": 96}


def run(path, clip):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_inputs()] == ["clip"]
    return torch.from_numpy(session.run(None, {"clip": clip.numpy()})[0])


@installed
@pytest.mark.parametrize(
    ("frame_sampling", "head_pooling", "output", "opset"),
    [
        ("strided", "global", "logits", None),
        ("linspace", "sliding", "probabilities", 19),
        ("linspace", "sliding_softmax", "probabilities", None),
    ],
)
def test_the_file_computes_what_the_network_does_at_any_batch(frame_sampling, head_pooling, output, opset, tmp_path):
    import onnx

    config = small_config(18, 18, frame_sampling=frame_sampling, head_pooling=head_pooling, head_window=(1, 2))
    model = lively_model(config)
    clip = torch.randn(5, 3, 8, 64, 96)
    with torch.inference_mode():
        expected = model(clip)
    if output == "probabilities":
        expected = expected.softmax(1)

    accelerate(model)  # must not show in the file
    kinds = [type(module) for module in model.modules()]
    path = tmp_path / "model.onnx"
    report = export_onnx(model, path, output=output, opset=opset, **SIZE)
    assert [type(module) for module in model.modules()] == kinds
    assert report.clip_shape == (3, 8, 64, 96)
    assert report.errors.keys() == {1, 3}
    assert list(tmp_path.iterdir()) == [path]
    torch.testing.assert_close(run(path, clip), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    file = onnx.load(path)
    assert report.opset == file.opset_import[0].version == (opset or report.opset)
    metadata = {entry.key: entry.value for entry in file.metadata_props}
    assert SlowFastConfig.from_dict(json.loads(metadata["slowfast_ext.config"])) == config


@installed
def test_a_file_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    model = lively_model(small_config(18, 18))
    (tmp_path / "model.onnx").write_text("what was here before")
    monkeypatch.setattr(onnx_export, "TOLERANCE", 0.0)
    with pytest.raises(RuntimeError, match="ONNX Runtime must agree with PyTorch"):
        export_onnx(model, tmp_path / "model.onnx", **SIZE)
    assert (tmp_path / "model.onnx").read_text() == "what was here before"
    assert len(list(tmp_path.iterdir())) == 1


@installed
def test_clips_that_the_network_does_not_take_are_refused_before_the_export(tmp_path):
    model = lively_model(small_config(18, 18))
    with pytest.raises(ValueError, match="must be a multiple of 4"):
        export_onnx(model, tmp_path / "model.onnx", frames=6, height=32, width=32)
    with pytest.raises(ValueError, match="output must be one of logits, probabilities, got 'scores'"):
        export_onnx(model, tmp_path / "model.onnx", output="scores")
    sliding = lively_model(dataclasses.replace(model.config, head_pooling="sliding"))
    with pytest.raises(ValueError, match="as large as the sliding window"):
        export_onnx(sliding, tmp_path / "model.onnx", **SIZE)
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named_with_the_command_that_installs_them(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(ImportError, match=r"export needs onnxruntime: pip install 'slowfast-ext\[onnx\]'"):
        export_onnx(lively_model(small_config(18, 18)), tmp_path / "model.onnx")
