"""What the code asks of torch exists, also where only a GPU would run it."""

import ast
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.nn.functional

import slowfast_ext

PACKAGE = Path(slowfast_ext.__file__).parent
FILES = sorted([*PACKAGE.rglob("*.py"), *(Path(__file__).parents[1] / "benchmarks").glob("*.py")])
ROOTS = {"torch": torch, "F": torch.nn.functional, "nn": torch.nn, "dist": torch.distributed}


def missing(source: str) -> list[str]:
    """The dotted names, below what ROOTS stand for, that lead nowhere."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        while isinstance(node, ast.Attribute):
            names.append(node.attr)
            node = node.value
        if not (names and isinstance(node, ast.Name) and node.id in ROOTS):
            continue
        value = ROOTS[node.id]
        for name in reversed(names):
            if not hasattr(value, name):
                found.append(".".join([node.id, *reversed(names)]))
                break
            value = getattr(value, name)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_name_of_torch_exists(path):
    assert missing(path.read_text(encoding="utf-8")) == []


def test_a_misspelt_name_is_noticed():
    assert missing("torch.cuda.getdevice_name(0)") == ["torch.cuda.getdevice_name"]
