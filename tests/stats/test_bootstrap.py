"""The bootstrap over seeds and images against plain loops, its parts one at a time, and its limits."""

import time

import numpy as np
import pytest

from convnn.stats.bootstrap import crossed_bootstrap
from convnn.stats.paired import paired


def arms(seeds, images, spread, generator):
    """Correctness of two arms: images of different difficulty to each, seeds that move all images, and noise."""
    difficulty = generator.normal(0, 1.5, images)
    return [
        1.0 + difficulty + generator.normal(0, 0.7, images) + generator.normal(0, spread, (seeds, 1))
        + generator.normal(size=(seeds, images)) > 0
        for _ in range(2)
    ]  # fmt: skip


def test_only_images_vary_as_a_loop_over_resamples_does():
    """All seeds alike: what is left is the ordinary bootstrap of one row."""
    generator = np.random.default_rng(0)
    a, b = (np.tile(generator.random(300) < share, (4, 1)) for share in (0.8, 0.7))
    row = a[0].astype(float) - b[0]
    draws = [row[generator.integers(300, size=300)].mean() for _ in range(20_000)]
    found = crossed_bootstrap(a, b, resamples=20_000)
    assert found.mean == pytest.approx(row.mean())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), abs=0.003)
    above, level = np.mean(np.array(draws) > 1e-12), np.mean(np.abs(draws) <= 1e-12)
    assert found.beats == pytest.approx(above + level / 2, abs=0.01)


def test_only_seeds_vary_as_the_t_interval():
    """All images alike in each seed."""
    a = np.array([[1.0] * 50, [0.5] * 50, [0.8] * 50])
    b = np.full((3, 50), 0.2)
    found, exact = crossed_bootstrap(a, b, resamples=200_000), paired([1.0, 0.5, 0.8], [0.2] * 3)
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high), rel=0.04)
    assert found.beats == pytest.approx(1 - exact.p / 2, abs=0.002)


def test_the_variance_is_that_of_the_parts():
    """Against the two-way layout by plain loops, with many seeds so that the t distribution is the normal one."""
    a, b = arms(40, 200, 0.3, np.random.default_rng(3))
    d = a.astype(float) - b
    rows, columns, mean = d.mean(1), d.mean(0), d.mean()
    left = sum((d[s, i] - rows[s] - columns[i] + mean) ** 2 for s in range(40) for i in range(200)) / (39 * 199)
    variance = rows.var(ddof=1) / 40 + columns.var(ddof=1) / 200 - left / 8000
    found = crossed_bootstrap(a, b, level=0.6827, resamples=100_000)
    assert (found.high - found.low) / 2 == pytest.approx(variance**0.5, rel=0.03)


def test_wider_than_the_t_interval_over_seeds():
    a, b = arms(5, 2000, 0.1, np.random.default_rng(1))
    found = crossed_bootstrap(a, b)
    exact = paired(list(a.mean(1)), list(b.mean(1)))
    assert found.low < exact.low and exact.high < found.high
    assert found.mean == pytest.approx(exact.mean)


def test_the_same_seed_the_same_interval_and_the_other_way_round_the_mirror():
    a, b = arms(3, 100, 0.2, np.random.default_rng(2))
    assert crossed_bootstrap(a, b) == crossed_bootstrap(a, b)
    assert crossed_bootstrap(a, b, seed=1).low != crossed_bootstrap(a, b).low
    there, back = crossed_bootstrap(a, b, resamples=100_000), crossed_bootstrap(b, a, resamples=100_000)
    assert there.low == pytest.approx(-back.high, abs=0.01) and there.beats == pytest.approx(1 - back.beats, abs=0.01)


def test_arms_that_never_differ_are_undecided():
    a = np.random.default_rng(0).random((3, 50)) < 0.5
    found = crossed_bootstrap(a, a)
    assert (found.mean, found.low, found.high, found.beats) == (0, 0, 0, 0.5)


def test_images_drawn_by_value_are_images_drawn_one_by_one():
    """Permuting images changes nothing, and a level of confidence does what it says."""
    a, b = arms(3, 60, 0.2, np.random.default_rng(5))
    order = np.random.default_rng(6).permutation(60)
    assert crossed_bootstrap(a[:, order], b[:, order]) == crossed_bootstrap(a, b)
    wide, narrow = crossed_bootstrap(a, b, level=0.99), crossed_bootstrap(a, b, level=0.5)
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize("a, b", [((2, 9), (2, 9)), ((3, 9), (3, 8)), ((3, 9), (4, 9)), ((3, 1), (3, 1)), ((9,), (9,))])
def test_shapes_that_are_too_small_or_do_not_pair(a, b):
    with pytest.raises(ValueError, match="two matrices"):
        crossed_bootstrap(np.ones(a), np.zeros(b))


def test_no_value_but_a_number():
    with pytest.raises(ValueError, match="finite"):
        crossed_bootstrap(np.full((3, 4), np.nan), np.zeros((3, 4)))


def test_ten_arms_of_five_seeds_and_ten_thousand_images_take_seconds():
    base, *others = (np.random.default_rng(i).random((5, 10_000)) < 0.8 for i in range(11))
    start = time.process_time()
    for other in others:
        crossed_bootstrap(other, base)
    assert time.process_time() - start < 5


def test_seeds_that_are_alike_by_chance_leave_no_certainty():
    """Every seed gains on two of 100 images, each on its own two: the rows' means have no spread."""
    b = np.zeros((5, 100))
    a = b.copy()
    for seed in range(5):
        a[seed, 2 * seed : 2 * seed + 2] = 1
    found = crossed_bootstrap(a, b)
    assert found.mean == pytest.approx(0.02) and found.low < 0.01 and found.high > 0.03 and found.beats < 1
