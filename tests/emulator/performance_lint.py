"""What a kernel's accesses to memory cost a GPU, counted in the emulator (see traffic.h), and what is allowed."""

import subprocess
from dataclasses import dataclass

import batch_norm_cases
import conv3d_cases
import conv3d_statistics_cases
import fast_bottleneck_cases
import lateral_cases
import numpy as np
import pool_head_cases
import stem_cases
import toolchain

SECTOR = 32  # bytes
# Which arguments of an operator's binding are which tensors. y of lateral_fuse has room for the slice of slow_y.
TENSORS = {
    "batch_norm": {
        5: "x",
        6: "residual",
        7: "y",
        8: "grad",
        9: "grad_x",
        10: "grad_residual",
        11: "mean",
        12: "inverse_std",
        13: "weight",
        14: "bias",
    },
    "conv3d_bn_relu": {2: "x", 3: "weight", 4: "bias", 5: "residual", 6: "y"},
    "conv3d_statistics": {2: "x", 3: "weight", 4: "y", 5: "mean", 6: "variance", 7: "inverse_std"},
    "fast_bottleneck": {1: "x", 2: "weight_a", 4: "weight_b", 6: "weight_c", 8: "weight_shortcut", 10: "y"},
    "lateral_fuse": {1: "slow", 2: "fast", 3: "weight", 4: "bias", 6: "y"},
    "pool_head": {2: "slow", 3: "fast", 4: "weight", 5: "bias", 9: "averages", 10: "logits", 11: "y"},
    "stem": {1: "x", 2: "weight", 3: "bias", 7: "y"},
}
RUN = {
    "batch_norm": batch_norm_cases.run,
    "conv3d_bn_relu": conv3d_cases.run,
    "conv3d_statistics": conv3d_statistics_cases.run,
    "fast_bottleneck": fast_bottleneck_cases.run,
    "lateral_fuse": lateral_cases.run,
    "pool_head": pool_head_cases.run,
    "stem": stem_cases.run,
}


@dataclass(frozen=True)
class Row:
    """An instruction's requests to shared memory or to a tensor, or those of each warp between two barriers together.

    Attributes:
        launch (int): which of the operator's.
        space (str): "shared" or the tensor.
        kind (str): load, store, cp.async, ldmatrix; read or written for those between two barriers.
        place (str): in the source, or in the library for loads and stores.
        requests (int): how many.
        transactions (int): wavefronts in shared memory, sectors in global memory.
        ideal (int): the fewest that there could be.
        bytes (int): asked for in global memory, without repetitions in a request.
    """

    launch: int
    space: str
    kind: str
    place: str
    requests: int
    transactions: int
    ideal: int
    bytes: int


class Traffic:
    """What :func:`measure` found."""

    def __init__(self, library, report):
        self.library = library
        self.rows = []
        for line in report.splitlines():
            launch, space, kind, place, *counts = line.split("\t")
            self.rows.append(Row(int(launch), space, kind, place, *map(int, counts)))

    def select(self, space, *kinds):
        return [row for row in self.rows if row.space == space and row.kind in kinds]

    def excess(self, *kinds):
        """Wavefronts of shared memory beyond the ideal, as a fraction of the latter."""
        rows = self.select("shared", *kinds)
        ideal = sum(row.ideal for row in rows)
        return (sum(row.transactions for row in rows) - ideal) / ideal if ideal else 0.0

    def efficiency(self, tensor, *kinds):
        """Bytes asked for, as a fraction of those of the sectors that they lie in."""
        rows = self.select(tensor, *kinds)
        return sum(row.bytes for row in rows) / (SECTOR * sum(row.transactions for row in rows))

    def __str__(self):
        """A table of what is not ideal, the worst first."""
        lines = []
        for row in sorted(self.rows, key=lambda row: row.ideal - row.transactions):
            if row.transactions == row.ideal:
                break
            place = row.place
            if place.isdigit():
                command = ["addr2line", "-s", "-e", str(self.library), hex(int(place) - 1)]
                place = subprocess.run(command, capture_output=True, text=True).stdout.split(" ")[0].strip()
            what = f"launch {row.launch}, {row.space} {row.kind} at {place}"
            lines.append(f"{what}: {row.requests} requests, {row.transactions} transactions, {row.ideal} ideal")
        return "\n".join(lines)


class Watching:
    """A module of a kernel that is told where the tensors lie before it runs."""

    def __init__(self, operator, module):
        self.module = module
        setattr(self, operator, lambda *arguments: self.run(operator, arguments))

    def run(self, operator, arguments):
        for i, name in TENSORS[operator].items():
            array = arguments[i]
            while array is not None and isinstance(array.base, np.ndarray):
                array = array.base
            if array is not None:
                self.module.watch(name, array)
        getattr(self.module, operator)(*arguments)


def measure(operator, case, library):
    """Run a bfloat16 case on a library of ``toolchain.build(..., traffic=True)``; its result must be right."""
    module = toolchain.load(library)
    error = RUN[operator](Watching(operator, module), case, "bfloat16")
    report = module.traffic()
    assert error <= 1
    return Traffic(library, report)
