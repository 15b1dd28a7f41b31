"""The CUDA source of lateral_fuse, run on a CPU: values, sanitizers, and mutants that must be seen."""

import harness
import lateral_cases
import pytest
from conv3d_cases import MATHS
from harness import Mutant
from lateral_cases import CASES

MUTANTS = {
    "no_barrier": Mutant("      __syncthreads();", "", "thread", "res2_7"),
    "no_barrier_values": Mutant("      __syncthreads();", "", "random", "res2_7"),
    "no_barrier_of_the_warp": Mutant("    __syncwarp();", "", "thread", "res2_7"),
    "wait_for_one_stage_less": Mutant("kStages - 2>()", "kStages - 1>()", "plain", "res2_7"),
    "fast_is_read_beyond_the_last_pixel": Mutant(
        "has_pixel = first_pixel_ + row < p_.area",
        "has_pixel = true",
        "address",
        "odd_channels",
    ),
    "fast_is_read_beyond_the_last_frame": Mutant(
        "static_cast<unsigned>(first_frame_ + tap) <",
        "0u <",
        "address",
        "shorter_than_the_kernel",
    ),
    "y_is_written_beyond_the_last_pixel": Mutant("if (pixel >= p.area) continue;", "", "address", "lateral_alone"),
    "slow_is_copied_beyond_the_last_pixel": Mutant(
        "min(Tile::kPixels, p.area - at.pixel)",
        "Tile::kPixels",
        "address",
        "one_tap",
    ),
    "weight_is_read_beyond_the_last_channel": Mutant(
        "source, out_channel < p_.out_channels && k",
        "source, k",
        "address",
        "a_few_channels",
    ),
    "weights_of_the_second_tile": Mutant("|| tile_ == first_tile_", "|| tile_ != first_tile_", "plain", "res1_7"),
    "swizzle_differs": Mutant("lane % 16, chunk + lane / 16", "lane % 16, 2 - chunk + lane / 16", "plain", "res2_7"),
    "frames_in_another_order": Mutant("frame(tile % p.out_frames)", "frame(0)", "plain", "res1_5"),
}
KERNEL = harness.Kernel("lateral_fuse", lateral_cases, MUTANTS)


@pytest.mark.parametrize("math", MATHS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_error_is_what_rounding_explains_and_no_bank_is_met_twice(kernel, case, math):
    assert lateral_cases.run(kernel, case, math) <= 1
    ldmatrix, bank_conflicts = kernel.statistics()
    assert ldmatrix > 0
    assert bank_conflicts == 0


@pytest.mark.parametrize("seed", range(4))
def test_order_of_threads_does_not_matter(kernel, monkeypatch, seed):
    monkeypatch.setenv("SLOWFAST_EXT_EMULATOR_SEED", str(seed))
    for name in ("res1_7_taps_stride_4", "res2_7_taps_stride_4", "res4_7_taps_stride_4_ampere", "odd_channels_many"):
        assert lateral_cases.run(kernel, CASES[name], "bfloat16") <= 1


@pytest.mark.parametrize("build", harness.SANITIZERS)
def test_sanitizer_finds_nothing(builds, build):
    builds.check_sanitizer_finds_nothing(build)


@pytest.mark.parametrize("build", MUTANTS)
def test_mutant_is_seen(builds, build):
    builds.check_mutant_is_seen(build)
