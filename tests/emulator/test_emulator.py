"""The emulator itself: right toy kernels pass, and each kind of mistake is reported."""

from pathlib import Path

import numpy as np
import pytest
import toolchain
import torch

pytestmark = pytest.mark.skipif(toolchain.unavailable_reason() is not None, reason=str(toolchain.unavailable_reason()))
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(scope="module")
def toys():
    return toolchain.load(toolchain.build("toy_kernels"))


@pytest.fixture(params=[None, 1, 2], ids=lambda seed: f"seed={seed}")
def schedule(request, monkeypatch):
    monkeypatch.setenv("SLOWFAST_EXT_EMULATOR_SEED", "" if request.param is None else str(request.param))


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def as_array(tensor):
    return tensor.view(torch.uint16).numpy() if tensor.element_size() == 2 else tensor.numpy()


def random_operand(*shape, dtype):
    """Numbers that the tensor core reads exactly: of float32 it drops the low 13 bits."""
    values = torch.randn(shape).to(dtype)
    return (values.view(torch.int32) & -(1 << 13)).view(torch.float32) if dtype == torch.float32 else values


def matmul(toys, a, b, mistake="none"):
    run = getattr(toys, f"matmul_{name_of(a.dtype)}")
    return torch.from_numpy(run(as_array(a), as_array(b), getattr(toys.Mistake, mistake))).double()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.usefixtures("schedule")
