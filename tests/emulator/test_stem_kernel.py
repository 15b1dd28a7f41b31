"""The CUDA source of stem, run on a CPU: values, sanitizers, and mutants that must be seen."""

import harness
import pytest
import stem_cases
from harness import Mutant
from stem_cases import CASES, MATHS

MUTANTS = {
    "no_barrier_before_the_products": Mutant(
        "__syncthreads();  // the patch is", "// the patch is", "thread", "slow_bytes"
    ),
    "no_barrier_before_the_pooling": Mutant(
        "__syncthreads();  // the stage is", "// the stage is", "random", "slow_bytes"
    ),
    "padding_is_black": Mutant("float value = 0.f;", "float value = shift;", "plain", "slow_bytes"),
    "image_is_read_beyond_its_edge": Mutant("< unsigned(p.in_w)", "< unsigned(p.in_w + 9)", "address", "one_pixel"),
    "frame_outside_is_read": Mutant("index < p_.in_t", "index <= p_.in_t", "address", "frame_outside_is_nan"),
    "weight_is_read_beyond_the_last_channel": Mutant(
        "if (channel < p.channels && row",
        "if (row",
        "address",
        "channels_tail",
    ),
    "y_is_written_beyond_the_last_channel": Mutant(" || channel >= p.channels)", ")", "plain", "channels_tail"),
    "y_is_written_beyond_the_last_row": Mutant("if (y >= p.out_h || ", "if (", "address", "several_tiles"),
    "unaligned_y_is_written_16_bytes_at_a_time": Mutant("if (p.vector)", "if (true)", "address", "unaligned"),
    "halo_of_the_pooling_is_no_padding": Mutant(
        "first < 0.f || !(inside_ >> row & 1)", "first < 0.f", "plain", "fast_bytes"
    ),
    "right_neighbour_of_the_window_is_seen": Mutant("? last_half_ : ~0u", "? ~0u : ~0u", "plain", "nan_spreads"),
    "taps_in_reverse": Mutant(
        "Tile::kTaps - 1 - column / Tile::kOctets", "column / Tile::kOctets", "plain", "fast_bytes"
    ),
    "sums_stay": Mutant("    warp.advance();", "", "plain", "slow_chunks"),
    "frames_after_a_chunk_are_forgotten": Mutant(
        "end_frame + kReach, p.out_t) - 1",
        "end_frame, p.out_t) - 1",
        "plain",
        "chunks",
    ),
}
KERNEL = harness.Kernel("stem", stem_cases, MUTANTS)


@pytest.mark.parametrize("math", MATHS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_error_is_what_rounding_explains(kernel, case, math):
    assert stem_cases.run(kernel, case, math) <= 1


@pytest.mark.parametrize("seed", range(4))
def test_order_of_threads_does_not_matter(kernel, monkeypatch, seed):
    monkeypatch.setenv("SLOWFAST_EXT_EMULATOR_SEED", str(seed))
    for name in ("slow_bytes", "fast_in_chunks", "several_tiles"):
        assert stem_cases.run(kernel, CASES[name], "bfloat16") <= 1


@pytest.mark.parametrize(
    ("tiles", "frames", "kernel_t", "chunk"),
    [
        (32, 32, 5, 8),  # one clip of 256 x 256, Fast
        (960, 32, 5, 32),  # 30 of them: whole, nothing is read twice
        (64, 8, 1, 4),  # Slow
        (1920, 8, 1, 8),
        (1, 1, 5, 1),
    ],
)
def test_clips_are_cut_only_as_far_as_it_fills_the_gpu(kernel, tiles, frames, kernel_t, chunk):
    assert kernel.choose_chunk(tiles, frames, kernel_t, 132) == chunk


@pytest.mark.parametrize("build", harness.SANITIZERS)
def test_sanitizer_finds_nothing(builds, build):
    builds.check_sanitizer_finds_nothing(build)


@pytest.mark.parametrize("build", MUTANTS)
def test_mutant_is_seen(builds, build):
    builds.check_mutant_is_seen(build)
