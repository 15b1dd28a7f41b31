"""Commands in tests neither read nor write the user's cache, and do not convert each small network for OpenVINO."""

import sys

import pytest


@pytest.fixture(autouse=True)
def _plain_engine(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("SLOWFAST_EXT_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setitem(sys.modules, "openvino", None)
