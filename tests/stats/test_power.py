"""Seeds needed against published tables of the paired t test, and against simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from convnn.stats.power import MOST_SEEDS, power_of, seeds_needed


@pytest.mark.parametrize(
    "effect, power, alpha, pairs",
    # Pairs for a two-sided paired t test, as G*Power 3.1 gives them ("means: difference between two dependent means").
    [(0.2, 0.8, 0.05, 199), (0.5, 0.8, 0.05, 34), (0.8, 0.8, 0.05, 15), (0.5, 0.9, 0.05, 44), (1.0, 0.8, 0.05, 10)],
)
def test_published_sample_sizes(effect, power, alpha, pairs):
    assert seeds_needed(effect, 1.0, power, alpha) == pairs
    assert seeds_needed(-3 * effect, 3.0, power, alpha) == pairs  # only the ratio counts


@pytest.mark.parametrize("n, effect", [(3, 2.0), (5, 1.0), (10, 0.7)])
def test_the_power_is_how_often_the_test_rejects(n, effect):
    samples = np.random.default_rng(0).normal(effect, 1, (40_000, n))
    rejected = float((stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05).mean())
    assert power_of(n, effect, 1.0) == pytest.approx(rejected, abs=0.01)


@pytest.mark.parametrize("effect, std", [(0.3, 0.5), (1.0, 0.37), (2.0, 1.9)])
def test_the_fewest(effect, std):
    n = seeds_needed(effect, std, 0.8)
    assert power_of(n, effect, std) >= 0.8 and (n == 3 or power_of(n - 1, effect, std) < 0.8)


def test_ends_of_the_scale():
    assert seeds_needed(1.0, 1e-6) == 3
    assert power_of(3, 1.0, 1e-9) == pytest.approx(1)
    assert seeds_needed(1e-3, 1.0) is None and seeds_needed(0.0281, 1.0) in range(9_000, MOST_SEEDS)
    assert seeds_needed(1.0, 0.0) is None and seeds_needed(1.0, math.nan) is None


@pytest.mark.parametrize("arguments", [(0, 1.0), (1.0, 1.0, 1.0), (1.0, 1.0, 0.8, 0.0)])
def test_what_cannot_be_asked(arguments):
    with pytest.raises(ValueError, match="effect other than 0"):
        seeds_needed(*arguments)
