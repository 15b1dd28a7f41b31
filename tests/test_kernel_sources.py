"""Rules of csrc/ that no compiler checks."""

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
DEVICE_CODE = sorted([*CSRC.glob("*.cuh"), *(CSRC / "device").iterdir()])


@pytest.mark.parametrize("path", DEVICE_CODE, ids=lambda path: path.name)
def test_device_code_includes_no_torch_header(path):
    assert re.findall(r'#include\s+[<"](?:torch|ATen|c10|common\.h|checks\.h)[^>"]*', path.read_text()) == []


def test_only_common_h_names_torch_headers():
    named = {path.name for path in CSRC.rglob("*.*") if re.search(r"#include\s+<(torch|ATen|c10)/", path.read_text())}
    assert named == {"common.h"}


def test_inline_ptx_is_in_ptx_h_alone():
    named = {path.name for path in CSRC.rglob("*.*") if re.search(r"\basm\b", path.read_text())}
    assert named == {"ptx.h"}


def test_each_operator_has_its_files_under_one_name():
    root = CSRC.parent
    operators = {path.stem for path in CSRC.glob("*.cu")}
    assert operators
    for operator in operators:
        assert (CSRC / f"{operator}.cuh").is_file()
        assert (root / f"slowfast_ext/ops/{operator}.py").is_file()
        assert (root / f"tests/ops/test_{operator}.py").is_file()
        assert (root / f"tests/emulator/{operator}.cpp").is_file()
