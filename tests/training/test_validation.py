"""Scores of a validation set."""

import contextlib
import copy

import pytest
import torch
from synthetic import SOURCE, small_configuration

from slowfast_ext.data import normalize
from slowfast_ext.models import build_model
from slowfast_ext.training import read_settings, validation
from slowfast_ext.training.distributed import Processes
from slowfast_ext.training.loop import validation_due
from slowfast_ext.training.validation import Validation


class _Two(Processes):
    """One of two processes, the other of which has nothing to say."""

    def gather(self, value, *, through_gpus=False):
        return [[], value]

    def maximum(self, value):
        return value


@pytest.fixture
def settings():
    return read_settings(small_configuration())


def _scores(settings, model, processes, autocast=contextlib.nullcontext):
    return Validation(SOURCE, settings, processes).scores(model, autocast, lambda: False)


def test_scores_are_mean_probabilities_in_the_order_of_the_set(settings):
    model = build_model(settings.model.network).train()
    found = _scores(settings, model, Processes())
    assert model.training
    dataset = SOURCE.make_dataset(settings.val, 3, 0)
    clips, labels = zip(*(dataset.sample(index) for index in range(len(dataset))), strict=True)
    statistics = settings.val.clip.normalization
    with torch.no_grad():
        expected = model.eval()(normalize(torch.stack(clips), statistics.mean, statistics.std)).softmax(1)
    torch.testing.assert_close(found.scores, expected, rtol=1e-5, atol=1e-6)
    assert found.labels.tolist() == list(labels)
    sixteen = _scores(settings, model, Processes(), lambda: torch.autocast("cpu", torch.bfloat16)).scores
    assert sixteen.dtype == torch.float32
    assert 0 < (sixteen - expected).abs().max() < 0.05


def test_all_processes_use_the_statistics_of_the_main_one(settings, monkeypatch):
    monkeypatch.setattr(validation.dist, "broadcast", lambda buffer, src: buffer.fill_(2 + src))
    model = build_model(settings.model.network)
    before, expected = copy.deepcopy(model), copy.deepcopy(model)
    for name, buffer in expected.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.fill_(2)
    found = _scores(settings, model, _Two(1, 2, control="control"))
    alone = _scores(settings, expected, Processes())
    assert found.scores.equal(alone.scores[1::2])
    assert not found.scores.equal(_scores(settings, before, Processes()).scores[1::2])


@pytest.mark.parametrize(
    ("interval", "start", "expected"),
    [(5, None, [5, 10, 15, 20]), (1, 18, [18, 19, 20, 21, 22]), (5, 3, [3, 8, 13, 18]), (3, 20, [20])],
)
def test_validation_is_due_after_every_interval_counted_from_the_start(interval, start, expected):
    assert [epoch for epoch in range(1, 23) if validation_due(epoch, interval, start)] == expected
