"""What the host side asks for each kernel: as kernel_resources.tsv says, from which residency is computed."""

import dataclasses
import re
import subprocess

import batch_norm_cases
import conv3d_cases
import conv3d_pair_cases
import conv3d_statistics_cases
import fast_bottleneck_cases
import kernel_resources
import lateral_cases
import pool_head_cases
import pytest
import stem_cases
import toolchain

pytestmark = pytest.mark.skipif(toolchain.unavailable_reason() is not None, reason=str(toolchain.unavailable_reason()))
KERNELS = {  # their cases, and the types they are built for
    "batch_norm": (batch_norm_cases, batch_norm_cases.DTYPES),
    "conv3d_bn_relu": (conv3d_cases, conv3d_cases.MATHS),
    "conv3d_bn_relu_pair": (conv3d_pair_cases, conv3d_cases.MATHS),
    "conv3d_statistics": (conv3d_statistics_cases, conv3d_cases.MATHS),
    "fast_bottleneck": (fast_bottleneck_cases, fast_bottleneck_cases.DTYPES),
    "lateral_fuse": (lateral_cases, conv3d_cases.MATHS),
    "pool_head": (pool_head_cases, pool_head_cases.DTYPES),
    "stem": (stem_cases, stem_cases.MATHS),
}
BORROWED = {"conv3d_statistics": ("batch_norm_merge_kernel<MergeMoments>",)}  # kernels of another operator


def kernels_at(library):
    """Offset in the library to name, with the names of the 16-bit types as in CUDA."""
    names = {}
    symbols = subprocess.run(["nm", "-C", library], capture_output=True, text=True, check=True).stdout
    for offset, name in re.findall(r"^([0-9a-f]+) \w (.*_kernel\b.*)$", symbols, re.MULTILINE):
        name = re.sub(r"\bfloat16\b", "__half", re.sub(r"\bbfloat16\b", "__nv_bfloat16", name))
        names[int(offset, 16)] = kernel_resources.short_name(name)
    return names


@pytest.mark.parametrize("operator", KERNELS)
def test_threads_and_shared_memory_are_those_of_the_table(operator, monkeypatch):
    monkeypatch.setenv("SLOWFAST_EXT_EMULATOR_DRY_RUN", "1")
    library = toolchain.build(operator)
    module, names = toolchain.load(library), kernels_at(library)
    cases_module, dtypes = KERNELS[operator]
    cases = list(cases_module.CASES.values())
    if operator == "lateral_fuse":
        cases += [dataclasses.replace(case, shared=lateral_cases.AMPERE) for case in cases]
    for dtype in dtypes:
        for case in cases:
            cases_module.run(module, case, dtype)
    found = {}
    for offset, threads, shared_bytes in module.take_launches():
        of_kernel = found.setdefault(names[offset], {"threads": threads, "shared_bytes": 0})
        assert of_kernel["threads"] == threads
        of_kernel["shared_bytes"] = max(of_kernel["shared_bytes"], shared_bytes)  # lateral_fuse's varies with the layer
    table = {
        kernel: {column: row[column] for column in ("threads", "shared_bytes")}
        for kernel, row in kernel_resources.read_table().items()
        if max((name for name in KERNELS if kernel.startswith(f"{name}_")), key=len) == operator
        or kernel in BORROWED.get(operator, ())
    }
    assert found == table
