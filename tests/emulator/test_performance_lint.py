"""What the kernels' accesses to memory would cost a GPU: shared-memory wavefronts and global-memory sectors."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import batch_norm_cases
import conv3d_cases
import conv3d_statistics_cases
import fast_bottleneck_cases
import lateral_cases
import performance_lint
import pool_head_cases
import pytest
import stem_cases
import toolchain

pytestmark = pytest.mark.skipif(toolchain.unavailable_reason() is not None, reason=str(toolchain.unavailable_reason()))
PLAIN = ("load", "store", "cp.async")  # accesses to shared memory beside ldmatrix


@dataclass(frozen=True)
class Lint:
    """A layer of SlowFast in bfloat16, and what is allowed.

    Attributes:
        operator, case: what is run.
        full (tuple[str, ...]): tensors of which every request must touch full sectors only.
        streams (dict): others: the least efficiency, of each request (its kind: load, store, cp.async) or of what a
            warp reads or writes between two barriers (read, written), where neighbouring requests meet in L1.
        excess (float): wavefronts of plain accesses to shared memory beyond the ideal, as a fraction of the latter.
    """

    operator: str
    case: object
    full: tuple[str, ...]
    streams: dict[tuple[str, str], float] = field(default_factory=dict)
    excess: float = 0.0


def conv3d(*arguments, **options):
    return conv3d_cases.Case(*arguments, **options)


def block(*arguments, **options):
    return fast_bottleneck_cases.Case(*arguments, **options)


# A thread of batch_norm reads 32 bytes of a vector in two loads, the sectors of which meet in L1.
# Excess of fast_bottleneck: once in its life a block scatters the weights into the order of the fragments, here for
# three frames only. Pixels of 8 channels fill half a sector, and a halo row begins and ends in the middle of one.
# A thread of stem loads one pixel of 3 channels, one after the other, so that the sectors of a request are used in L1
# by the next two; rows of the patch (213 bytes) begin anywhere. Its excess: 3-element pixels and 8 channels' pooling.
# The linear layer of pool_head reads averages 32 bytes a lane in two loads, so twice the sectors, again from L1.
LINTS = {
    "batch_norm_fast_stem": Lint("batch_norm", batch_norm_cases.Case((1, 8, 2, 19, 15)), ("x", "y", "grad", "grad_x")),
    "batch_norm_slow_res2": Lint(
        "batch_norm",
        batch_norm_cases.Case((1, 128, 1, 8, 9), residual=True, keeps_y=True),
        ("x", "residual", "y", "grad", "grad_x", "grad_residual"),
        {(vector, "read"): 1.0 for vector in ("mean", "weight", "bias")},
    ),
    "conv3d_slow_res2_conv3": Lint(
        "conv3d_bn_relu", conv3d((1, 64, 1, 16, 16), 256, residual=True), ("x", "weight", "residual", "y")
    ),
    "conv3d_slow_res2_1x3x3": Lint("conv3d_bn_relu", conv3d((1, 64, 1, 16, 16), 64, (1, 3, 3)), ("x", "weight", "y")),
    "conv3d_slow_res3_1x3x3_stride_2": Lint(
        "conv3d_bn_relu", conv3d((1, 64, 1, 32, 16), 128, (1, 3, 3), (1, 2, 2)), ("x", "weight", "y")
    ),
    "conv3d_slow_res4_3x1x1": Lint("conv3d_bn_relu", conv3d((1, 256, 2, 8, 16), 64, (3, 1, 1)), ("x", "weight", "y")),
    "conv3d_fast_res2_1x3x3": Lint(
        "conv3d_bn_relu", conv3d((1, 8, 1, 16, 16), 8, (1, 3, 3)), ("y",), {("x", "cp.async"): 0.85}
    ),
    "conv3d_statistics_slow_res2_conv3": Lint(
        "conv3d_statistics", conv3d_statistics_cases.Case((1, 64, 1, 16, 16), 256), ("x", "weight", "y")
    ),
    "fast_bottleneck_res2_first": Lint(
        "fast_bottleneck", block((1, 8, 3, 16, 32), 8), ("y",), {("x", "cp.async"): 0.85}, excess=0.2
    ),
    "fast_bottleneck_res2": Lint("fast_bottleneck", block((1, 32, 3, 16, 32), 8), ("x", "y"), excess=0.15),
    "fast_bottleneck_res3_first": Lint("fast_bottleneck", block((1, 32, 3, 16, 32), 16, 2), ("x", "y"), excess=0.25),
    "fast_bottleneck_res3": Lint("fast_bottleneck", block((1, 64, 3, 16, 32), 16), ("x", "y"), excess=0.2),
    "fast_bottleneck_res4_first": Lint("fast_bottleneck", block((1, 64, 3, 16, 16), 32, 2), ("x", "y"), excess=0.3),
    "fast_bottleneck_res4": Lint("fast_bottleneck", block((1, 128, 3, 8, 16), 32), ("x", "y"), excess=0.4),
    "lateral_fuse_res1": Lint(
        "lateral_fuse", lateral_cases.Case((1, 8, 32, 16, 16), 64, 16, 5, 8), ("slow", "fast", "y")
    ),
    "lateral_fuse_res2": Lint(
        "lateral_fuse", lateral_cases.Case((1, 32, 16, 16, 16), 256, 64, 5, 8), ("slow", "fast", "weight", "y")
    ),
    "lateral_fuse_res3": Lint(
        "lateral_fuse", lateral_cases.Case((1, 64, 8, 16, 8), 512, 128, 7, 4), ("slow", "fast", "weight", "y")
    ),
    "pool_head_4x16": Lint(
        "pool_head",
        pool_head_cases.Case((2, 512, 4, 8, 8), (2, 64, 16, 8, 8), 80, views=2),
        ("slow", "fast", "weight", "y"),
        {("averages", "load"): 0.5, ("averages", "read"): 1.0, ("averages", "store"): 1.0},
    ),
    "stem_slow_bytes": Lint("stem", stem_cases.Case((1, 1, 64, 64), 64), ("y",), {("x", "read"): 0.7}, excess=0.06),
    "stem_slow_channels_last": Lint(
        "stem", stem_cases.Case((1, 1, 64, 64), 64, layout="channels_last"), ("y",), {("x", "read"): 0.8}, excess=0.06
    ),
    "stem_fast_bytes": Lint("stem", stem_cases.Case((1, 2, 64, 64), 8, 5), ("y",), {("x", "read"): 0.7}, excess=0.07),
}


@dataclass(frozen=True)
class Mutant:
    file: str
    old: str
    new: str
    lint: str


MUTANTS = {
    "sums_of_neighbours_meet_in_a_bank": Mutant(
        "batch_norm_tile.cuh", "kPitch = kColumns + 32 / kChunk % kColumns", "kPitch = kColumns", "batch_norm_slow_res2"
    ),
    "no_swizzle": Mutant("conv3d_tile.cuh", "chunk ^ (row / 2 % Tile::kRowChunks)", "chunk", "conv3d_slow_res2_1x3x3"),
    "no_padding_of_the_sums": Mutant(
        "conv3d_tile.cuh", "kSlabPitch = kWarpChannels + 8", "kSlabPitch = kWarpChannels", "conv3d_slow_res2_1x3x3"
    ),
    "lanes_store_apart": Mutant("fast_bottleneck_block.cuh", "if (p_.wide)", "if (false)", "fast_bottleneck_res2"),
    "lanes_read_apart": Mutant(
        "pool_head.cuh", "kColumns = kVector ? 4 : 32", "kColumns = kVector ? 1 : 32", "pool_head_4x16"
    ),
}


def build(operator, csrc=toolchain.CSRC):
    return toolchain.build(operator, traffic=True, defines=("ONLY_BFLOAT16",), csrc=csrc)


def build_mutant(name):
    mutant = MUTANTS[name]
    with toolchain.mutated({mutant.file: [(mutant.old, mutant.new)]}) as csrc:
        return build(LINTS[mutant.lint].operator, csrc)


@pytest.fixture(scope="module")
def libraries():
    """All libraries, compiled side by side: a dictionary of futures."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {name: pool.submit(build, name) for name in performance_lint.TENSORS}
        yield futures | {name: pool.submit(build_mutant, name) for name in MUTANTS}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setenv("SLOWFAST_EXT_EMULATOR_THREADS", "1")  # traffic.cpp counts in one


