"""Paired differences against scipy's test, a hand calculation, and where there is nothing to test."""

import math

import numpy as np
import pytest
from scipy import stats

from convnn.stats.paired import common_seeds, mean_interval, paired


@pytest.mark.parametrize("n", [3, 4, 10])
def test_interval_and_p_are_those_of_scipy(n):
    generator = np.random.default_rng(n)
    a, b = 80 + generator.normal(size=(2, n))
    found, oracle = paired(list(a), list(b), 0.9), stats.ttest_rel(a, b)
    low, high = oracle.confidence_interval(0.9)
    assert found.n == n and found.why_no_test is None
    assert (found.mean, found.std) == pytest.approx(((a - b).mean(), (a - b).std(ddof=1)))
    assert (found.low, found.high, found.p) == pytest.approx((low, high, oracle.pvalue))
    assert paired(list(b), list(a), 0.9).p == pytest.approx(found.p)


def test_a_hand_calculation():
    # Differences 1, 2, 3: mean 2, deviation 1, standard error 0.57735; t of 2 degrees at 97.5 % is 4.302653.
    found = paired([81.0, 82.0, 83.0], [80.0, 80.0, 80.0])
    assert (found.mean, found.std) == (2.0, 1.0)
    assert (found.low, found.high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), abs=1e-6)
    assert mean_interval(2.0, 1.0, 3) == pytest.approx((found.low, found.high))


@pytest.mark.parametrize("n, words", [(0, "no common seed"), (1, "one common seed"), (2, "2 common seeds")])
def test_no_test_below_three_seeds(n, words):
    found = paired([81.0, 85.0][:n], [80.0, 70.0][:n])
    assert found.n == n and (found.low, found.high, found.p) == (None, None, None)
    assert found.why_no_test == words
    assert math.isnan(found.mean) == (n == 0) and math.isnan(found.std) == (n < 2)


@pytest.mark.parametrize("shift", [0.0, 0.1, -3.7])
def test_equal_differences_have_no_test(shift):
    b = [60.12, 70.04, 81.3, 55.55]
    found = paired([value + shift for value in b], b)  # equal but for rounding
    assert found.std == 0 and found.mean == pytest.approx(shift)
    assert (found.low, found.high, found.p) == (None, None, None) and found.why_no_test == "4 equal differences"


def test_a_small_spread_is_one():
    assert paired([80.0, 80.01, 80.0], [70.0, 70.0, 70.0]).p < 1e-4


@pytest.mark.parametrize("a, b", [([1.0, 2.0], [1.0]), ([math.nan] * 3, [1.0] * 3), ([1.0] * 3, [math.inf] * 3)])
def test_values_that_do_not_pair_are_refused(a, b):
    with pytest.raises(ValueError, match="finite values"):
        paired(a, b)


def test_seeds_in_common_and_alone():
    assert common_seeds({0: 1.0, 2: 1.0, 5: 1.0}, {5: 2.0, 0: 2.0, 7: 2.0}) == ([0, 5], [2], [7])


def test_no_interval_of_one_value():
    assert all(map(math.isnan, mean_interval(80.0, math.nan, 1)))
