"""Two arms over common seeds: the mean difference, its t interval and the paired t test."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEAST_SEEDS = 3
"""Common seeds below which there is no test: with two, the t interval is 12.7 standard errors wide on either side."""
EQUAL = 1e-9
"""Points within which differences count as equal, so that rounding is not taken for spread."""


@dataclass(frozen=True)
class Paired:
    """The differences of two arms over their common seeds, in the unit of the values."""

    n: int
    """Common seeds."""
    mean: float
    """NaN without a common seed."""
    std: float
    """Sample standard deviation of the differences; NaN for fewer than two."""
    low: float | None = None
    high: float | None = None
    """The t interval of the mean with n - 1 degrees of freedom; None where there is no test."""
    p: float | None = None
    """Of the two-sided paired t test that the mean is 0; None where there is no test."""
    why_no_test: str | None = None
    """Why there is no interval and no p: fewer than ``LEAST_SEEDS`` seeds, or differences without spread."""


def paired(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Paired:
    """Compare the values of two arms, ``a`` less ``b``, position by position.

    The interval and the test treat the test set as fixed: they say what new seeds would give on these images. They
    assume differences that are about normal over seeds.

    Args:
        a: a value a seed, such as accuracies in percent.
        b: of the same seeds in the same order.
        level: of the interval.

    Raises:
        ValueError: if the two have different lengths, or a value is not finite.
    """
    differences = np.asarray(a, float) - np.asarray(b, float) if len(a) == len(b) else None
    if differences is None or not np.isfinite(differences).all():
        raise ValueError("needs as many finite values of one arm as of the other")
    n = len(differences)
    if n == 0:
        return Paired(0, math.nan, math.nan, why_no_test="no common seed")
    mean = float(differences.mean())
    if n == 1:
        return Paired(1, mean, math.nan, why_no_test="one common seed")
    equal = float(np.ptp(differences)) <= EQUAL * max(1.0, float(np.abs(differences).max()))
    std = 0.0 if equal else float(differences.std(ddof=1))
    if n < LEAST_SEEDS:
        return Paired(n, mean, std, why_no_test=f"{n} common seeds")
    if equal:
        return Paired(n, mean, std, why_no_test=f"{n} equal differences")
    low, high = mean_interval(mean, std, n, level)
    from scipy.special import stdtr  # at once, where scipy.stats takes a second to import

    return Paired(n, mean, std, low, high, float(2 * stdtr(n - 1, -abs(mean) / (std / math.sqrt(n)))))


def common_seeds(a: Mapping[int, float], b: Mapping[int, float]) -> tuple[list[int], list[int], list[int]]:
    """Return the seeds of both arms, those of the first alone and those of the second alone, each sorted."""
    return sorted(a.keys() & b.keys()), sorted(a.keys() - b.keys()), sorted(b.keys() - a.keys())


def mean_interval(mean: float, std: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return the t interval of a mean of n values with a sample standard deviation; NaN for fewer than two values."""
    if n < 2:
        return math.nan, math.nan
    from scipy.special import stdtrit

    half = float(stdtrit(n - 1, (1 + level) / 2)) * std / math.sqrt(n)
    return mean - half, mean + half
