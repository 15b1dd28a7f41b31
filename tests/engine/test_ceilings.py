"""The ceilings follow from the times of a matrix product and a copy."""

import dataclasses

import pytest
import torch

from slowfast_ext.engine import Ceilings, ceilings


def test_ceilings_are_computed_from_the_measured_times(monkeypatch):
    monkeypatch.setitem(ceilings._GEMM_SIZE, "cpu", 16)
    monkeypatch.setitem(ceilings._COPIED_BYTES, "cpu", 1024)
    clock = iter(range(1000))
    monkeypatch.setattr(ceilings.time, "perf_counter", lambda: 0.5e-3 * next(clock))  # half a millisecond a reading
    measured = ceilings.measure_ceilings.__wrapped__(torch.device("cpu"), torch.bfloat16)
    assert dataclasses.asdict(measured) == pytest.approx(
        dataclasses.asdict(Ceilings(operations=2 * 16**3 / 0.5e-3, bandwidth=2 * 1024 / 0.5e-3))
    )
