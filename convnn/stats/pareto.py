"""Accuracy at a cost: the Pareto front, and the best arm at no higher cost."""

from __future__ import annotations

import math
from collections.abc import Sequence


def pareto_front(costs: Sequence[float], values: Sequence[float]) -> list[bool]:
    """Return which points no other one beats: none has at most the cost and at least the value, and one of them better.

    Points without a finite cost or value are not on the front and beat nothing. Equal points are both on it.
    """
    points = list(zip(costs, values, strict=True))
    known = [(c, v) for c, v in points if math.isfinite(c) and math.isfinite(v)]
    return [
        math.isfinite(c) and math.isfinite(v) and not any(x <= c and y >= v and (x, y) != (c, v) for x, y in known)
        for c, v in points
    ]


def best_at_cost(costs: Sequence[float], values: Sequence[float], slack: float = 0.05) -> list[int | None]:
    """Return for each point the other one with the highest value among those that cost at most ``1 + slack`` as much.

    Of equal values the cheapest; None where no other is as cheap, or a cost or value is not finite.
    """
    found: list[int | None] = []
    known = [i for i, (c, v) in enumerate(zip(costs, values, strict=True)) if math.isfinite(c) and math.isfinite(v)]
    for i, cost in enumerate(costs):
        others = [j for j in known if j != i and costs[j] <= (1 + slack) * cost] if i in known else []
        found.append(max(others, key=lambda j: (values[j], -costs[j]), default=None))
    return found
