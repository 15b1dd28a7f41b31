import json

import pytest
import torch
from small_networks import lively_checkpoint, small_config

from slowfast_ext import InferenceEngine
from slowfast_ext.cli import bench, main

ARGUMENTS = ["--frames", "8", "--crop-size", "32", "--views", "3", "--seconds", "0.05"]


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return lively_checkpoint(tmp_path_factory.mktemp("weights"), small_config(18, 18))[1]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SLOWFAST_EXT_CACHE", str(tmp_path / "cache"))


def test_the_engine_is_timed_beside_plain_pytorch_in_both_layouts(network, tmp_path, capsys):
    path = tmp_path / "bench.json"
    assert main(["bench", network, *ARGUMENTS, "--batch", "2", "--device", "cpu", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    rows = {row["name"]: row for row in document["ways"]}
    assert list(rows) == ["plain, contiguous", "plain, channels_last_3d", "engine"]
    assert (document["clip"], document["views"]) == ([2, 3, 8, 32, 32], 3)
    for row in rows.values():
        assert row["relative_error"] < 1e-5
        assert len(row["samples_ms"]) >= 3
        assert row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert row["clips_per_second"] == pytest.approx(2e3 / row["median_ms"])
    best = min(row["median_ms"] for name, row in rows.items() if name != "engine")
    assert document["speedup"] == pytest.approx(best / rows["engine"]["median_ms"])
    assert [row["median_ms"] for row in rows.values() if "videos_per_second" in row] == [
        best,
        rows["engine"]["median_ms"],
    ]
    output = capsys.readouterr().out
    assert f"{document['speedup']:.2f} times as fast" in output
    assert all(any(line.startswith(name) for line in output.splitlines()) for name in rows)


def test_a_type_is_compared_with_float32(network, tmp_path):
    path = tmp_path / "bench.json"
    assert main(["bench", network, *ARGUMENTS, "--dtype", "bfloat16", "--device", "cpu", "--json", str(path)]) == 0
    assert all(1e-4 < row["relative_error"] < 4e-2 for row in json.loads(path.read_text())["ways"])


def test_an_engine_that_computes_something_else_is_an_error(network, monkeypatch, capsys):
    run = InferenceEngine._run
    monkeypatch.setattr(InferenceEngine, "_run", lambda self, clip, output: run(self, clip, output) * 1.01)
    assert main(["bench", network, *ARGUMENTS, "--device", "cpu"]) == 1
    assert "engine must agree with plain PyTorch in float32 to 0.0001, got a relative error of 1.0e-02" in (
        capsys.readouterr().err
    )


def test_memory_that_runs_out_is_told(network, monkeypatch, capsys):
    def full(self, clip):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench.PlainEngine, "__call__", full)
    assert main(["bench", network, *ARGUMENTS, "--device", "cpu"]) == 1
    assert capsys.readouterr().err.endswith("bench: error: CUDA out of memory\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.pth"], "MODEL must be a file or a zoo name"),
        (["NETWORK", "--seconds", "0"], "--seconds must be positive, got 0.0"),
        (["NETWORK", "--json", "no/such/folder.json"], "--json must be a file in an existing, writable folder"),
        (
            ["NETWORK", "--dtype", "float16", "--device", "cpu"],
            "must be what the engine runs in, got cpu, float16: on a",
        ),
        (["NETWORK", "--frames", "6", "--device", "cpu"], "frames of the clip must be a multiple of 4"),
        (["NETWORK", "--device", "tpu"], "--device must be auto, cpu or cuda, got 'tpu'"),
    ],
)
def test_wrong_arguments_are_one_line_before_any_timing(network, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(bench, "shuffled_rounds", None)
    arguments = [network if argument == "NETWORK" else argument for argument in arguments]
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
