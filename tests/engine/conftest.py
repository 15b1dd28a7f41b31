"""Engines in tests neither read nor write the user's cache."""

import pytest


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SLOWFAST_EXT_CACHE", str(tmp_path / "cache"))
