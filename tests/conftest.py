"""Fixtures for all tests. The tests run against the installed package, never against the folder beside them."""

import os
import sys
from pathlib import Path

import pytest

# `python -m pytest` puts the current folder first, where the package lies without its compiled kernels.
ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]
sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts beside the package, whose modules import each other by name

import torch  # noqa: E402

import slowfast_ext  # noqa: E402


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _float32_products(monkeypatch):
    """Torch allows TF32 in convolutions by default, and tolerances are derived for float32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def pytest_collection_modifyitems(items):
    reason = slowfast_ext.unavailable_reason("cuda")
    if reason is None or os.environ.get("FAIL_WITHOUT_CUDA"):
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason=reason))
