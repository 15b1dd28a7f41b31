"""Registers of each compiled kernel, as cuobjdump reports them.

``python kernel_resources.py _C.abi3.so > kernel_resources.tsv`` writes the bounds that test_cuda_build.py holds:
what the kernel needs on its most demanding architecture, rounded up to 8, in which registers are allotted.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

COLUMNS = ("kernel", "registers")


def find_cuobjdump() -> str | None:
    """From the CUDA toolkit, or the one that comes with triton, hence with torch."""
    on_path = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    packaged = triton and Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    return on_path or (str(packaged) if packaged and packaged.is_file() else None)


def read(library: str) -> dict[str, tuple[int, int, int]]:
    """Kernel to the most registers, stack bytes and local bytes it needs on any architecture in the library."""
    dump = subprocess.run(
        [find_cuobjdump(), "--dump-resource-usage", library], capture_output=True, text=True, check=True
    )
    readable = subprocess.run(["c++filt"], input=dump.stdout, capture_output=True, text=True, check=True).stdout
    usage: dict[str, tuple[int, int, int]] = {}
    for name, *numbers in re.findall(
        r"Function (?:void )?(.+):\n\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", readable
    ):
        kernel = re.sub(r"slowfast_ext::|\(anonymous namespace\)::", "", name.rsplit("(", 1)[0])
        usage[kernel] = tuple(map(max, usage.get(kernel, (0, 0, 0)), map(int, numbers)))
    return dict(sorted(usage.items()))


if __name__ == "__main__":
    print("\t".join(COLUMNS))
    for kernel, (registers, _, _) in read(sys.argv[1]).items():
        print(f"{kernel}\t{(registers + 7) // 8 * 8}")
