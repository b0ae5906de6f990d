"""Two arms as a sample of seeds and of test images: the interval of their difference, and the chance that one leads.

The differences of correctness, seeds × images, are crossed: every seed sees the same images, and both arms the same
seeds and images. Their mean then varies by three parts: the seeds', the images', and what is left of each pair of seed
and image. Resampling rows and columns of the matrix together, as is often done, counts the last part three times and
the seeds' part (n - 1) / n times, and its percentiles have no regard for n being 3 or 5 (A. B. Owen, The pigeonhole
bootstrap, 2007; P. McCullagh, Resampling and exchangeable arrays, 2000). Hence each part here has its own draws:

* images: the columns' means are resampled, and their spread shrunk by the part that the seeds' spread holds already;
* seeds: the mean moves by the seeds' standard error times a draw from the t distribution with n - 1 degrees of freedom.
  Three seeds have but ten resamples, whose percentiles are the extremes; the t distribution is what they stand in for.

Without spread between images the interval is that of ``convnn.stats.paired``; it is never meant to be narrower.
``tests/stats/test_coverage.py`` measures how often it holds the true difference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from convnn.stats.paired import LEAST_SEEDS


@dataclass(frozen=True)
class Crossed:
    """The difference of two arms' accuracies over seeds and images, as a share of 1 (not in percent)."""

    seeds: int
    images: int
    mean: float
    low: float
    high: float
    """The interval: the percentiles of the draws."""
    beats: float
    """Share of the draws in which the first arm's accuracy, averaged over seeds and images, is above the second's;
    draws of exactly 0 count half. It speaks of the means over new seeds and new images, not of two single runs, and is
    no p value; two arms that never differ have 0.5."""


def crossed_bootstrap(a: Any, b: Any, level: float = 0.95, resamples: int = 4000, seed: int = 0) -> Crossed:
    """Compare two arms, ``a`` less ``b``, from which images each run has right.

    Args:
        a: (seeds, images) of booleans or numbers, such as ``predicted == label``.
        b: the same seeds and images of the other arm, in the same order.
        level: of the interval.
        resamples: draws.
        seed: of the draws; the same one gives the same interval.

    Raises:
        ValueError: if the shapes differ, there are fewer than ``LEAST_SEEDS`` seeds or 2 images, or a value is not
            finite.
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.ndim != 2 or a.shape != b.shape or a.shape[0] < LEAST_SEEDS or a.shape[1] < 2:
        raise ValueError(
            f"needs two matrices of the same {LEAST_SEEDS} or more seeds and 2 or more images, not {a.shape}, {b.shape}"
        )
    difference = np.subtract(a, b, dtype=np.float32)
    seeds, images = difference.shape
    rows, columns = difference.mean(1, dtype=float), difference.mean(0, dtype=float)
    mean = float(rows.mean())
    if not math.isfinite(mean):
        raise ValueError("needs finite values")
    generator = np.random.default_rng(seed)
    left = _left(difference, rows, columns)
    spread = float(rows.var(ddof=1))
    if spread < 1e-18:  # rows alike by chance: what is left of each pair of seed and image tells their variance
        spread = left / images
    error = math.sqrt(spread / seeds)
    moved = error * generator.standard_t(seeds - 1, resamples)
    moved += _share_of_images(columns, left / seeds) * _resampled(columns, resamples, generator)
    draws = mean + moved
    draws[np.abs(draws) < 1e-12] = 0.0  # what rounding leaves of nothing
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    beats = float((draws > 0).mean() + (draws == 0).mean() / 2)
    return Crossed(seeds, images, mean, float(low), float(high), beats)


def _resampled(columns: np.ndarray, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """Return by how much the mean of resampled images differs from that of all, once a resample.

    Images of one value are alike, so that it is enough to draw how many there are of each value.
    """
    values, counts = np.unique(columns.round(9), return_counts=True)
    drawn = generator.multinomial(len(columns), counts / len(columns), resamples)
    moved: np.ndarray = drawn @ values / len(columns) - float(counts @ values) / len(columns)
    return moved


def _share_of_images(columns: np.ndarray, left: float) -> float:
    """Return the factor for the images' draws, so that what a seed does on an image alone is counted once.

    The variance of the columns' means holds the images' part and, averaged over seeds, what is ``left``; the rows'
    draws hold the latter.
    """
    own = float(columns.var(ddof=1))
    return math.sqrt(max(0.0, 1 - left / own)) if own else 0.0


def _left(difference: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> float:
    """Return the variance that is left of each pair of seed and image, from the sums of squares of a two-way layout."""
    seeds, images = difference.shape
    total = float(np.square(difference, dtype=float).sum()) - seeds * images * float(rows.mean()) ** 2
    left = total - images * float(rows.var()) * seeds - seeds * float(columns.var()) * images
    return max(left, 0.0) / ((seeds - 1) * (images - 1))
