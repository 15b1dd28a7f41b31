"""Who may import whom, read from the import statements."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import slowfast_ext

PACKAGE = Path(slowfast_ext.__file__).parent
DECODERS = {"av", "cv2", "decord"}
EXTRAS = {"matplotlib", "onnx", "onnxruntime", "pyarrow", "ray", "yaml"}

# Part of the package -> parts it may import. A part is a module or a folder of slowfast_ext.
LAYERS = {
    "_library": set(),
    "ops": {"_library"},
    "nn": {"_library", "ops"},
    "models": set(),
    "accelerate": {"_library", "nn", "models"},
    "engine": {"_library", "ops", "models"},
    "checkpoints": {"models"},
    "data": set(),
    "training": {"models", "data", "checkpoints", "accelerate", "engine"},
    "evaluation": {"models", "data", "checkpoints", "accelerate", "engine"},
}
EVERYTHING = {"__init__", "__main__", "cli"}

# Packages from outside that a part may import; the others get all that the project depends on.
OUTSIDE = {
    "_library": {"torch"},
    "ops": {"torch"},
    "nn": {"torch"},
    "models": {"torch"},
    "accelerate": {"torch"},
    "engine": {"openvino", "torch"},
    "checkpoints": {"numpy", "safetensors", "torch"},
    "data": {"numpy", "torch", *DECODERS},
    "training": {"matplotlib", "numpy", "torch", "tqdm"},  # matplotlib where a plot is asked for
}
DEPENDENCIES = {"numpy", "safetensors", "torch", "tqdm", *DECODERS}
OUTSIDE["evaluation"] = DEPENDENCIES | EXTRAS


def part_of(module: str) -> str:
    """``slowfast_ext.ops.conv3d_bn_relu`` -> ``ops``, ``slowfast_ext`` -> ``__init__``."""
    return [*module.split("."), "__init__"][1]


def imports_of(source: str, module: str, is_package: bool) -> set[str]:
    """Absolute names of all modules, or names in them, that ``source`` imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join(package[: len(package) - node.level + 1] + ([node.module] if node.module else []))
            names |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            names |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return names


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """The imports that the tables do not allow."""
    part = part_of(module)
    found = []
    for name in sorted(imports_of(source, module, is_package)):
        top = name.split(".")[0]
        if top == "slowfast_ext":
            target = part_of(name)
            known = target in LAYERS or target in EVERYTHING or target == "_C"
            if (
                part in EVERYTHING
                or target == part
                or target in LAYERS[part]
                or (target == "_C" and part == "_library")
            ):
                continue
            found.append(f"{module}: {name}" + ("" if known else " (through the package's face)"))
        elif top not in sys.stdlib_module_names and top not in OUTSIDE.get(part, DEPENDENCIES):
            found.append(f"{module}: {name}")
    return found


def module_files():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ["slowfast_ext", *path.relative_to(PACKAGE).with_suffix("").parts]
        is_package = parts[-1] == "__init__"
        yield path, ".".join(parts[:-1] if is_package else parts), is_package


def test_every_part_has_a_layer():
    assert {part_of(module) for _, module, _ in module_files()} <= LAYERS.keys() | EVERYTHING


def test_every_import_follows_the_table():
    found = [
        violation
        for path, module, is_package in module_files()
        for violation in violations(path.read_text(encoding="utf-8"), module, is_package)
    ]
    assert not found


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from ..nn import FusedLateral", "slowfast_ext.ops.conv"),
        ("from .. import nn", "slowfast_ext.ops.conv"),
        ("import slowfast_ext.models", "slowfast_ext.nn.conv"),
        ("from slowfast_ext.ops import conv3d_bn_relu", "slowfast_ext.models.resnet3d"),
        ("from .. import accelerate", "slowfast_ext.models.resnet3d"),
        ("import numpy", "slowfast_ext.models.resnet3d"),
        ("from ..models import zoo", "slowfast_ext.data.views"),
        ("def f():\n    from ..models import zoo", "slowfast_ext.data.views"),
        ("import slowfast_ext", "slowfast_ext.nn.conv"),
        ("import mmcv", "slowfast_ext.cli.train"),
        ("import importlib\nimportlib.import_module('slowfast_ext._C')", "slowfast_ext.nn.conv"),
    ],
)
def test_a_forbidden_import_is_found(source, module):
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("source", "module", "is_package"),
    [
        ("from .. import _library\nfrom .conv import f", "slowfast_ext.ops", True),
        ("from .._library import lib\nimport torch", "slowfast_ext.ops.conv", False),
        ("from .models.resnet3d import Lateral\nfrom .nn import FusedLateral", "slowfast_ext.accelerate", False),
    ],
)
def test_an_allowed_import_is_not_found(source, module, is_package):
    assert violations(source, module, is_package) == []


def test_importing_the_package_imports_no_decoder_and_touches_no_gpu():
    program = (
        "import sys, torch, slowfast_ext\n"
        f"unwanted = sorted({DECODERS | EXTRAS!r} & set(sys.modules))\n"
        "assert not unwanted, unwanted\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    run = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