def test_tiled_matmul_equals_the_product_in_float64(toys, dtype):
    a, b = random_operand(150, 160, dtype=dtype), random_operand(64, 160, dtype=dtype)
    torch.testing.assert_close(matmul(toys, a, b), a.double() @ b.double().T, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_mma_registers_hold_the_elements_that_the_ptx_manual_says(toys, dtype):
    per_register = 4 // dtype.itemsize
    depth = 8 * per_register
    a, b, c = random_operand(16, depth, dtype=dtype), random_operand(8, depth, dtype=dtype), torch.randn(16, 8)
    left, right, sums = np.zeros((32, 4), np.uint32), np.zeros((32, 2), np.uint32), np.zeros((32, 4), np.float32)
    for lane in range(32):
        group, member = divmod(lane, 4)
        k = [per_register * member + half * depth // 2 for half in (0, 1)]  # of the first element in a register
        rows = [a[group, k[0] :], a[group + 8, k[0] :], a[group, k[1] :], a[group + 8, k[1] :]]
        left[lane] = [as_array(row[:per_register].contiguous()).view(np.uint32)[0] for row in rows]
        columns = [b[group, k[0] :], b[group, k[1] :]]
        right[lane] = [as_array(column[:per_register].contiguous()).view(np.uint32)[0] for column in columns]
        sums[lane] = [c[group + 8 * (i // 2), 2 * member + i % 2] for i in range(4)]
    d = getattr(toys, f"mma_{name_of(dtype)}")(left, right, sums)
    expected = (a.double() @ b.double().T + c.double()).float()  # rounded once
    for lane in range(32):
        group, member = divmod(lane, 4)
        for i in range(4):
            element = expected[group + 8 * (i // 2), 2 * member + i % 2].item()
            assert d[lane, i] == pytest.approx(element, rel=2**-23)


def test_tf32_mma_ignores_the_low_bits(toys):
    a, b = torch.randn(64, 32), torch.randn(64, 32)
    cut = [(x.view(torch.int32) & -(1 << 13)).view(torch.float32) for x in (a, b)]
    assert torch.equal(matmul(toys, a, b), matmul(toys, *cut))


def test_ldmatrix_gives_lane_l_word_l_mod_4_of_row_l_div_4_of_each_matrix(toys):
    rows = np.arange(128, dtype=np.uint32).reshape(4, 8, 4)  # matrix, row, word
    assert np.array_equal(toys.ldmatrix(rows), rows.reshape(4, 32).T)


@pytest.mark.usefixtures("schedule")
def test_sum_by_shuffles_and_static_shared_memory(toys):
    values = np.arange(5 * 256, dtype=np.int32).reshape(5, 256)
    assert toys.sum(values).tolist() == values.sum(1).tolist()


def test_shuffles_stay_in_their_segment(toys):
    lane = np.arange(32)
    segment = lane & -8
    broadcast, up, down, swapped = toys.shuffle()
    assert np.array_equal(broadcast, segment + 1)
    assert np.array_equal(up, np.where(lane - 3 >= segment, lane - 3, lane))
    assert np.array_equal(down, np.where(lane + 3 < segment + 8, lane + 3, lane))
    assert np.array_equal(swapped[16:], (lane ^ 5)[16:])


def test_data_read_before_the_wait_is_nan(toys):
    ones = torch.ones(64, 160, dtype=torch.bfloat16)
    assert matmul(toys, ones, ones, "late_wait").isnan().all()


@pytest.mark.parametrize("mistake", ["leading_barrier", "trailing_barrier"])
def test_a_missing_barrier_corrupts_the_result(toys, mistake):
    ones = torch.ones(64, 160, dtype=torch.bfloat16)
    assert matmul(toys, ones, ones, mistake).isnan().any()


def test_a_random_schedule_finds_the_missing_barrier_that_the_plain_one_misses(toys, monkeypatch):
    values = np.arange(64, dtype=np.float32)
    expected = values - (values > 0)
    assert np.array_equal(toys.shift(values, False), expected)  # in order of the threads nobody is early
    monkeypatch.setenv("SLOWFAST_EXT_EMULATOR_SEED", "1")
    wrong = toys.shift(values, False)
    assert np.isnan(wrong).any()
    assert np.array_equal(wrong, toys.shift(values, False), equal_nan=True)  # the same seed, the same schedule
    assert np.array_equal(toys.shift(values, True), expected)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("barrier_skipped", r"deadlock: threads 17 returned; threads 0-16, 18-63 wait at __syncthreads \(toy_kernels"),
        ("barriers_apart", r"deadlock: threads 0-31 wait at __syncthreads \(.*\); threads 32-63 wait at __syncthreads"),
        ("warp_apart", r"deadlock: threads 5, 37 wait at __syncthreads \(.*\); threads 0-4, 6-36, 38-63 wait at mma"),
        ("absent_lane", r"__shfl_sync: lane 0 reads from lane 20, which takes no part"),
        ("misaligned_source", r"block 0, thread 0, toy_kernels.cpp:\d+: cp.async: the global address must be 16-byte"),
        ("misaligned_destination", r"cp.async: the shared address must be 16-byte aligned"),
        ("destination_outside", r"cp.async: the address must lie in the block's shared memory"),
        ("copy_without_wait", r"toy_kernels.cpp:\d+: cp.async: never waited for"),
        ("misaligned_ldmatrix", r"ldmatrix: the shared address must be 16-byte aligned"),
        ("too_much_shared", r"dynamic shared memory must be at most 49152 bytes .*, got 49153"),
        ("no_blocks", r"the number of blocks must be positive, got 0"),
    ],
)
@pytest.mark.usefixtures("schedule")
def test_mistakes_are_reported(toys, case, message):
    with pytest.raises(RuntimeError, match=message):
        toys.run(case)
    toys.run("right_copy")  # an error leaves nothing behind


def test_more_than_48_kib_of_shared_memory_after_the_attribute_is_set(toys):
    toys.run("raised_shared")


def test_an_unreadable_setting_is_named(toys, monkeypatch):
    monkeypatch.setenv("SLOWFAST_EXT_EMULATOR_SEED", "first")
    with pytest.raises(RuntimeError, match="SLOWFAST_EXT_EMULATOR_SEED must be a number, got first"):
        toys.run("right_copy")


def test_bank_conflicts_and_instructions_are_counted(toys):
    ones = torch.ones(64, 64, dtype=torch.bfloat16)
    matmul(toys, ones, ones)
    assert toys.mma_count() == 64 * 64 * 64 // (16 * 8 * 16)
    assert toys.bank_conflicts() == 0
    matmul(toys, ones, ones, "swizzle")
    assert toys.bank_conflicts() == 4 * 2 * 2 * 4 * 4  # every phase: warps, steps, halves, instructions, matrices


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_16_bit_conversions_equal_those_of_torch(toys, dtype):
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    values = patterns.view(dtype).float()
    widened = torch.from_numpy(getattr(toys, f"widen_{name_of(dtype)}")(patterns.numpy()))
    assert torch.equal(widened.nan_to_num(nan=7).view(torch.int32), values.nan_to_num(nan=7).view(torch.int32))
    # All values, the midpoints between neighbours and what lies beside them, and any float32.
    finite = values[values.isfinite()].sort().values
    middle = ((finite[1:].double() + finite[:-1].double()) / 2).float()
    around = [middle, middle.nextafter(torch.tensor(torch.inf)), middle.nextafter(torch.tensor(-torch.inf))]
    any_bits = torch.randint(-(1 << 31), 1 << 31, (1 << 16,)).int().view(torch.float32)
    limits = torch.tensor([torch.inf, -torch.inf, torch.finfo(torch.float32).max, 65519.996, 65520.0, -65520.0])
    inputs = torch.cat([values, *around, any_bits, limits])
    narrowed = torch.from_numpy(getattr(toys, f"narrow_{name_of(dtype)}")(inputs.numpy())).view(dtype)
    expected = inputs.to(dtype)
    assert torch.equal(narrowed.isnan(), inputs.isnan())
    assert torch.equal(narrowed.view(torch.int16)[~inputs.isnan()], expected.view(torch.int16)[~inputs.isnan()])


def test_tf32_rounds_to_nearest_with_ties_away_from_zero(toys):
    values = np.array([1, 1 + 2**-11, -(1 + 2**-11), 1 + 2**-12, 1 + 3 * 2**-11, np.inf, -0.0, 1e-45], np.float32)
    rounded = np.array([1, 1 + 2**-10, -(1 + 2**-10), 1, 1 + 2**-9, np.inf, -0.0, 0], np.float32)
    assert np.array_equal(toys.round_to_tf32(values), rounded.view(np.uint32))


def run_sanitized(sanitizer, case):
    script = Path(__file__).with_name("sanitized_toys.py")
    result = toolchain.run_sanitized(sanitizer, script, sanitizer, case)
    if "unexpected memory mapping" in result.stderr:
        pytest.skip("ThreadSanitizer cannot run with the address space layout of this kernel")
    return result


@pytest.mark.parametrize("case", ["matmul:none", "shift:128,True", "shift:32,True"])
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers_are_silent_on_right_kernels(sanitizer, case):
    result = run_sanitized(sanitizer, case)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    "case", ["matmul:leading_barrier", "matmul:trailing_barrier", "shift:128,False", "shift:32,False"]
)
def test_thread_sanitizer_sees_the_race_that_a_missing_barrier_makes(case):
    result = run_sanitized("thread", case)
    assert result.returncode == 66
    assert "data race" in result.stderr


@pytest.mark.parametrize(
    ("case", "report"),
    [
        ("matmul:predicate", "AddressSanitizer: heap-"),  # rows past the end, of whatever lies there, read by cp.async
        ("shared_overrun", "heap-buffer-overflow"),
        ("misaligned_vector", "misaligned address"),
    ],
)
def test_address_sanitizer_sees_what_a_gpu_traps_or_hides(case, report):
    result = run_sanitized("address", case)
    assert result.returncode != 0
    assert report in result.stderr


def test_a_mutant_is_a_changed_copy_and_each_text_must_occur_once(tmp_path):
    (tmp_path / "kernel.cuh").write_text("a b b")
    with toolchain.mutated({"kernel.cuh": [("a", "c")]}, csrc=tmp_path) as copy:
        assert (copy / "kernel.cuh").read_text() == "c b b"
    assert (tmp_path / "kernel.cuh").read_text() == "a b b"
    for text, found in (("b", 2), ("d", 0)):
        with (
            pytest.raises(ValueError, match=f"must occur once in kernel.cuh, got {found}"),
            toolchain.mutated({"kernel.cuh": [(text, "")]}, csrc=tmp_path),
        ):
            pass
