import importlib.util

import pytest
import torch
from small_networks import lively_model, small_config

from slowfast_ext.cli import main

ZOO_NAME = "slowfast_r50_4x16x1_256e_kinetics400_rgb"
installed = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="slowfast-ext[onnx] is not installed",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    torch.save(lively_model(small_config(18, 18)).state_dict(), path)
    return str(path)


@installed
def test_a_checkpoint_becomes_an_onnx_file_in_one_command(checkpoint, tmp_path, capsys):
    out = tmp_path / "small.onnx"
    argv = ["--frames", "8", "--height", "32", "--width", "64", "--output", "probabilities"]
    assert main(["export", checkpoint, str(out), *argv]) == 0
    assert out.is_file()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("clip: float32 (batch, 3, 8, 32, 64), normalised with mean (123.675, ")
    assert lines[1] == "probabilities: float32 (batch, 5)"
    assert lines[-1].startswith(f"written: {out} (")


@installed
def test_arguments_are_checked_before_any_work(checkpoint, tmp_path, capsys):
    def error(*argv):
        assert main(["export", *argv]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err

    out = str(tmp_path / "model.onnx")
    assert "OUT must end in .onnx, got 'model.pb'" in error(checkpoint, "model.pb")
    assert "OUT must be a file in an existing, writable folder" in error(checkpoint, str(tmp_path / "no" / "x.onnx"))
    assert "MODEL must be a file or a zoo name" in error("missing.pth", out)
    assert "--checkpoint goes with a zoo name" in error(checkpoint, out, "--checkpoint", checkpoint)
    assert "--config goes with a checkpoint" in error(ZOO_NAME, out, "--config", ZOO_NAME)
    assert list(tmp_path.iterdir()) == []
