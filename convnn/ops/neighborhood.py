"""The neighbours that a layer chose, for inspection: token indices, weights and positions.

Shapes: B batch, H heads, Q queries, N tokens, K neighbours, D channels per head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convnn.ops.aggregation import with_own_scores
from convnn.ops.geometry import Geometry, Pair
from convnn.ops.selection import select_neighbors
from convnn.ops.settings import Mixing, Selection
from convnn.ops.similarity import pair_similarity
from convnn.ops.subsets import same_subsets


@dataclass(frozen=True)
class Neighborhood:
    """The neighbours of every query of a layer, best first."""

    index: Tensor
    """Token indices (B, H, Q, K) int64 in the layer's own token grid: prefix tokens first, then the grid with its
    zero padding in raster order, see ``geometry``. Sorted by rank, whatever ``slots`` the layer uses."""
    valid: Tensor
    """False where a query has fewer than K neighbours, (B, H, Q, K) bool."""
    weights: Tensor | None
    """Weights of the neighbours, after the softmax if there is one, (B, H, Q, K); 0 where not valid. None: all equal
    (``weighting=ones``). Learned weights per slot are not in them."""
    geometry: Geometry
    """Where the tokens and the queries are."""
    window: Pair
    """Rows and columns of the window that a convolution in the layer's place would have."""

    def cpu(self) -> Neighborhood:
        """Return the same on the CPU."""
        weights = None if self.weights is None else self.weights.cpu()
        return replace(self, index=self.index.cpu(), valid=self.valid.cpu(), weights=weights)

    @property
    def queries(self) -> Tensor:
        """The token at each query's own position: (Q,) int64."""
        return self.geometry.query_index(self.index.device)

    @property
    def on_grid(self) -> Tensor:
        """Which neighbours are valid and, like their query, no prefix tokens: (B, H, Q, K) bool."""
        prefix = self.geometry.prefix
        return self.valid & (self.index >= prefix) & (self.queries >= prefix)[:, None]

    @property
    def is_prefix(self) -> Tensor:
        """Which neighbours are prefix tokens such as CLS: (B, H, Q, K) bool."""
        return self.valid & (self.index < self.geometry.prefix)

    @property
    def is_padding(self) -> Tensor:
        """Which neighbours are zero padding: (B, H, Q, K) bool."""
        inside = torch.zeros(self.geometry.num_tokens, dtype=torch.bool, device=self.index.device)
        inside[: self.geometry.prefix] = True
        inside[self.geometry.inner_tokens(inside.device)] = True
        return self.valid & ~inside[self.index]

    def offsets(self) -> tuple[Tensor, Tensor]:
        """Return how many rows and columns each neighbour lies from its query: twice (B, H, Q, K) int64.

        Meaningless where ``on_grid`` is False.
        """
        rows, cols = self.geometry.coordinates(self.index)
        own = (t[:, None] for t in self.geometry.coordinates(self.queries))
        return tuple(other - mine for other, mine in zip((rows, cols), own, strict=True))  # type: ignore[return-value]

    def distance(self) -> Tensor:
        """Return the Euclidean distance to each neighbour in tokens, (B, H, Q, K) float32; NaN off the grid."""
        rows, cols = (t.float() for t in self.offsets())
        return (rows.square() + cols.square()).sqrt().masked_fill(~self.on_grid, torch.nan)

    def in_window(self) -> Tensor:
        """Return which neighbours lie in the convolution window around their query: (B, H, Q, K) bool."""
        inside, g = self.on_grid, self.geometry
        own = g.coordinates(self.queries)
        for axis, delta in enumerate(self.offsets()):
            step, taps, margin = g.dilation[axis], self.window[axis], g.margin[axis]
            before = (taps - 1) // 2  # an even window has its longer side behind the query
            if margin:  # near the edge the window's centre lies further inside than the query, see Geometry.margin
                here = own[axis][:, None]
                delta = delta + here - g.window_centre(axis, here)
            inside = inside & (delta % step == 0) & (delta >= -step * before) & (delta < step * (taps - before))
        return inside


@torch.no_grad()
def find_neighborhood(
    q: Tensor,
    k: Tensor,
    geometry: Geometry,
    selection: Selection,
    mixing: Mixing,
    *,
    blend: float | Tensor,
    training: bool = False,
    window: Pair = (1, 1),
    seen: Geometry | None = None,
    bias: Tensor | None = None,
    blocked: Tensor | None = None,
) -> Neighborhood:
    """Return the neighbours that ``convnn.neighbor_aggregate`` with the same arguments aggregates.

    Args:
        q: queries (B, H, Q, D).
        k: keys (B, H, N, D).
        geometry: where they are, for the selection.
        selection: how neighbours are chosen; a k above the candidates is lowered to them.
        mixing: what they weigh.
        blend: 0 selects by position, 1 by features; a tensor (H,) strictly between.
        training: draw random candidates.
        window: of a convolution in this place.
        seen: geometry to report, where the layer selects on a simpler one: attention that needs no positions takes its
            tokens as one line.
        bias: as ``neighbor_aggregate``.
        blocked: as ``neighbor_aggregate``.
    """
    # By rank, since ``index`` is documented so; and fewer neighbours rather than an error.
    ranked = replace(selection, slots="rank", k_policy="clamp")
    found = select_neighbors(q, k, geometry, ranked, blend=blend, training=training, bias=bias, blocked=blocked)
    index = found.index.expand(*q.shape[:2], -1, -1)
    valid = torch.ones_like(index, dtype=torch.bool) if found.valid is None else found.valid.expand_as(index)
    weights = None
    if mixing.weighting != "ones":
        head = torch.arange(q.shape[1], device=q.device)[:, None, None]
        # Image by image: the gathered keys are the largest thing here.
        images = zip(q, k, index, strict=True)
        scores = [pair_similarity(own, keys[head, chosen], selection.similarity) for own, keys, chosen in images]
        score = torch.stack(scores)
        if bias is not None:
            score = score + bias.expand(*index.shape[:3], k.shape[2]).gather(-1, index)
        own = with_own_scores(score, index, selection.self_again, mixing.self_score)
        weights = own / mixing.temperature
        if mixing.weighting == "softmax_far":
            weights = -weights
        if mixing.weighting.startswith("softmax"):
            weights = weights.masked_fill(~valid, torch.finfo(weights.dtype).min).softmax(dim=-1)
        weights = weights.masked_fill(~valid, 0)
    return Neighborhood(index, valid, weights, seen or geometry, window)


def joined(found: Sequence[Neighborhood]) -> Neighborhood:
    """Return the neighbours of heads that were chosen one after another, along the axis of heads."""
    first = found[0]
    if len(found) == 1:
        return first
    index, valid = (torch.cat([getattr(one, name) for one in found], dim=1) for name in ("index", "valid"))
    weights = [one.weights for one in found if one.weights is not None]
    return replace(first, index=index, valid=valid, weights=torch.cat(weights, dim=1) if weights else None)


@contextmanager
def same_draws(device: torch.device) -> Iterator[None]:
    """Restore the random generators on exit, so that the code after it draws the same random numbers again."""
    with same_subsets(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        state = torch.mps.get_rng_state() if device.type == "mps" else None
        try:
            yield
        finally:
            if state is not None:
                torch.mps.set_rng_state(state)
