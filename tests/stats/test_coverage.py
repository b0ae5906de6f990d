"""How often intervals hold the true difference, and how often a family has a false winner: seeded simulations.

A simulated run has an image right where ``level + difficulty + arm's own difficulty + seed + noise > 0``, all normal;
both arms share the images' difficulty. The true difference is known: over new seeds on these images, or over both.
docs/evidence.md has the figures that these trials print with ``-s``.
"""

import numpy as np
import pytest
from scipy.stats import norm

from convnn.stats.bootstrap import crossed_bootstrap
from convnn.stats.families import holm
from convnn.stats.paired import paired

pytestmark = pytest.mark.slow
SWEEPS = 2000
LEVELS = (1.0, 1.1)
HARD, OWN = 1.5, 0.7
"""Standard deviations of an image's difficulty: to both arms, and to one of them beside it; of noise 1."""


def sweep(generator, seeds, images, spread):
    """Return correctness (seeds, images) of two arms, and their true difference on these images and on all."""
    difficulty = generator.normal(0, HARD, images)
    right, here = [], []
    for level in LEVELS:
        ease = level + difficulty + generator.normal(0, OWN, images)
        right.append(ease + generator.normal(0, spread, (seeds, 1)) + generator.standard_normal((seeds, images)) > 0)
        here.append(norm.cdf(ease / np.hypot(1, spread)).mean())
    everywhere = [norm.cdf(level / np.sqrt(1 + HARD**2 + OWN**2 + spread**2)) for level in LEVELS]
    return *right, here[0] - here[1], everywhere[0] - everywhere[1]


def resampled_twice(a, b, generator, resamples=500):
    """The interval that ``crossed_bootstrap`` is not: rows and columns of the matrix resampled together."""
    d = a.astype(np.int64) - b
    patterns, counts = np.unique(d, axis=1, return_counts=True)
    rows = generator.multinomial(len(d), [1 / len(d)] * len(d), resamples) / len(d)
    columns = generator.multinomial(d.shape[1], counts / d.shape[1], resamples) / d.shape[1]
    return np.quantile((rows @ patterns * columns).sum(1), [0.025, 0.975])


@pytest.mark.parametrize("spread", [0.02, 0.2], ids="spread{}".format)
@pytest.mark.parametrize("seeds", [3, 5, 10], ids="seeds{}".format)
def test_coverage(seeds, spread):
    """2,000 sweeps: seeds that move a run's accuracy by less than its images' noise, and seeds that move it by more."""
    generator = np.random.default_rng(seeds)
    held = np.zeros(4)
    for i in range(SWEEPS):
        a, b, here, everywhere = sweep(generator, seeds, 300, spread)
        t, boot = paired(list(a.mean(1)), list(b.mean(1))), crossed_bootstrap(a, b, resamples=1000, seed=i)
        low, high = resampled_twice(a, b, generator) if i % 4 == 0 else (1, 0)
        t_low, t_high = (t.mean, t.mean) if t.low is None else (t.low, t.high)  # equal differences: no interval
        held += [
            t_low <= here <= t_high, t_low <= everywhere <= t_high, boot.low <= everywhere <= boot.high,
            low <= everywhere <= high,
        ]  # fmt: skip
    fixed, t_new, both, twice = 100 * held / [SWEEPS, SWEEPS, SWEEPS, SWEEPS / 4]
    print(
        f"\n{seeds} seeds, spread {spread}: t on these images {fixed:.1f} %, t on new images {t_new:.1f} %, "
        f"bootstrap {both:.1f} %, rows and columns resampled together {twice:.1f} %"
    )
    assert 93.5 <= fixed <= 96.5
    assert 93.5 <= both <= 98.5


@pytest.mark.parametrize("seeds", [3, 5, 10], ids="seeds{}".format)
def test_no_false_winner_in_a_family_of_27_comparisons(seeds):
    """28 equal arms over common seeds, 27 of them less the first one: the differences share the baseline's noise."""
    generator = np.random.default_rng(seeds)
    corrected = plain = 0
    for _ in range(SWEEPS):
        accuracy = 80 + generator.normal(0, 0.3, seeds) + generator.normal(0, 0.4, (28, seeds))
        p = [paired(arm, accuracy[0]).p for arm in accuracy[1:]]
        corrected += min(holm(p)) < 0.05
        plain += min(p) < 0.05
    print(
        f"\n{seeds} seeds: a false winner in {100 * corrected / SWEEPS:.1f} %, uncorrected {100 * plain / SWEEPS:.1f} %"
    )
    assert corrected <= 0.05 * SWEEPS < plain
