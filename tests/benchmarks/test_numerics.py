"""The engine's scores are no further from the exact ones than eager's in the same type, for the published networks."""

import json

import numerics
import pytest
import torch
from variants import create_network


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SLOWFAST_EXT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(numerics.sys.modules, "openvino", None)  # conversion takes seconds


@pytest.mark.parametrize("name", numerics.MODELS)
def test_scores_are_no_further_from_the_exact_ones_than_eagers(name):
    model = create_network(name)
    clips = numerics.create_clips(2, 32, 64)
    for dtype, largest in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        rows = numerics.rows_of(model, clips, dtype)
        assert rows["engine"]["mean_error"] <= numerics.ALLOWED * rows["eager"]["mean_error"]
        assert 0 < rows["engine"]["mean_error"] < largest


def test_errors_and_agreement_are_those_of_the_definition():
    reference = torch.tensor([[0.0, 1, 2, 3, 4, 5], [5.0, 4, 3, 2, 1, 0]])
    scores = torch.tensor([[0.0, 1, 2, 3, 5, 4], [5.0, 4, 3, 2, 0, 1]])
    figures = numerics.compare(scores, reference)
    error = 2**0.5 / 55**0.5
    assert figures["mean_error"] == pytest.approx(error)
    assert figures["largest_error"] == pytest.approx(error)
    assert figures["top1_agreement"] == 0.5
    assert figures["top5_agreement"] == pytest.approx((1 + 0.8) / 2)


def test_an_engine_that_is_less_exact_is_a_failure(monkeypatch, tmp_path, capsys):
    figures = {"largest_error": 0.0, "top1_agreement": 1.0, "top5_agreement": 1.0}
    rows = {"eager": {"mean_error": 1.0, **figures}, "engine": {"mean_error": 1.2, **figures}}
    monkeypatch.setattr(numerics, "rows_of", lambda model, clips, dtype: rows)
    monkeypatch.setattr(
        numerics, "create_network", lambda name: type("Model", (), {"config": type("C", (), {"clip_len": 8})})
    )
    path = tmp_path / "numerics.json"
    options = ["--models", "one", "--dtype", "bfloat16", "--crop", "32", "--clips", "1", "--json", str(path)]
    assert numerics.main(options) == 1
    assert "1.20e+00" in capsys.readouterr().out
    assert json.loads(path.read_text())["rows"][-1]["way"] == "engine"
    rows["engine"]["mean_error"] = 1.05
    assert numerics.main(options) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "float8"], "--dtype must be of float32, bfloat16, float16, got 'float8'"),
        (["--clips", "0"], "--clips must be at least 1, got 0"),
        (["--crop", "16"], "--crop must be at least 32, got 16"),
    ],
)
def test_bad_options_are_refused(options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        numerics.main(options)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
