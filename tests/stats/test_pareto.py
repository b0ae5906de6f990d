"""Fronts and matches against a hand-made case and plain definitions."""

import math
import random

from convnn.stats.pareto import best_at_cost, pareto_front

COSTS, VALUES = [1, 2, 3, 3, 5, 5], [70, 80, 75, 82, 82, 90]


def test_a_hand_made_front():
    assert pareto_front(COSTS, VALUES) == [True, True, False, True, False, True]


def test_random_points_by_the_definition():
    random.seed(0)
    points = [(random.randrange(9), random.randrange(9)) for _ in range(60)]
    front = pareto_front(*zip(*points, strict=True))
    for (c, v), on in zip(points, front, strict=True):
        beaten = any((x < c and y >= v) or (x <= c and y > v) for x, y in points)
        assert on != beaten


def test_points_without_a_number_are_neither_on_the_front_nor_beat_others():
    assert pareto_front([math.nan, 2, 1], [99, 80, math.nan]) == [False, True, False]
    assert best_at_cost([math.nan, 2, 1], [99, 80, math.nan]) == [None, None, None]


def test_the_best_other_at_the_same_cost():
    assert best_at_cost(COSTS, VALUES) == [None, 0, 3, 1, 5, 3]


def test_five_percent_dearer_is_the_same_cost():
    assert best_at_cost([100, 104.9], [70, 80]) == [1, 0]
    assert best_at_cost([100, 105.1], [70, 80]) == [None, 0]
    assert best_at_cost([100, 105.1], [70, 80], slack=0.1) == [1, 0]


def test_of_equal_values_the_cheapest():
    assert best_at_cost([1, 2, 3], [80, 80, 90])[2] == 0
