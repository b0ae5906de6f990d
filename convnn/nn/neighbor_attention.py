"""Self-attention over the k nearest tokens, whatever makes the queries, keys and values.

Shapes: B batch, H heads, Q queries, N tokens, K neighbours, D channels per head of queries and keys, C of values. In
most layers each token is a query; with keys of a coarser map, or queries of one, Q is not N.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnn.config.schema import ATTENTION
from convnn.nn.base import NeighborLayer, TokenGrid, grid_of
from convnn.ops.candidates import is_relative
from convnn.ops.functional import neighbor_aggregate
from convnn.ops.geometry import Geometry, Pair, QueryMap
from convnn.ops.neighborhood import Neighborhood, find_neighborhood
from convnn.ops.scores import at_end
from convnn.ops.shortcuts import attend, attends_to_all


@dataclass(frozen=True)
class Heads:
    """What attention compares and mixes."""

    q: Tensor
    """Queries (B, H, Q, D), rotated, normalised and scaled so that q.k / sqrt(D) is the layer's score."""
    k: Tensor
    """Keys (B, H, N, D)."""
    v: Tensor
    """Values (B, H, N, C)."""
    bias: Tensor | None = None
    """Added to the scores, broadcastable to (B, H, Q, N)."""
    blocked: Tensor | None = None
    """True for tokens that a query must not see, broadcastable to (B, H, Q, N)."""
    grid: Pair | None = None
    """Rows and columns of the tokens after the prefix, where the input or the layer tells them."""
    queries: QueryMap | None = None
    """Where the queries are, if they are none of the tokens and that is known."""
    head: int | None = None
    """Which of the layer's heads this is, where they come one after another; None: all are here."""
    rest: Any = None
    """What an adapter's ``write`` needs besides, such as the shape of the input."""

    @property
    def apart(self) -> bool:
        """Whether the queries are not the tokens themselves."""
        return self.queries is not None or self.q.shape[2] != self.k.shape[2]


