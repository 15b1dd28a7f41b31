"""What `pip install .` decides and puts into the wheel."""

import os
import subprocess
import sys
import zipfile
from importlib.metadata import metadata, requires
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "build_tools"))
import cuda_decision  # noqa: E402


def build_wheel(folder, **environment):
    """`pip wheel`, isolated and without a package index."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "-v", "-w", str(folder), str(ROOT)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


def test_without_cuda_the_wheel_is_pure_python_and_complete(tmp_path):
    result = build_wheel(tmp_path, SLOWFAST_EXT_CUDA="0")
    assert result.returncode == 0, result.stderr
    assert (result.stdout + result.stderr).count("slowfast_ext: CUDA kernels: no, SLOWFAST_EXT_CUDA=0") == 1
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "slowfast_ext").rglob("*.py")}
    assert sources <= packed
    assert {name.split("/")[0] for name in packed if ".dist-info" not in name} == {"slowfast_ext"}


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_demanding_cuda_without_it_fails_with_the_reason(tmp_path):
    result = build_wheel(tmp_path, SLOWFAST_EXT_CUDA="1")
    assert result.returncode != 0
    assert f"SLOWFAST_EXT_CUDA=1, but torch {torch.__version__} has no CUDA" in result.stdout + result.stderr


def test_requirements_and_licence_are_as_promised():
    wanted = {requirement.split(";")[0].split(">")[0].strip(): requirement for requirement in requires("slowfast-ext")}
    assert "x86_64" in wanted["decord"]
    assert "Linux" in wanted["decord"]
    assert wanted["torch"] == "torch>=2.11"
    assert metadata("slowfast-ext")["License-Expression"] == "Apache-2.0"


@pytest.fixture
def toolkit(monkeypatch):
    """A toolkit that knows 7.5 to 12.1 and a torch with CUDA but no GPU."""
    codes = "\n".join(f"compute_{code}" for code in (75, 80, 86, 89, 90, 100, 103, 120, 121))
    monkeypatch.setattr(cuda_decision, "find_cuda_home", lambda: "/toolkit")
    monkeypatch.setattr(cuda_decision.subprocess, "run", lambda *args, **kwargs: SimpleNamespace(stdout=codes))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_HOME", "")  # decide() sets it
    for name in ("SLOWFAST_EXT_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_without_a_gpu_every_major_version_and_ptx_are_built(toolkit):
    architectures, reason = cuda_decision.decide()
    assert architectures == ["8.0", "9.0", "10.0", "12.0+PTX"]
    assert "no GPU is visible" in reason


def test_the_visible_gpu_decides(toolkit):
    toolkit.setattr(torch.cuda, "is_available", lambda: True)
    toolkit.setattr(torch.cuda, "device_count", lambda: 2)
    toolkit.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (7, 5)][index])
    assert cuda_decision.decide()[0] == ["9.0"]


def test_the_architecture_list_is_respected_and_old_entries_are_named(toolkit):
    toolkit.setenv("TORCH_CUDA_ARCH_LIST", "7.5;8.6 9.0a+PTX Hopper")
    architectures, reason = cuda_decision.decide()
    assert architectures == ["8.6", "9.0a+PTX", "Hopper"]
    assert "left out 7.5: the kernels need 8.0" in reason


def test_only_old_architectures_build_nothing_or_fail_on_demand(toolkit):
    toolkit.setenv("TORCH_CUDA_ARCH_LIST", "7.0;7.5")
    architectures, reason = cuda_decision.decide()
    assert architectures is None
    assert "left out 7.0 7.5" in reason
    toolkit.setenv("SLOWFAST_EXT_CUDA", "1")
    with pytest.raises(SystemExit, match=r"left out 7\.0 7\.5"):
        cuda_decision.decide()


def test_an_unknown_choice_is_refused(toolkit):
    toolkit.setenv("SLOWFAST_EXT_CUDA", "maybe")
    with pytest.raises(SystemExit, match="SLOWFAST_EXT_CUDA must be auto, 0 or 1, got maybe"):
        cuda_decision.decide()


def test_a_missing_toolkit_is_named(toolkit):
    toolkit.setattr(cuda_decision, "find_cuda_home", lambda: None)
    assert cuda_decision.decide()[1].startswith("no CUDA toolkit")


def test_a_wrapper_called_nvcc_on_path_is_not_a_toolkit(monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvcc").write_text("#!/bin/sh\n")
    (tmp_path / "bin/nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert cuda_decision.find_cuda_home() != str(tmp_path)
