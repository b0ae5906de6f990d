"""How many seeds a difference needs to be seen."""

from __future__ import annotations

import math

from convnn.stats.paired import LEAST_SEEDS

MOST_SEEDS = 10_000
"""More are not counted."""


def power_of(n: int, effect: float, std: float, alpha: float = 0.05) -> float:
    """Return the chance that the two-sided paired t test of n seeds rejects, from the noncentral t distribution.

    Args:
        n: common seeds, at least two.
        effect: the true mean difference.
        std: the true standard deviation of the paired differences, in the same unit, above 0.
        alpha: level of the test.
    """
    from scipy.stats import nct, norm, t

    shift, bound = abs(effect) * math.sqrt(n) / std, float(t.isf(alpha / 2, n - 1))
    power = float(nct.sf(bound, n - 1, shift) + nct.cdf(-bound, n - 1, shift))
    # Far out nct has no value; there the normal distribution is as good.
    return power if math.isfinite(power) else float(norm.sf(bound - shift))


def seeds_needed(effect: float, std: float, power: float = 0.8, alpha: float = 0.05) -> int | None:
    """Return the fewest common seeds by which a difference of ``effect`` is found with this power.

    At least ``LEAST_SEEDS``; None if ``MOST_SEEDS`` are too few, or the standard deviation is unknown or 0. The answer
    is as good as ``std``: estimated from three seeds, it can be a fifth or four times the true one.

    Raises:
        ValueError: if the effect is 0, or power or alpha is not within (0, 1).
    """
    if effect == 0 or not 0 < power < 1 or not 0 < alpha < 1:
        raise ValueError("needs an effect other than 0, and power and alpha within (0, 1)")
    if not (math.isfinite(std) and std > 0):
        return None
    low, high = LEAST_SEEDS - 1, LEAST_SEEDS
    while power_of(high, effect, std, alpha) < power:
        low, high = high, 2 * high
        if low >= MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power_of(middle, effect, std, alpha) >= power else (middle, high)
    return high if high <= MOST_SEEDS else None
