"""Intervals of accuracies and of their differences on the same images."""

import math

import numpy as np
import pytest

from convnn.stats.proportions import paired_share_difference, wilson_interval


def test_wilson_solves_the_equation_that_defines_it():
    for right, n in ((0, 10), (3, 10), (81, 263), (1000, 1000)):
        for bound in wilson_interval(right, n):
            z = abs(right / n - bound) / math.sqrt(bound * (1 - bound) / n) if 0 < bound < 1 else 1.959964
            assert z == pytest.approx(1.959964, abs=1e-5)
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe (1998), table I
    assert math.isnan(wilson_interval(0, 0)[0])
    with pytest.raises(ValueError, match="no share"):
        wilson_interval(4, 3)


def test_a_paired_difference_counts_what_the_two_tell_apart():
    a, b = np.array([1] * 6 + [0] * 4, bool), np.array([1] * 4 + [0] * 5 + [1], bool)
    difference, low, high = paired_share_difference(a, b)
    assert difference == pytest.approx(0.1)
    up, down = 3 / 12, 2 / 12
    half = 1.959964 * math.sqrt((up + down - (up - down) ** 2) / 12)
    assert (low, high) == pytest.approx((up - down - half, up - down + half), abs=1e-6)
    same = paired_share_difference(a, a)
    assert same[0] == 0 and same[1] == -same[2] < 0
    with pytest.raises(ValueError, match="as many images"):
        paired_share_difference(a, b[:-1])


@pytest.mark.parametrize(("up", "down"), [(0.02, 0.02), (0.1, 0.03), (0.003, 0.0)])
def test_the_intervals_hold_the_truth_as_often_as_they_say(up, down):
    rng = np.random.default_rng(0)
    hits, n, trials = 0, 400, 400
    for _ in range(trials):
        kind = rng.choice(3, n, p=[up, down, 1 - up - down])
        _, low, high = paired_share_difference(kind != 1, kind != 0)
        hits += low <= up - down <= high
    assert hits / trials > 0.92
