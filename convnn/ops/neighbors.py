"""The neighbours of each query, as the selection hands them to the aggregation.

Shapes: B batch, H heads, Q queries, N tokens, M candidates, K neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Neighbors:
    """The neighbours of each query. B and H are 1 where the choice depends on the geometry alone."""

    index: Tensor
    """Token indices, (B, H, Q, K) int64."""
    valid: Tensor | None = None
    """False where a query has fewer than K candidates (``window``, ``stride``), (B, H, Q, K); None: nowhere."""
    low: Tensor | None = None
    """Least and largest similarity among the candidates of each query, (B, H, Q, 1), where ``mix=sum`` needs them;
    ``high`` is infinite where all are alike."""
    high: Tensor | None = None
    candidates: Tensor | None = None
    """The tokens that were candidates of any query, (M,); None: all."""


def join(a: Neighbors, b: Neighbors) -> Neighbors:
    """Return the neighbours of prefix queries followed by those of grid queries."""
    size = torch.broadcast_shapes(a.index.shape[:2], b.index.shape[:2])

    def cat(x: Tensor | None, y: Tensor | None) -> Tensor | None:
        if x is None or y is None:
            return None
        return torch.cat([t.expand(*size, -1, -1) for t in (x, y)], dim=2)

    index = cat(a.index, b.index)
    assert index is not None
    return Neighbors(index, cat(a.valid, b.valid), cat(a.low, b.low), cat(a.high, b.high))
