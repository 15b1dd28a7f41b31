"""The CUDA source of conv3d_bn_relu_pair, run on a CPU: values, sanitizers, and mutants that must be seen.

What both operators share is mutated in test_conv3d_bn_relu_kernel.py.
"""

import conv3d_pair_cases
import harness
import pytest
from conv3d_cases import MATHS, TILES
from conv3d_pair_cases import CASES
from harness import Mutant

MUTANTS = {
    "second_problem_is_the_first": Mutant(
        "convolve_tile<Math, Tile, kVector>(pair.problems[1",
        "convolve_tile<Math, Tile, kVector>(pair.problems[0",
        "plain",
        "slow_res2",
    ),
    "blocks_of_the_first_are_counted_among_all": Mutant(
        "return {0, block - before", "return {0, block", "plain", "fast_res3"
    ),
    "share_is_rounded_down": Mutant(
        "(second_blocks << 32) + blocks - 1", "(second_blocks << 32)", "plain", "slow_res4"
    ),
    "sums_of_both_share_memory": Mutant(
        "partial + partial_size(problems[0], plan.splits[0])", "partial", "plain", "splits_4_3"
    ),
    "one_block_of_sums_is_of_the_wrong_problem": Mutant(
        "const unsigned problem = blockIdx.x >= pair.first_reduce_blocks",
        "const unsigned problem = blockIdx.x > pair.first_reduce_blocks",
        "plain",
        "splits_4_3",
    ),
    "blocks_of_sums_are_counted_among_all": Mutant(
        "problem ? blockIdx.x - pair.first_reduce_blocks", "problem ? blockIdx.x", "plain", "splits_4_3"
    ),
    "one_aligned_weight_is_enough": Mutant(
        "return copies_in_chunks(problems[0], element_bytes) && copies_in_chunks(problems[1], element_bytes)",
        "return copies_in_chunks(problems[0], element_bytes)",
        "plain",
        "second_weight_unaligned",
    ),
}
KERNEL = harness.Kernel("conv3d_bn_relu_pair", conv3d_pair_cases, MUTANTS)


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
        ((1024, 1280, 512, 3), (256, 1280, 2048, 1), 1, ("128x128", 4, 4)),  # slow res5
        ((256, 256, 512, 9), (256, 256, 512, 1), 1, ("128x128", 8, 1)),  # a basic block
    ],
)
def test_one_tile_suits_both_and_each_splits_for_itself(kernel, first, second, clips, plan):
    first, second = ((pixels * clips, *rest) for pixels, *rest in (first, second))
    assert kernel.plan(first, second, 132) == plan


@pytest.mark.parametrize("build", harness.SANITIZERS)
def test_sanitizer_finds_nothing(builds, build):
    builds.check_sanitizer_finds_nothing(build)


@pytest.mark.parametrize("build", MUTANTS)
def test_mutant_is_seen(builds, build):
    builds.check_mutant_is_seen(build)
