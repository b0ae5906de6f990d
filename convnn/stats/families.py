"""Several comparisons at once: Holm's correction."""

from __future__ import annotations

from collections.abc import Sequence


def holm(p_values: Sequence[float | None], family: int | None = None) -> list[float | None]:
    """Return p values adjusted so that the chance of any false one in the family stays below the level.

    Holm's step-down: the i-th smallest (from 0) of m is multiplied by m - i, none is smaller than the one before, none
    above 1. It needs no independence, so that comparisons with one common baseline may share it. (S. Holm, A simple
    sequentially rejective multiple test procedure, 1979.)

    Args:
        p_values: of the comparisons; None, where there was no test, stays None and counts in the family.
        family: comparisons that were declared, at least as many as there are; None: those given.

    Raises:
        ValueError: if the family is smaller than what it holds, or a p value is outside [0, 1].
    """
    m = len(p_values) if family is None else family
    if m < len(p_values):
        raise ValueError(f"a family of {m} comparisons cannot hold {len(p_values)}")
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    if any(not 0 <= p <= 1 for p, _ in known):
        raise ValueError("a p value lies within [0, 1]")
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, (m - rank) * p))
        adjusted[i] = largest
    return adjusted
