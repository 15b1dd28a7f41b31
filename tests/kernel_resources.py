"""What each compiled kernel needs of a multiprocessor, and how many blocks of it are resident there.

``python kernel_resources.py _C.abi3.so > new.tsv`` writes the table that test_cuda_build.py and
emulator/test_launches.py hold: registers as cuobjdump reports them, of the most demanding architecture and rounded up
to 8, in which they are allotted; threads and dynamic shared memory from the table there is, where a new kernel needs
them written by hand; and what follows from these.
"""

import csv
import importlib.util
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("kernel_resources.tsv")
KIB = 1024
REGISTERS, PARTITIONS = 65536, 4  # of a multiprocessor, in its partitions
REGISTER_UNIT = 256  # in which a warp is allotted registers
SHARED_UNIT, SYSTEM_SHARED = 128, KIB  # in which a block is allotted shared memory, and what the system takes of it


@dataclass(frozen=True)
class Multiprocessor:
    """Limits by compute capability: CUDA C++ Programming Guide, technical specifications."""

    warps: int
    blocks: int
    shared_bytes: int

    def resident_blocks(self, registers: int, threads: int, shared_bytes: int) -> int:
        """As the CUDA occupancy calculator counts: 0 if a block does not fit at all.

        Args:
            registers: of a thread.
            threads: of a block.
            shared_bytes: of a block, without those of the system.
        """
        warps = -(-threads // 32)
        warp_registers = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
        register_warps = REGISTERS // PARTITIONS // warp_registers * PARTITIONS
        block_bytes = -(-(shared_bytes + SYSTEM_SHARED) // SHARED_UNIT) * SHARED_UNIT
        return min(self.blocks, self.warps // warps, register_warps // warps, self.shared_bytes // block_bytes)


MULTIPROCESSORS = {
    "8.0": Multiprocessor(64, 32, 164 * KIB),
    "8.6": Multiprocessor(48, 16, 100 * KIB),
    "9.0": Multiprocessor(64, 32, 228 * KIB),
    "10.0": Multiprocessor(64, 32, 228 * KIB),
    "12.0": Multiprocessor(48, 24, 100 * KIB),
}
COLUMNS = ("kernel", "registers", "threads", "shared_bytes", *MULTIPROCESSORS)


def find_cuobjdump() -> str | None:
    """From the CUDA toolkit, or the one that comes with triton, hence with torch."""
    on_path = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    packaged = triton and Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    return on_path or (str(packaged) if packaged and packaged.is_file() else None)


def short_name(demangled: str) -> str:
    """Of a kernel: without result, parameters and namespaces."""
    name = demangled.removeprefix("void ").rsplit("(", 1)[0]
    return re.sub(r"slowfast_ext::|\(anonymous namespace\)::", "", name)


@dataclass(frozen=True)
class Usage:
    """The most that a kernel needs on any architecture in a library; of shared memory, what is static."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    local_bytes: int


def read(library: str) -> dict[str, Usage]:
    """Kernel to what cuobjdump reports."""
    dump = subprocess.run(
        [find_cuobjdump(), "--dump-resource-usage", library], capture_output=True, text=True, check=True
    )
    readable = subprocess.run(["c++filt"], input=dump.stdout, capture_output=True, text=True, check=True).stdout
    most: dict[str, tuple[int, ...]] = {}
    pattern = r"Function (.+):\n\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    for name, registers, stack, shared, local in re.findall(pattern, readable):
        # From compute capability 9.0 on, the bytes of the system are counted there.
        usage = (int(registers), int(stack), int(shared) % SYSTEM_SHARED, int(local))
        kernel = short_name(name)
        most[kernel] = tuple(map(max, most.get(kernel, usage), usage))
    return {kernel: Usage(*usage) for kernel, usage in sorted(most.items())}


def read_table() -> dict[str, dict[str, int]]:
    """Kernel to column to number."""
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return {row.pop("kernel"): {column: int(number) for column, number in row.items()} for row in rows}


if __name__ == "__main__":
    table = read_table()
    print(*COLUMNS, sep="\t")
    for kernel, usage in read(sys.argv[1]).items():
        registers = (usage.registers + 7) // 8 * 8
        threads, shared_bytes = (table.get(kernel, {}).get(column, 0) for column in ("threads", "shared_bytes"))
        blocks = (each.resident_blocks(registers, threads or 1, shared_bytes) for each in MULTIPROCESSORS.values())
        print(kernel, registers, threads, shared_bytes, *blocks, sep="\t")
