import math

import pytest

from slowfast_ext.training import read_settings, zoo_config
from slowfast_ext.training.multigrid import Shape, count_batches, long_cycle, short_cycle
from slowfast_ext.training.schedules import LearningRate, regular_rate

COSINE = "slowfast_r50_4x16x1_256e_kinetics400_rgb"
STEP = "slowfast_r50_8x8x1_256e_kinetics400_rgb_steplr"
STHV1 = "slowfast_r50_16x8x1_22e_sthv1_rgb"
MULTIGRID = "slowfast_multigrid_r50_8x8x1_358e_kinetics400_rgb"
ITERATIONS = 3757  # of an epoch over 240,436 videos in batches of 64


def _rate(name):
    settings = read_settings(zoo_config(name))
    return LearningRate(settings.optimizer, settings.schedule, settings.epochs)


@pytest.mark.parametrize(("epoch", "expected"), [(0, 0.1), (34, 0.0957105), (128, 0.05), (255, 3.7649e-6)])
def test_the_cosine_has_the_published_rates(epoch, expected):
    settings = read_settings(zoo_config(COSINE))
    assert regular_rate(0.1, settings.schedule, epoch, 256) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("epoch", "expected"), [(0, 0.1), (93, 0.1), (94, 1e-2), (154, 1e-3), (195, 1e-3), (255, 1e-4)]
)
def test_steps_divide_the_rate_at_their_epochs(epoch, expected):
    settings = read_settings(zoo_config(STEP))
    assert regular_rate(0.1, settings.schedule, epoch, 256) == pytest.approx(expected, rel=1e-9)


def test_the_warm_up_goes_by_iteration_over_34_epochs():
    rate = _rate(COSINE)
    assert rate(0, 0, ITERATIONS) == pytest.approx(0.01, rel=1e-12)
    assert rate(17, 17 * ITERATIONS, ITERATIONS) == pytest.approx(
        0.55 * 0.05 * (1 + math.cos(math.pi * 17 / 256)), rel=1e-12
    )
    first, second = rate(0, 0, ITERATIONS), rate(0, 1, ITERATIONS)
    assert second - first == pytest.approx(0.1 * 0.9 / (34 * ITERATIONS), rel=1e-6)
    before, after = rate(33, 34 * ITERATIONS - 1, ITERATIONS), rate(34, 34 * ITERATIONS, ITERATIONS)
    assert after == pytest.approx(0.0957105, rel=1e-5)
    assert before == pytest.approx(0.05 * (1 + math.cos(math.pi * 33 / 256)), rel=1e-4)
    assert rate(34, 34 * ITERATIONS + 99, ITERATIONS) == after


def test_the_warm_up_of_something_something_is_510_iterations_whatever_the_epoch():
    rate = _rate(STHV1)
    assert rate(0, 0, 2689) == pytest.approx(0.006)
    assert rate(0, 255, 2689) == pytest.approx(0.06 * 0.55)
    assert rate(0, 510, 2689) == 0.06
    assert rate(1, 255, 200) == pytest.approx(0.06 * 0.55)
    assert [rate(epoch, 10**6, 2689) for epoch in (13, 14, 18)] == pytest.approx([0.06, 6e-3, 6e-4])


@pytest.fixture(scope="module")
def multigrid():
    settings = read_settings(zoo_config(MULTIGRID))
    schedule = settings.schedule
    phases = long_cycle(settings.multigrid, 32, settings.epochs, schedule.steps, schedule.gamma)
    return settings, phases, LearningRate(settings.optimizer, schedule, settings.epochs, phases)


def test_the_long_cycle_is_the_published_one_epoch_for_epoch(multigrid):
    _, phases, _ = multigrid
    ends = [73, 110, 142, 158, 205, 228, 248, 259, 291, 308, 322, 329, 343, 358]
    assert [phase.end for phase in phases] == ends
    assert [phase.start for phase in phases] == [0, *ends[:-1]]
    shapes = [Shape(8, 8, 158), Shape(4, 16, 158), Shape(2, 16, 224), Shape(1, 32, 224)]
    assert [phase.shape for phase in phases] == shapes * 3 + shapes[-1:] * 2


def test_the_rates_of_the_long_cycle_are_the_published_ones(multigrid):
    _, phases, rate = multigrid
    expected = [0.8, 0.4, 0.2, 0.1, 0.08, 0.04, 0.02, 0.01, 0.008, 0.004, 0.002, 0.001, 0.001, 1e-5]
    assert [rate(phase.end - 1, 0, 1) for phase in phases] == pytest.approx(expected, rel=1e-9)
    for epoch in (0, 1, 17, 33, 34):
        assert rate(epoch, 0, 1) == pytest.approx(0.01 + epoch * (0.8 - 0.01) / 34, rel=1e-9)


def test_the_short_cycle_goes_through_the_intended_shapes(multigrid):
    settings, phases, _ = multigrid
    turns = [short_cycle(settings.multigrid, phase.shape, 32) for phase in phases[:4]]
    assert turns == [
        (Shape(16, 8, 112), Shape(8, 8, 158), Shape(8, 8, 158)),
        (Shape(8, 16, 112), Shape(4, 16, 158), Shape(4, 16, 158)),
        (Shape(8, 16, 112), Shape(4, 16, 158), Shape(2, 16, 224)),
        (Shape(4, 32, 112), Shape(2, 32, 158), Shape(1, 32, 224)),
    ]


def test_batches_whose_sizes_take_turns_are_counted_as_long_as_they_are_complete():
    ends = [4, 6, 7, 11, 13, 14, 18, 20, 21]  # of batches of 4, 2 and 1
    assert [count_batches(length, [4, 2, 1]) for length in range(22)] == [
        sum(end <= length for end in ends) for length in range(22)
    ]
