"""Build configuration: the extension, if any. Everything static is in pyproject.toml.

SLOWFAST_EXT_CUDA=auto|0|1   build the CUDA kernels if possible (default), never, or fail with the reason
TORCH_CUDA_ARCH_LIST         compute capabilities, as everywhere with torch; older ones than 8.0 are left out
MAX_JOBS                     parallel compilations, as everywhere with torch
"""

import os
import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "build_tools"))
from cuda_decision import decide

OLDEST_TORCH = "0x020b000000000000"  # 2.11: the oldest torch that may load the binary

architectures, reason = decide()
if not {"egg_info", "dist_info"} & set(sys.argv):  # pip runs this file for the metadata first
    print(f"slowfast_ext: CUDA kernels: {'yes' if architectures else 'no'}, {reason}", file=sys.stderr, flush=True)
if architectures is None:
    setup()
else:
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(architectures)
    from torch.utils.cpp_extension import BuildExtension, CUDAExtension

    stable_abi = [f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}", "-std=c++17"]
    built_for = f'-DSLOWFAST_EXT_ARCHITECTURES="{" ".join(architectures)}"'
    extension = CUDAExtension(
        "slowfast_ext._C",
        sorted(str(path) for path in Path("csrc").glob("*.c*") if path.suffix in (".cpp", ".cu")),
        include_dirs=[str(Path("csrc").resolve())],
        depends=sorted(str(path) for path in Path("csrc").rglob("*.*h")),
        py_limited_api=True,
        extra_compile_args={
            "cxx": ["-O3", "-DUSE_CUDA", *stable_abi, built_for],
            "nvcc": ["-O3", "-lineinfo", "-DUSE_CUDA", *stable_abi, built_for],
        },
    )
    setup(
        ext_modules=[extension],
        cmdclass={"build_ext": BuildExtension},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
