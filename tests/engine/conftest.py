"""Engines in tests neither read nor write the user's cache, and only those of test_openvino.py convert networks."""

import sys

import pytest


@pytest.fixture(autouse=True)
def _own_cache(request, monkeypatch, tmp_path):
    monkeypatch.setenv("SLOWFAST_EXT_CACHE", str(tmp_path / "cache"))
    if request.module.__name__ != "test_openvino":
        monkeypatch.setitem(sys.modules, "openvino", None)
