"""Areas under the accuracy-parallelism curve, against sums by hand."""

import math

import pytest

from evaluation.reporting.parallelism import Point, accuracy_under_parallelism, area, curve


def point(accuracy: float, parallelism: float) -> Point:
    return Point(accuracy=accuracy, parallelism=parallelism)


def test_area_of_one_point_is_its_rectangle():
    assert area([point(0.7, 1.0)]) == pytest.approx(0.7)
    assert area([point(0.7, 2.0)]) == pytest.approx(1.4)


def test_area_by_trapezoids_in_any_order():
    """1 x 0.8, then (2 - 1) x 0.7, then (4 - 2) x 0.4."""
    points = [point(0.2, 4.0), point(0.8, 1.0), point(0.6, 2.0)]
    assert area(points) == pytest.approx(0.8 + 0.7 + 0.8)


def test_of_two_at_one_speed_the_more_accurate_counts():
    assert curve([point(0.3, 1.0), point(0.5, 1.0)]) == [point(0.5, 1.0)]


def test_aup_by_hand():
    """The point at 0.74 loses more than 5 points against the slowest and is left out; weights are
    exp(-3 (1 - y / y_max))."""
    points = [point(0.80, 1.0), point(0.78, 2.0), point(0.74, 3.0)]
    low, high = 0.80 * math.exp(-3 * (1 - 0.8 / 0.9)), 0.78 * math.exp(-3 * (1 - 0.78 / 0.9))
    assert accuracy_under_parallelism(points, 0.9) == pytest.approx(0.8 + (low + high) / 2)


def test_aup_without_loss_is_the_area():
    points = [point(0.8, 1.0), point(0.8, 3.0)]
    assert accuracy_under_parallelism(points, 0.8) == pytest.approx(area(points)) == 0.8 * 3


def test_nothing_right_anywhere():
    assert accuracy_under_parallelism([point(0.0, 1.0), point(0.0, 2.0)], 0.0) == 0.0


def test_no_points():
    with pytest.raises(ValueError, match="at least one point"):
        area([])