class NeighborAttention(NeighborLayer):
    """The part of an attention layer between its projections: (queries, keys, values) -> (B, H, N, C)."""

    num_heads: int
    head_dim: int
    """Of the values."""
    num_prefix_tokens: int
    grid_size: Pair | None
    token_grid: TokenGrid | None
    """Where a swap has put the layer behind a patch embedding: what that saw last."""
    fast: bool
    aggregation: str
    slot_weight: nn.Parameter | None
    pointwise: nn.Linear | None
    attn_drop: nn.Dropout

    def _init_attention(self, num_heads: int, settings: dict[str, Any]) -> None:
        """Check the settings and start where they say, before any part is made."""
        self._init_spectrum(ATTENTION, num_heads, settings)
        self.num_heads, self.token_grid = num_heads, None
        self.border, self.layout = self.settings.border, self.settings.layout
        self.aggregation = self.settings.aggregation

    def _init_slots(self, head_dim: int, attn_drop: float) -> None:
        """Make the dropout and the weights of the slots; ``reset_slots`` fills them."""
        d, k = head_dim, self.k_max
        self.head_dim = d
        self.attn_drop = nn.Dropout(attn_drop)
        shape = {"depthwise": (d, k), "separable": (d, k), "conv": (d, d, k)}.get(self.aggregation)
        self.slot_weight = nn.Parameter(torch.empty(shape)) if shape else None
        self.pointwise = nn.Linear(d, d, bias=False) if self.aggregation == "separable" else None

    @torch.no_grad()
    def reset_slots(self, preserve: bool = False) -> None:
        """Draw the slot weights anew: depthwise ones, others as ``nn.Conv1d``.

        ``preserve`` makes every kind of aggregation the sum.
        """
        weight = self.slot_weight
        if weight is None:
            return
        if self.aggregation == "depthwise" or (preserve and self.aggregation == "separable"):
            weight.fill_(1)
        elif preserve:
            weight.copy_(torch.eye(self.head_dim)[..., None].expand_as(weight))
        else:
            nn.init.kaiming_uniform_(weight if weight.ndim == 3 else weight[:, None], a=math.sqrt(5))
        if self.pointwise is not None:
            nn.init.eye_(self.pointwise.weight) if preserve else self.pointwise.reset_parameters()

    def _grid(self, num_tokens: int, grid: Pair | None) -> Pair:
        """Return rows and columns of the tokens after the prefix: ``grid``, if the call itself tells."""
        if grid is not None and grid[0] * grid[1] == num_tokens - self.num_prefix_tokens:
            return grid
        return grid_of(num_tokens, self.num_prefix_tokens, self.grid_size, self.token_grid)

    def geometry(self, num_tokens: int, grid: Pair | None = None) -> Geometry:
        """Return the grid of a sequence of this length.

        Args:
            num_tokens: N.
            grid: rows and columns, where the input tells them.

        Raises:
            ValueError: if the tokens after the prefix are neither ``grid_size`` nor a square.
        """
        if self.layout == "sequence":
            return Geometry(1, num_tokens, dilation=(1, self.settings.token_dilation))
        height, width = self._grid(num_tokens, grid)
        radius, step = math.isqrt(self.k_max) // 2, self.settings.token_dilation
        prefix, dilation = self.num_prefix_tokens, (step,) * 2
        if self.border == "zeros":
            side, ring = (2 * radius + 1,) * 2, (step * radius,) * 2
            return Geometry(height, width, kernel=side, padding=ring, dilation=dilation, prefix=prefix)
        if self.border == "shift" and step > 1 and (2 * radius + 1) * step > min(height, width):
            raise ValueError(
                f"a {2 * radius + 1} wide window with token_dilation={step} does not fit into a {height}x{width} grid; "
                "lower k or token_dilation"
            )
        margin = (radius,) * 2 if self.border == "shift" else (0, 0)
        return Geometry(height, width, dilation=dilation, prefix=prefix, margin=margin)

    def layout_of(self, num_tokens: int, grid: Pair | None = None) -> Geometry:
        """Return where the tokens of a sequence of this length lie, as far as this layer cares."""
        if self.layout == "grid" and self._is_placeless():
            return Geometry(1, num_tokens - self.num_prefix_tokens, prefix=self.num_prefix_tokens)
        return self.geometry(num_tokens, grid)

    def _is_placeless(self) -> bool:
        """Return whether a plain sequence of any length will do: no positions, and no grid of candidates."""
        relative = is_relative(self.selection)
        whole = self.selection.candidates in ("all", "random") and self.border != "zeros" and not relative
        return at_end(self.blend_value(), 1) and whole

    def layout_for(self, heads: Heads, placed: bool = False) -> Geometry:
        """Return where tokens and queries lie, as far as this layer cares, or all the same if ``placed``.

        Raises:
            ValueError: for queries that are no tokens: if the settings need a query's own token, or positions that are
                not known.
        """
        n, prefix = heads.k.shape[2], self.num_prefix_tokens
        if not heads.apart:
            return self.geometry(n, heads.grid) if placed else self.layout_of(n, heads.grid)
        reason = self._needs_own_token()
        if reason:
            raise ValueError(f"{reason} needs queries that are tokens, and this layer's are on a map of their own")
        if self._is_placeless() and not placed:
            line = QueryMap((1, heads.q.shape[2] - prefix), (0, 0), (0, 0))
            return Geometry(1, n - prefix, prefix=prefix, queries=line)
        if heads.queries is None:
            raise ValueError(
                f"where the {heads.q.shape[2]} queries of this layer lie among its {n} tokens is not known; use "
                "settings without positions (blend=1 with candidates=all or random)"
            )
        return Geometry(*self._grid(n, heads.grid), prefix=prefix, queries=heads.queries)

    def _needs_own_token(self) -> str | None:
        """Return the setting that has no meaning for queries that are no tokens, or None."""
        s, mixing, layout = self.selection, self.mixing, self.settings
        names = {
            "self_first=true": s.self_first or mixing.self_score is not None or s.self_again is not None,
            "causal=true": s.causal,
            "candidates=stride": s.candidates == "stride",
            "slots=window": s.slots == "window",
            "mix=concat": s.mix == "concat" and not self._is_placeless(),
            f"border={self.border}": self.border != "nearest",
            "layout=sequence": self.layout == "sequence",
            f"token_dilation={layout.token_dilation}": layout.token_dilation > 1,
        }
        return next((name for name, given in names.items() if given), None)

    def _blend_of(self, heads: Heads, blend: float | None = None) -> float | Tensor:
        """Return the blend of these heads, or the one that is given."""
        value = self.blend_value() if blend is None else float(blend)
        if isinstance(value, float) or heads.head is None or value.numel() == 1:
            return value
        return value[heads.head : heads.head + 1]

    def _pads(self) -> bool:
        blend = self.blend_value()
        return self.selection.pad_candidates or not (isinstance(blend, float) and blend == 1)

    def is_fused(self, geometry: Geometry) -> bool:
        """Return whether fused attention computes this layer: if all candidates are neighbours and order is lost."""
        return self.fast and attends_to_all(geometry, self.selection, self.mixing, pads=self._pads())

    def last_call(self, x: Tensor) -> tuple[int, Geometry]:
        """Return how many sequences one image was, which with windows are many, and their geometry."""
        return 1, self.layout_of(x.shape[1])

    def _choose(self, heads: Heads, blend: float | None) -> Neighborhood:
        """Return the neighbours, at the layer's own blend or another."""
        geometry = self.layout_for(heads, placed=blend is not None)
        seen = geometry
        placed = heads.queries is not None or not heads.apart
        if placed and not any(geometry.padding) and geometry.height == 1:  # on a line, as far as the selection cares
            try:
                size = self._grid(heads.k.shape[2], heads.grid)
                step = self.settings.token_dilation if self.layout == "grid" else 1
                own = {"dilation": (step, step), "queries": heads.queries}
                seen = Geometry(*size, prefix=self.num_prefix_tokens, **own)  # type: ignore[arg-type]
            except ValueError:
                pass
        heads = ringed(heads, geometry)
        found = find_neighborhood(
            heads.q,
            heads.k,
            geometry,
            self.selection,
            self.mixing,
            blend=self._blend_of(heads, blend),
            training=self.training,
            seen=seen,
            bias=heads.bias,
            blocked=heads.blocked,
        )
        limit = self.k_max
        if found.index.shape[-1] < self.k:  # clamped: a window of the neighbours there are
            limit = min(limit, int(found.on_grid.sum(-1).amax()))
        side = 2 * (math.isqrt(limit) // 2) + 1
        return replace(found, window=(side, side))

    def _aggregate(self, heads: Heads, geometry: Geometry) -> Tensor:
        """Return what the queries get from their neighbours, (B, H, Q, C)."""
        heads = ringed(heads, geometry)
        weights = self.settings.dropout_on == "weights"
        drop = self.attn_drop.p if self.training and weights else 0.0
        parts = heads.q, heads.k, heads.v
        if self.is_fused(geometry):
            y = attend(
                *parts,
                geometry,
                self.selection,
                pads=self._pads(),
                temperature=self.mixing_value().temperature,
                dropout=drop,
                bias=heads.bias,
                blocked=heads.blocked,
            )
        else:
            y = neighbor_aggregate(
                *parts,
                geometry,
                self.selection,
                self.mixing_value(),
                blend=self._blend_of(heads),
                weight=self.slot_weight,
                dropout=drop,
                training=self.training,
                bias=heads.bias,
                blocked=heads.blocked,
            )
        if self.pointwise is not None:
            y = self.pointwise(y)
        return y if weights else self.attn_drop(y)

    def _lacks_plain(self, tokens: int | None) -> str | None:
        """Return why these neighbours are not all of so many tokens, weighed by plain attention, or None: they are."""
        s = self.selection
        plain = self.mixing.weighting == "softmax" and s.similarity == "dot" and self.border == "nearest"
        plain = plain and self.mixing.self_score is None and s.self_again is None
        plain = plain and not s.causal and s.rank_step == 1
        if not plain or s.candidates != "all" or self.aggregation in ("conv", "separable"):
            return f"it is no self-attention: {self._spectrum_repr()}"
        if tokens is None:
            return "without grid_size it is not known how many tokens there are"
        if self.k < tokens:
            return f"k={self.k} is less than the {tokens} tokens"
        used = None if self.slot_weight is None else self.slot_weight[:, : min(self.k, tokens)]
        return "its slot weights are no longer ones" if used is not None and bool((used != 1).any()) else None


def ringed(heads: Heads, geometry: Geometry) -> Heads:
    """Return keys and values with the ring of zero tokens of a geometry, if it has one; its bias is 0."""
    if not any(geometry.padding):
        return heads
    k, v = (add_ring(t, geometry) for t in (heads.k, heads.v))
    size, more = heads.k.shape[2], (heads.bias, heads.blocked)
    bias, blocked = (
        None if t is None else add_ring(t.expand(*(1,) * (4 - t.ndim), *t.shape[:-1], size).mT, geometry).mT
        for t in more
    )
    return replace(heads, k=k, v=v, bias=bias, blocked=blocked)


def add_ring(x: Tensor, geometry: Geometry) -> Tensor:
    """Surround the grid with zero tokens: (B, H, prefix + h * w, D) -> (B, H, N, D)."""
    (ph, pw), prefix = geometry.padding, geometry.prefix
    grid = x[:, :, prefix:].unflatten(2, (geometry.height, geometry.width))
    return torch.cat([x[:, :, :prefix], F.pad(grid, (0, 0, pw, pw, ph, ph)).flatten(2, 3)], dim=2)
