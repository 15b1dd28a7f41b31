"""The compiled module, as far as it can be examined without a GPU."""

import re
import shutil
import subprocess
from pathlib import Path

import kernel_resources
import pytest
import torch

import slowfast_ext

extension = pytest.importorskip("slowfast_ext._C", reason=str(slowfast_ext.unavailable_reason("cuda")))


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_it_is_one_abi3_module():
    assert Path(extension.__file__).name == "_C.abi3.so"


def test_every_operator_has_a_cuda_kernel():
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("slowfast_ext::")]
    names.remove("slowfast_ext::build_info")
    assert names
    missing = [name for name in names if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")]
    assert missing == []


def test_it_says_what_it_was_built_for():
    assert re.fullmatch(r"(\d+\.\d[af]?(\+PTX)? ?)+", torch.ops.slowfast_ext.build_info())


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
def test_it_uses_no_symbol_outside_the_stable_abi():
    undefined = run("nm", "-D", "-C", "--undefined-only", extension.__file__).splitlines()
    symbols = [line.split("U ", 1)[1] for line in undefined if "U " in line]
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    assert [
        symbol for symbol in symbols if re.match(r"(typeinfo for |vtable for )?(c10|at|torch|caffe2)::", symbol)
    ] == []


@pytest.mark.skipif(kernel_resources.find_cuobjdump() is None, reason="there is no cuobjdump, on PATH or in triton")
def test_kernels_keep_to_their_registers_and_use_no_local_memory():
    usage, bounds = kernel_resources.read(extension.__file__), kernel_resources.read_table()
    assert usage.keys() == bounds.keys()
    assert {kernel: found for kernel, found in usage.items() if found.stack_bytes or found.local_bytes} == {}
    assert {
        kernel: found.registers for kernel, found in usage.items() if found.registers > bounds[kernel]["registers"]
    } == {}


@pytest.mark.skipif(kernel_resources.find_cuobjdump() is None, reason="there is no cuobjdump, on PATH or in triton")
@pytest.mark.parametrize("capability", kernel_resources.MULTIPROCESSORS)
def test_as_many_blocks_are_resident_as_the_table_says(capability):
    multiprocessor, bounds = kernel_resources.MULTIPROCESSORS[capability], kernel_resources.read_table()
    found = {
        kernel: multiprocessor.resident_blocks(
            usage.registers, bounds[kernel]["threads"], usage.shared_bytes + bounds[kernel]["shared_bytes"]
        )
        for kernel, usage in kernel_resources.read(extension.__file__).items()
    }
    assert {kernel: blocks for kernel, blocks in found.items() if blocks < bounds[kernel][capability]} == {}
