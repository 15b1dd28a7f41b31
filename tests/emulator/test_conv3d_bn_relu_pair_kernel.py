"""The CUDA source of conv3d_bn_relu_pair, run on a CPU: values, sanitizers, and mutants that must be seen.

What both operators share is mutated in test_conv3d_bn_relu_kernel.py.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import build
import conv3d_pair_cases
import pytest
from conv3d_cases import MATHS, TILES
from conv3d_pair_cases import CASES

pytestmark = pytest.mark.skipif(build.unavailable_reason() is not None, reason=str(build.unavailable_reason()))

HERE = Path(__file__).resolve().parent
BINDING = [HERE / "conv3d_bn_relu_pair.cpp"]
KERNEL = "conv3d_bn_relu_pair.cuh"

# What is changed in the kernel, how it is run, and on which cases: plainly or under a sanitizer.
MUTANTS = {
    "second_problem_is_the_first": (
        "convolve_tile<Math, Tile, kVector>(pair.problems[1]",
        "convolve_tile<Math, Tile, kVector>(pair.problems[0]",
        "plain",
        "slow_res2",
    ),
    "blocks_of_the_second_are_counted_as_of_the_first": (
        "return {0, block - before};",
        "return {0, block};",
        "plain",
        "fast_res3",
    ),
    "share_is_rounded_down": ("+ blocks - 1) / blocks)", ") / blocks)", "plain", "slow_res4"),
    "sums_of_both_share_memory": (
        "partial + partial_size(problems[0], plan.splits[0])",
        "partial",
        "plain",
        "splits_4_3",
    ),
    "one_block_of_sums_is_of_the_wrong_problem": (
        "blockIdx.x >= pair.first_reduce_blocks",
        "blockIdx.x > pair.first_reduce_blocks",
        "plain",
        "splits_4_3",
    ),
    "blocks_of_sums_are_counted_from_the_first": (
        "? blockIdx.x - pair.first_reduce_blocks",
        "? blockIdx.x",
        "plain",
        "splits_4_3",
    ),
    "one_aligned_weight_is_enough": (
        "copies_in_chunks(problems[0], element_bytes) &&",
        "copies_in_chunks(problems[0], element_bytes) ||",
        "plain",
        "weight_unaligned",
    ),
}
SANITIZERS = ("address", "thread")


def build_mutant(old, new, way):
    csrc = build.mutate({KERNEL: [(old, new)]})
    sanitizer = way if way in SANITIZERS else None
    return build.build("conv3d_bn_relu_pair", BINDING, sanitizer=sanitizer, defines=("ONLY_BFLOAT16",), csrc=csrc)


@pytest.fixture(scope="module")
def builds():
    """All libraries, compiled side by side: a dictionary of futures."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {"plain": pool.submit(build.build, "conv3d_bn_relu_pair", BINDING)}
        for sanitizer in SANITIZERS:
            options = {"sanitizer": sanitizer, "defines": ("ONLY_BFLOAT16",)}
            futures[sanitizer] = pool.submit(build.build, "conv3d_bn_relu_pair", BINDING, **options)
        for name, (old, new, way, _) in MUTANTS.items():
            futures[name] = pool.submit(build_mutant, old, new, way)
        yield futures
        for future in futures.values():
            future.cancel()


@pytest.fixture(scope="module")
def kernel(builds):
    builds["plain"].result()  # else load would compile it a second time
    return build.load("conv3d_bn_relu_pair", BINDING)


def run(way, library, cases=""):
    """Run the bfloat16 cases whose names contain `cases` in a process of their own."""
    sanitizer = way if way in SANITIZERS else None
    return build.run_sanitized(sanitizer, HERE / "conv3d_pair_cases.py", library, cases)


@pytest.mark.parametrize("math", MATHS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_error_is_what_rounding_explains(kernel, case, math):
    assert conv3d_pair_cases.run(kernel, case, math) <= 1


@pytest.mark.parametrize("seed", range(4))
def test_order_of_threads_does_not_matter(kernel, monkeypatch, seed):
    monkeypatch.setenv("SLOWFAST_EXT_EMULATOR_SEED", str(seed))
    for name in ("slow_res2", "fast_res3", "tile_128x128", "splits_4_3", "odd_channels"):
        assert conv3d_pair_cases.run(kernel, CASES[name], "bfloat16") <= 1


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("math", MATHS)
def test_ldmatrix_meets_no_bank_conflict(kernel, math, tile):
    conv3d_pair_cases.run(kernel, CASES[f"tile_{tile}"], math)
    ldmatrix, bank_conflicts = kernel.statistics()
    assert ldmatrix > 0
    assert bank_conflicts == 0


@pytest.mark.parametrize("blocks", [(1, 1), (1, 7), (7, 1), (3, 3), (13, 5), (64, 257), (1000, 3), (12345, 6789)])
def test_both_problems_come_through_x_side_by_side(kernel, blocks):
    first, second = blocks
    order = [kernel.block_at(first, second, block) for block in range(first + second)]
    assert sorted(order) == [(0, block) for block in range(first)] + [(1, block) for block in range(second)]
    done = [0, 0]
    for position, (problem, block) in enumerate(order, 1):
        assert block == done[problem]  # each in its own order
        done[problem] += 1
        assert abs(done[1] - position * second / (first + second)) < 1


@pytest.mark.parametrize("blocks", [(2**31 - 2, 1), (1, 2**31 - 2), (2**30 + 1, 2**30 - 2)])
def test_the_largest_grids_begin_and_end_with_the_right_blocks(kernel, blocks):
    assert kernel.block_at(*blocks, 0) == (0, 0)
    problem, block = kernel.block_at(*blocks, sum(blocks) - 1)
    assert block == blocks[problem] - 1


@pytest.mark.parametrize(
    ("first", "second", "clips", "plan"),
    [
        ((131072, 8, 8, 3), (131072, 8, 32, 1), 1, ("128x32", 1, 1)),  # fast res2
        ((16384, 80, 64, 1), (16384, 80, 256, 1), 30, ("128x128", 1, 1)),  # slow res2
        ((16384, 320, 128, 1), (4096, 320, 512, 1), 30, ("128x128", 1, 1)),  # slow res3
        ((4096, 640, 256, 3), (1024, 640, 1024, 1), 30, ("128x128", 1, 1)),  # slow res4
        ((1024, 1280, 512, 3), (256, 1280, 2048, 1), 1, ("128x128", 4, 1)),  # slow res5: the longer reduction is split
    ],
)
def test_one_tile_suits_both_and_each_splits_for_itself(kernel, first, second, clips, plan):
    first, second = ((pixels * clips, *rest) for pixels, *rest in (first, second))
    assert kernel.plan(first, second, 132) == plan


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_sanitizer_finds_nothing(builds, sanitizer):
    result = run(sanitizer, builds[sanitizer].result())
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    assert result.stdout.count("\n") == len(CASES)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_seen(builds, name):
    *_, way, cases = MUTANTS[name]
    result = run(way, builds[name].result(), cases)
    assert result.returncode != 0
    # Seen for what it is, not because the process broke down on the way.
    report = {"address": "ERROR: AddressSanitizer", "thread": "WARNING: ThreadSanitizer: data race"}.get(way)
    assert report in result.stderr if report else result.stdout or "emulator" in result.stderr
