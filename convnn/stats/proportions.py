"""Shares of one set of images: the interval of an accuracy, and of the difference of two on the same images."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np


def wilson_interval(right: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return E. B. Wilson's interval (1927) of a share, as shares of 1: it holds also near 0 and 1; NaN for n = 0.

    Args:
        right: images that count.
        n: all images.
        level: of the interval.

    Raises:
        ValueError: unless 0 <= right <= n.
    """
    if not 0 <= right <= n:
        raise ValueError(f"{right} of {n} is no share")
    if n == 0:
        return math.nan, math.nan
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = right / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    return (low if right else 0.0), (high if right < n else 1.0)  # which rounding would miss


def paired_share_difference(a: Any, b: Any, level: float = 0.95) -> tuple[float, float, float]:
    """Return the difference of two shares on the same images, ``a`` less ``b``, and its interval, as shares of 1.

    The interval is that of D. G. Bonett and R. M. Price (2012): Wald's, with one image more of either kind that the two
    tell apart. It speaks of new images, the models fixed, and has a width also where no image tells them apart.

    Args:
        a: (images,) of booleans: whether the first has the image right.
        b: the same images of the second.
        level: of the interval.

    Raises:
        ValueError: if the two are not as many, or none.
    """
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise ValueError(f"needs two rows of as many images, not {a.shape}, {b.shape}")
    n = len(a)
    gained, lost = int((a & ~b).sum()), int((b & ~a).sum())
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    z = NormalDist().inv_cdf((1 + level) / 2)
    half = z * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return (gained - lost) / n, max(up - down - half, -1.0), min(up - down + half, 1.0)