def measure(lint, library):
    return performance_lint.measure(lint.operator, lint.case, library)


def efficiencies(lint, traffic):
    """Of the tensors that must use full sectors, and of the other streams, with the least that is allowed."""
    for tensor in lint.full:
        yield tensor, traffic.efficiency(tensor, "load", "store", "cp.async"), 1.0
    for (tensor, kind), least in lint.streams.items():
        yield f"{tensor} {kind}", traffic.efficiency(tensor, kind), least


@pytest.mark.parametrize("name", LINTS)
def test_banks_and_sectors_are_used_well(libraries, name):
    lint = LINTS[name]
    traffic = measure(lint, libraries[lint.operator].result())
    assert traffic.excess("ldmatrix") == traffic.excess("cp.async") == 0, str(traffic)
    assert traffic.excess(*PLAIN) <= lint.excess, str(traffic)
    found = list(efficiencies(lint, traffic))
    assert [part for part in found if part[1] < part[2]] == [], str(traffic)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_worse_kernel_is_seen(libraries, name):
    lint = LINTS[MUTANTS[name].lint]
    traffic = measure(lint, libraries[name].result())
    if name == "no_swizzle":
        assert traffic.excess("ldmatrix") == 3  # rows of 64 bytes: 8 of them meet in two places, four times each
    elif name in ("no_padding_of_the_sums", "sums_of_neighbours_meet_in_a_bank"):
        assert traffic.excess(*PLAIN) > lint.excess
    else:
        assert any(found < least for _, found, least in efficiencies(lint, traffic))
