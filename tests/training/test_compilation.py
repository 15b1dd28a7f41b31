"""Training through torch.compile: the same run as without."""

import pytest
import torch
from synthetic import SOURCE, small_configuration

from slowfast_ext.evaluation import evaluate
from slowfast_ext.training import RunOptions, apply_overrides, train
from slowfast_ext.training.logs import read_log


def _losses(folder, overrides=(), **options):
    config = apply_overrides(small_configuration(), ["total_epochs=1", "log_config.interval=1", *overrides])
    train(config, "small", RunOptions(str(folder), seed=3, **options), evaluate, SOURCE)
    (path,) = folder.glob("*.log.json")
    entries = read_log(path)
    return [entry["loss"] for entry in entries if entry.get("mode") == "train"], entries


def test_a_compiled_run_has_the_losses_of_an_eager_one(tmp_path, monkeypatch):
    compiled = []

    def compile_without_code(model, **options):
        """Everything of torch.compile but the generated code, which takes a minute."""
        compiled.append(options)
        return compile_as_ever(model, backend="aot_eager", dynamic=options.get("dynamic"), fullgraph=True)

    compile_as_ever = torch.compile
    # Dropout's random numbers are drawn otherwise in a compiled graph.
    overrides = ["model.cls_head.dropout_ratio=0.0", "data.videos_per_gpu=5"]  # the last batch is a smaller one
    eager, _ = _losses(tmp_path / "eager", overrides, accelerate=True)
    monkeypatch.setattr(torch, "compile", compile_without_code)
    losses, entries = _losses(
        tmp_path / "compiled", overrides, accelerate=True, compile="reduce-overhead", validate=True
    )
    assert {"mode": "reduce-overhead", "dynamic": False} in compiled
    assert len(losses) == len(eager) == 3
    assert losses == pytest.approx(eager, rel=1e-4)
    assert [entry["mode"] for entry in entries[1:]].count("val") == 1


def test_a_missing_compiler_is_told_before_any_work(tmp_path, monkeypatch):
    def broken(function, **options):
        def call(*arguments):
            raise RuntimeError("Failed to find C compiler.\nplease set CC")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    message = "--compile must have a compiler that works on cpu, got RuntimeError: Failed to find C compiler"
    with pytest.raises(ValueError, match=message):
        _losses(tmp_path / "run", compile="default")
    assert not (tmp_path / "run").exists()


def test_graphs_and_accumulated_gradients_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="--accumulate must be 1 with --compile reduce-overhead"):
        _losses(tmp_path / "run", compile="reduce-overhead", accumulate=2)
    assert not (tmp_path / "run").exists()
