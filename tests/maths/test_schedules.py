import pytest

from modelwright.maths.schedules import along, compute_at_steps, cubic, geometric, times_within


def test_the_cubic_schedule():
    assert [cubic(progress, 0.2, 0.8) for progress in (-1, 0, 0.5, 1, 2)] == pytest.approx([0.2, 0.2, 0.8 - 0.6 / 8, 0.8, 0.8])
    step = 1e-6
    assert (cubic(step, 0.2, 0.8) - cubic(0, 0.2, 0.8)) / step == pytest.approx(3 * 0.6, rel=1e-4)
    assert (cubic(1, 0.2, 0.8) - cubic(1 - step, 0.2, 0.8)) / step == pytest.approx(0, abs=1e-6)
    values = [cubic(n / 100, 0.0, 0.9) for n in range(101)]
    assert values == sorted(values)


def test_times_lie_evenly_from_the_beginning_and_end_at_the_end():
    spent = [step / 20 for step in range(20)]
    assert times_within(spent, 0.1, 0.8, 5) == [2, 7, 12, 16]
    assert times_within(spent, 0.0, 1.0, 8) == [0, 8, 16, 19]
    assert times_within(spent, 0.5, 0.5, 1) == [10]
    assert times_within(spent, 1.0, 1.0, 3) == [19]
    assert along(0.3, 0.1, 0.5) == pytest.approx(0.5)
    assert along(0.3, 0.3, 0.3) == 1.0


def test_the_geometric_schedule_falls_by_equal_factors():
    values = [geometric(0.1, 1e-4, n / 3) for n in range(4)]
    assert values == pytest.approx([0.1, 0.01, 0.001, 0.0001])


def test_steps_that_cost_the_same_spend_evenly():
    assert compute_at_steps(4, lambda spent: 7.0) == pytest.approx([0, 0.25, 0.5, 0.75])


def test_cheap_steps_spend_less():
    # Half of the compute at cost 2 and half at cost 1: one third of the steps, and two thirds of them.
    spent = compute_at_steps(3000, lambda share: 2.0 if share < 0.5 else 1.0)
    assert spent[1000] == pytest.approx(0.5, abs=1e-3)
    assert spent[2000] == pytest.approx(0.75, abs=1e-3)
