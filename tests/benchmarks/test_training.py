"""The table of training steps end to end, tiny, and the counting of what is kept."""

import json
import re

import pytest
import torch
import training
from kept import KeptTensors, count_kept
from small_networks import small_config
from training import VARIANTS

import slowfast_ext
from slowfast_ext import accelerate, models

TINY = ["--device", "cpu", "--batch", "2", "--crop", "32", "--rounds", "2"]


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    """Under every name a network with few layers and channels."""
    monkeypatch.setattr(slowfast_ext, "create_model", lambda name: models.build_model(small_config(18, 18)))


def _measure(tmp_path, *arguments):
    status = training.main([*TINY, "--json", str(tmp_path / "training.json"), *arguments])
    document = json.loads((tmp_path / "training.json").read_text())
    return status, document, {row["name"]: row for row in document["variants"]}


def test_steps_are_compared_timed_in_parts_and_written_down(tmp_path, capsys):
    status, document, rows = _measure(tmp_path)
    assert status == 0
    assert list(rows) == ["eager", "eager_channels_last", "accelerate"]
    for row in rows.values():
        assert row["status"] == "timed"
        assert all(len(row["samples_ms"][part]) == 2 for part in training.PARTS)
        assert row["gradient_error"] < 2e-2
        assert row["median_ms"] > max(row[f"{part}_ms"] for part in training.PARTS)
    assert document["workload"]["clip"] == [2, 3, 32, 32, 32]
    assert rows["accelerate"]["kept_bytes"] < 0.8 * rows["eager_channels_last"]["kept_bytes"]
    output = capsys.readouterr().out
    assert "vs best plain" in output
    assert "slowfast_ext runs without CUDA kernels" in output


def test_compiled_steps_are_compared_too(tmp_path, monkeypatch):
    modes, compile_as_ever = [], torch.compile

    def compile_without_code(model, mode):
        modes.append(mode)
        return compile_as_ever(model, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compile_without_code)
    status, _, rows = _measure(tmp_path, "--variants", "accelerate_compile,accelerate_graphs")
    assert (status, modes) == (0, ["default", "reduce-overhead"])
    assert all(row["status"] == "timed" and row["gradient_error"] < 2e-2 for row in rows.values())


def test_in_16_bits_gradients_may_be_off_by_what_plain_pytorch_is_off_by(tmp_path):
    status, document, rows = _measure(tmp_path, "--dtype", "bfloat16", "--variants", "accelerate")
    assert status == 0
    assert 1e-3 < rows["accelerate"]["gradient_error"] <= document["workload"]["gradient_allowed"]


def test_a_wrong_step_is_not_timed(tmp_path, monkeypatch):
    def wrong(model, mode):
        model.backbone.slow_path.layer2[0].conv1.bn.eps = 0.5
        return accelerate(model, mode=mode)

    monkeypatch.setattr(slowfast_ext, "accelerate", wrong)
    status, _, rows = _measure(tmp_path)
    assert status == 1
    assert rows["accelerate"]["status"] == "wrong"
    assert "gradient off by" in rows["accelerate"]["reason"]
    assert rows["eager"]["status"] == "timed"


@pytest.mark.parametrize("frame_sampling", ["linspace", "strided"])
@pytest.mark.parametrize("lateral_norm", [True, False])
@pytest.mark.parametrize("variant", ["eager_channels_last", "accelerate"])
def test_what_is_counted_is_what_is_kept(variant, lateral_norm, frame_sampling):
    model = models.build_model(small_config(50, 18, lateral_norm=lateral_norm, frame_sampling=frame_sampling)).train()
    shape, fused = (2, 3, 8, 64, 64), VARIANTS[variant].accelerated
    with torch.device("meta"):
        plain = models.build_model(model.config).train()
    counted = count_kept(plain, shape, torch.float32, fused, "cpu")
    if fused:
        model = accelerate(model, mode="training")
    clip = torch.randn(shape).contiguous(memory_format=torch.channels_last_3d)
    with KeptTensors([model, clip]) as kept:
        model(clip)
    statistics = sum(2 * module.num_features for module in model.modules() if isinstance(module, torch.nn.BatchNorm3d))
    head = 4 * model.cls_head.fc_cls.weight.shape[1]  # the averages and what dropout makes of them
    assert counted < kept.bytes <= counted + 4 * (statistics + 2 * head)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "1"], "--batch must be at least 2, got 1"),
        (["--variants", "eager,lazy"], "--variants must be of eager, .* got 'lazy'"),
        (["--dtype", "float8"], "--dtype must be of float32"),
        (["--seconds", "0"], "--seconds must be positive, got 0"),
    ],
)
def test_bad_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_status:
        training.main([*TINY, *arguments])
    assert exit_status.value.code == 2
    assert re.search(message, capsys.readouterr().err)
