"""Statistics, order and memory: what the numbers of a benchmark mean."""

import sys
import time

import pytest
import torch

from slowfast_ext.evaluation.measuring import FEWEST_ROUNDS, Summary, peak_growth, shuffled_rounds, time_once

CPU = torch.device("cpu")


def test_percentiles_lie_between_the_samples():
    assert Summary.of([float(value) for value in range(100, -1, -1)]) == Summary(median=50, p10=10, p90=90)
    assert Summary.of([1.0, 2.0]) == Summary(median=1.5, p10=pytest.approx(1.1), p90=pytest.approx(1.9))
    assert Summary.of([7.0]) == Summary(7, 7, 7)


def test_no_samples_have_no_summary():
    with pytest.raises(ValueError, match="samples must not be empty"):
        Summary.of([])


def test_a_call_takes_milliseconds():
    assert 20 <= time_once(lambda: time.sleep(0.02), CPU) < 2000


def test_what_runs_before_a_call_is_not_timed():
    order = []
    assert time_once(lambda: order.append("call"), CPU, lambda: order.append("before") or time.sleep(0.2)) < 150
    assert order == ["before", "call"]
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    list(shuffled_rounds(calls, CPU, rounds=2, seconds=0, before=lambda: order.append("before")))
    assert order[2::2] == ["before"] * 4


def test_every_round_calls_each_once_in_changing_order():
    called = []
    calls = {name: lambda name=name: called.append(name) for name in "abcd"}
    samples = list(shuffled_rounds(calls, CPU, rounds=20, seconds=0))
    assert [sorted(sample) for sample in samples] == [list("abcd")] * 20
    rounds = {tuple(called[index : index + 4]) for index in range(0, len(called), 4)}
    assert {tuple(sorted(order)) for order in rounds} == {tuple("abcd")}
    assert len(rounds) > 5


def test_a_spent_budget_ends_the_rounds_but_not_before_there_are_enough():
    assert len(list(shuffled_rounds({"a": lambda: None}, CPU, rounds=None, seconds=0))) == FEWEST_ROUNDS


def test_a_budget_is_used():
    start = time.perf_counter()
    samples = list(shuffled_rounds({"a": lambda: time.sleep(0.01)}, CPU, rounds=None, seconds=0.2))
    assert len(samples) > FEWEST_ROUNDS
    assert time.perf_counter() - start >= 0.2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_that_a_call_took_and_gave_back_is_its_peak():
    growth = peak_growth(lambda: torch.ones(64 * 2**18).sum())
    assert growth is None or 60 * 2**20 < growth < 90 * 2**20
