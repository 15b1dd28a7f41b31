"""OpenVINO computes the same and is taken where it is faster, and only there."""

import importlib.util
import json

import pytest
import torch
from small_networks import lively_model, small_config

from slowfast_ext import InferenceEngine
from slowfast_ext.data import normalize
from slowfast_ext.engine import openvino as openvino_backend
from slowfast_ext.engine.autotune import Tuner
from slowfast_ext.engine.network import read_network
from slowfast_ext.engine.plan import Signature

pytestmark = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")


def error(output, reference):
    return float(torch.linalg.vector_norm(output - reference) / torch.linalg.vector_norm(reference))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return lively_model(small_config(clip_len=8, test_crop_size=64, test_short_side=64))


@pytest.fixture(scope="module")
def converted(model):
    """Conversion takes seconds; once is enough."""
    network = read_network(model, torch.float32, torch.device("cpu"))
    return openvino_backend.OpenVinoBackend(network, model)


@pytest.fixture
def engine_of(monkeypatch, converted):
    """Engines for which one of the two is the faster, whatever a clock says."""

    def make(model, faster, **options):
        if next(model.parameters()).dtype == torch.float32:
            monkeypatch.setattr(openvino_backend, "OpenVinoBackend", lambda network, model: converted)
        choose = Tuner.choose

        def rigged(self, key, candidates, reference, limit):
            if not key.startswith("network"):
                return choose(self, key, candidates, reference, limit)
            checked = {c.name: c for c in candidates if self._is_right(key, c, reference(), limit)}
            return checked[faster].name, "as the test wants"

        monkeypatch.setattr(Tuner, "choose", rigged)
        return InferenceEngine(model, **options)

    return make


@pytest.mark.parametrize("faster", ["oneDNN", "OpenVINO"])
def test_the_faster_one_gives_the_plain_models_logits(model, engine_of, faster):
    engine = engine_of(model, faster)
    clip = torch.randn(2, 3, 8, 64, 80)
    raw = torch.randint(0, 256, (1, 8, 65, 64, 3), dtype=torch.uint8)
    mean, std = model.config.normalization.mean, model.config.normalization.std
    with torch.inference_mode():
        assert error(engine(clip), model(clip)) < 1e-5
        assert str(engine.plan).startswith(faster)
        assert f"{faster} as the test wants" in str(engine.plan)
        assert error(engine(raw), model(normalize(raw, mean, std))) < 1e-5
        features = torch.cat([maps.mean((2, 3, 4)) for maps in model.backbone(clip)], 1)
        assert error(engine.features(clip), features) < 1e-5


@pytest.mark.parametrize("pooling", ["sliding", "sliding_softmax"])
def test_a_sliding_window_has_as_many_positions_as_the_clip_asks_for(pooling, engine_of):
    model = lively_model(small_config(clip_len=8, head_pooling=pooling, head_window=(1, 2)))
    backend = openvino_backend.OpenVinoBackend(read_network(model, torch.float32, torch.device("cpu")), model)
    clip = torch.randn(1, 3, 8, 96, 128)
    with torch.inference_mode():
        assert error(backend.program(Signature(tuple(clip.shape), False, "logits"))(clip), model(clip)) < 1e-5


def test_bfloat16_weights_are_converted_too(engine_of):
    model = lively_model(small_config(clip_len=8, test_crop_size=64, test_short_side=64)).bfloat16()
    clip = torch.randn(1, 3, 8, 64, 64)
    with torch.inference_mode():
        assert error(engine_of(model, "OpenVINO")(clip), model(clip.bfloat16()).float()) < 0.1


def test_nan_of_one_clip_reaches_its_scores_and_no_others(model, engine_of):
    clips = torch.randn(2, 3, 8, 64, 64)
    clips[1, 0, 5, 10, 10] = float("nan")
    logits = engine_of(model, "OpenVINO")(clips)
    assert logits[1].isnan().all()
    assert logits[0].isfinite().all()


def test_a_length_that_was_not_converted_runs_in_onednn(model, engine_of):
    engine = engine_of(model, "OpenVINO")
    clip = torch.randn(1, 3, 16, 64, 64)
    with torch.inference_mode():
        assert error(engine(clip), model(clip)) < 1e-5
    assert "OpenVINO has the network for clips of 8 frames" in str(engine.plan)


def test_without_tuning_it_is_left_alone(model):
    assert "OpenVINO" not in repr(InferenceEngine(model, autotune=False))


def test_a_network_that_does_not_convert_runs_in_onednn_and_the_plan_says_why(model, monkeypatch, caplog):
    import openvino

    def fail(*arguments, **options):
        raise RuntimeError("no such operation")

    monkeypatch.setattr(openvino, "convert_model", fail)
    engine = InferenceEngine(model)
    assert engine(torch.randn(1, 3, 8, 64, 64)).isfinite().all()
    assert "OpenVINO does not convert the network: RuntimeError: no such operation" in str(engine.plan)
    assert "no such operation" in caplog.text


def test_a_choice_is_that_of_one_release_of_openvino(model, converted, monkeypatch, tmp_path):
    monkeypatch.setattr(openvino_backend, "OpenVinoBackend", lambda network, model: converted)
    for version in ("one", "two", "two"):
        monkeypatch.setattr(converted, "version", version)
        InferenceEngine(model)(torch.zeros(1, 3, 8, 64, 64))
    (entries,) = json.loads((tmp_path / "cache" / "autotune.json").read_text())["entries"].values()
    chosen = [key for key in entries if key.startswith("network")]
    assert [key.rpartition(" ")[2] for key in chosen] == ["one", "two"]
