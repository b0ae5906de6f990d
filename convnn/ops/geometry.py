"""Positions: the zero-padded feature map, the output positions (queries) on it, prefix tokens, and distances.

Shapes: N tokens (prefix first, then the padded grid in raster order), Q queries (prefix first, then the output grid).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from convnn.ops.precision import has_float64
from convnn.ops.topk import stable_argsort

Pair = tuple[int, int]
LEAN = 0.25
"""Of a step, by which distances lean to the longer side of a window with an even number of taps. Anything between 0 and
one half makes the nearest tokens of a 4 x 4 window, in their order, a 1 x 1, a 2 x 2, a 3 x 3 and the 4 x 4 window; at
one half the query's own token would be no nearer than the next."""


def same_padding(height: int, width: int, kernel: Pair, stride: Pair, dilation: Pair) -> tuple[Pair, Pair]:
    """Return the padding that makes an output as large as the map over the stride, TensorFlow's "SAME".

    Returns:
        Zeros on each side, and those besides at the bottom and the right: see ``Geometry.padding`` and ``extra``.
    """
    totals = [
        max((-(-side // s) - 1) * s + (m - 1) * d + 1 - side, 0)
        for side, m, s, d in zip((height, width), kernel, stride, dilation, strict=True)
    ]
    return (totals[0] // 2, totals[1] // 2), (totals[0] % 2, totals[1] % 2)


@dataclass(frozen=True)
class QueryMap:
    """Queries on a map of their own, over the tokens of another: rows and columns are counted in those tokens."""

    size: Pair
    """Rows and columns of the queries."""
    first: tuple[float, float]
    """Row and column of the first query: (0, 0) is the middle of the first token."""
    step: tuple[float, float]
    """Rows and columns from one query to the next."""

    @classmethod
    def over(cls, tokens: Pair, queries: Pair) -> QueryMap:
        """Return the queries of a finer or coarser map of the same image: each in the middle of its share of it."""
        step = tokens[0] / queries[0], tokens[1] / queries[1]
        return cls(queries, ((step[0] - 1) / 2, (step[1] - 1) / 2), step)


@dataclass(frozen=True)
class Geometry:
    """A feature map with its zero padding as a grid of tokens, and the output positions as queries on some of them.

    ``kernel``, ``stride``, ``padding`` and ``dilation`` are (rows, columns) and mean what they mean for a
    convolution: the query of output pixel (i, j) is the centre of that pixel's kernel window. Of an even number of taps
    m that is tap m / 2 - 1, counted from 0: the upper left one of the middle four.
    """

    height: int
    width: int
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    prefix: int = 0
    margin: Pair = (0, 0)
    """Half the attention window where it is to stay inside the map, as in NATTEN: a query nearer to the edge than this
    measures distances from the nearest position that is this far inside, so that its window shifts inwards; in steps of
    the dilation. 0: off."""
    extra: Pair = (0, 0)
    """Rows of zeros below the padding and columns right of it, where the padding is not the same on both sides."""
    queries: QueryMap | None = None
    """Where the queries are, if no kernel puts them on tokens: then there is no kernel, padding or dilation."""

    @property
    def padded_shape(self) -> Pair:
        """Rows and columns of the map with its zero padding."""
        rows, cols = (
            side + 2 * p + e for side, p, e in zip((self.height, self.width), self.padding, self.extra, strict=True)
        )
        return rows, cols

    @property
    def pads(self) -> tuple[int, int, int, int]:
        """Zeros on the left, right, top and bottom of the map, as ``F.pad`` takes them."""
        (ph, pw), (eh, ew) = self.padding, self.extra
        return pw, pw + ew, ph, ph + eh

    @property
    def has_ring(self) -> bool:
        """Whether the map has zero padding anywhere."""
        return any(self.pads)

    @property
    def centre(self) -> Pair:
        """Row and column of the kernel's centre tap, from 0."""
        return (self.kernel[0] - 1) // 2, (self.kernel[1] - 1) // 2

    @property
    def out_shape(self) -> Pair:
        """Rows and columns of the output, as for a convolution."""
        if self.queries is not None:
            return self.queries.size
        rows, cols = (
            (side - d * (m - 1) - 1) // s + 1
            for side, m, s, d in zip(self.padded_shape, self.kernel, self.stride, self.dilation, strict=True)
        )
        return rows, cols

    @property
    def extent(self) -> int:
        """Largest Chebyshev distance on the padded map in tokens, at least 1; a blend divides distances by it."""
        return max(*self.padded_shape, 2) - 1

    @property
    def num_tokens(self) -> int:
        """N: prefix tokens and the padded grid."""
        return self.prefix + self.padded_shape[0] * self.padded_shape[1]

    @property
    def queries_on_ring(self) -> bool:
        """Whether some query sits on a token of the zero ring, which is wider than the window needs."""
        axes = zip(self.kernel, self.centre, self.padding, self.extra, self.dilation, strict=True)
        return any(p > d * c or p + e > d * (m - 1 - c) for m, c, p, e, d in axes)

    def query_index(self, device: torch.device | None = None) -> Tensor:
        """Return the token at the centre of each query's kernel window, for prefix queries themselves: (Q,) int64.

        For queries on a map of their own it is the token nearest to each, the upper left one of several.
        """
        if self.queries is not None:
            own = self._query_lines(device)
            rows, cols = (
                (line - 0.5).ceil().long().clamp(0, side - 1)
                for line, side in zip(own, (self.height, self.width), strict=True)
            )
            grid = rows[:, None] * self.width + cols + self.prefix
            return torch.cat([torch.arange(self.prefix, device=device), grid.flatten()])
        # The window of output row i starts at token i * stride; its centre tap lies so many dilated taps further.
        rows, cols = (
            torch.arange(n, device=device) * s + d * c
            for n, c, s, d in zip(self.out_shape, self.centre, self.stride, self.dilation, strict=True)
        )
        grid = rows[:, None] * self.padded_shape[1] + cols + self.prefix
        return torch.cat([torch.arange(self.prefix, device=device), grid.flatten()])

    def query_places(self, device: torch.device | None = None) -> Tensor:
        """Return what stands for each query in distances, (Q,) int64: its token, if it has one.

        Queries on a map of their own are numbered from ``num_tokens`` on, so that none is a token.
        """
        if self.queries is None:
            return self.query_index(device)
        own = torch.arange(math.prod(self.queries.size), device=device) + self.num_tokens
        return torch.cat([torch.arange(self.prefix, device=device), own])

    def _query_lines(self, device: torch.device | None) -> tuple[Tensor, Tensor]:
        """Return rows and columns of the queries of a map of their own, in tokens: float32."""
        assert self.queries is not None
        numbers = zip(self.queries.size, self.queries.first, self.queries.step, strict=True)
        rows, cols = (torch.arange(n, dtype=torch.float32, device=device) * step + at for n, at, step in numbers)
        return rows, cols

    def coordinates(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return row and column on the padded map of token indices; prefix tokens have none and must not be asked."""
        index = index - self.prefix
        return index // self.padded_shape[1], index % self.padded_shape[1]

    def query_coordinates(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return row and column of queries that ``query_places`` stands for; prefix ones have none."""
        if self.queries is None:
            return self.coordinates(places)
        rows, cols = self._query_lines(places.device)
        number = (places - self.num_tokens).clamp(min=0)
        return rows[number // len(cols)], cols[number % len(cols)]

    def positions(self, device: torch.device | None = None) -> Tensor:
        """Return column and row of every token, each from -1 to 1 over the padded map: (N, 2); prefix at 0.

        They are float64; on a device that has none, the same numbers rounded to float32.
        """
        place = device if has_float64(device) else torch.device("cpu")
        rows, cols = (torch.linspace(-1, 1, side, dtype=torch.float64, device=place) for side in self.padded_shape)
        grid = torch.stack([cols.expand(len(rows), -1), rows[:, None].expand(-1, len(cols))], dim=-1)
        found = torch.cat([grid.new_zeros(self.prefix, 2), grid.flatten(0, 1)])
        return found if has_float64(device) else found.float().to(device)

    def inner_tokens(self, device: torch.device | None = None) -> Tensor:
        """Return the tokens of the map without its zero padding, in raster order: (height * width,) int64."""
        (ph, pw), (_, cols) = self.padding, self.padded_shape
        rows = torch.arange(ph, ph + self.height, device=device)
        return (rows[:, None] * cols + torch.arange(pw, pw + self.width, device=device)).flatten() + self.prefix

    def distance(self, queries: Tensor, keys: Tensor, metric: str = "chebyshev") -> Tensor:
        """Return the distance of queries to tokens of the map: indices, broadcast against each other -> float32.

        Queries are given as ``query_places`` gives them.

        Its unit is one step of the dilation; tokens between the dilated kernel's taps are farther than all tokens on
        them. Along an axis on which the kernel has an even number of taps, it is measured from a point a quarter of a
        step behind the query (``LEAN``), towards the side with one more tap. For a kernel that is not square, rows and
        columns are scaled so that its window holds exactly the nearest tokens. Ordered by (Chebyshev distance, raster
        index), the m*m nearest tokens of a query are the m x m window in one fixed order at every position; with
        Euclidean distance that fails from 7 x 7 on.
        """
        own, other = self.query_coordinates(queries), self.coordinates(keys)
        rows, cols = (self.steps(axis, own[axis], other[axis]) for axis in (0, 1))
        return _length(rows, cols, metric)

    def distance_to_all(self, queries: Tensor, metric: str = "chebyshev") -> Tensor:
        """Return ``distance`` from queries (Q,) to every token, axis by axis: (Q, N); 0 to prefix tokens."""
        rows, cols = self.steps_to_all(queries)
        grid = _length(rows[:, :, None], cols[:, None], metric).flatten(1)
        return torch.cat([grid.new_zeros(len(grid), self.prefix), grid], dim=1) if self.prefix else grid

    def steps_to_all(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Return the distances from queries (Q,) along each axis: to rows (Q, rows) and to columns (Q, columns)."""
        own = self.query_coordinates(queries[:, None])
        every = (torch.arange(side, device=queries.device) for side in self.padded_shape)
        rows, cols = (self.steps(axis, own[axis], other) for axis, other in enumerate(every))
        return rows, cols

    def window_centre(self, axis: int, own: Tensor) -> Tensor:
        """Return the row (or column) that queries in rows ``own`` measure from: their own, or see ``margin``."""
        side, margin, d = self.padded_shape[axis], self.margin[axis], self.dilation[axis]
        if not margin:
            return own
        lane = own % d  # only tokens of one lane are whole steps apart
        last = (side - 1 - lane).div(d, rounding_mode="floor")
        step = own.div(d, rounding_mode="floor").clamp(min=margin)
        return torch.minimum(step, last - margin) * d + lane

    def steps(self, axis: int, own: Tensor, other: Tensor) -> Tensor:
        """Return the distance along one axis from queries in rows (or columns) ``own`` to tokens in ``other``."""
        d = self.dilation[axis]
        far = sum(self.padded_shape)  # more than any distance on the map
        # To the farthest tap, which is that on the longer side.
        reach = [m // 2 - (0 if m % 2 else LEAN) for m in self.kernel]
        delta = other - self.window_centre(axis, own)
        steps = (delta / d if d > 1 else delta).to(torch.float32)
        steps = (steps if self.kernel[axis] % 2 else steps - LEAN).abs()
        if d > 1:
            steps = steps + far * (delta % d != 0)
        if reach[0] != reach[1]:  # along an axis where the kernel is 1 wide, all but the query's own line is far
            # Divided by a tensor, which rounds to the nearest on every device: equal distances tie.
            steps = steps * max(reach) / steps.new_full((), reach[axis]) if reach[axis] else steps * far
        return steps


def _length(rows: Tensor, cols: Tensor, metric: str) -> Tensor:
    return torch.maximum(rows, cols) if metric == "chebyshev" else (rows.square() + cols.square()).sqrt()


def window_order(kernel: Pair) -> Tensor:
    """Return the taps of a kernel (in raster numbers), those nearest to its centre first: (kh * kw,) int64.

    Ties in Chebyshev distance (scaled as in ``Geometry.distance``) go to the lower raster index.
    """
    geometry = Geometry(kernel[0], kernel[1], kernel=kernel)
    here = torch.device("cpu")  # wherever a model is being built: these are numbers to look at
    distance = geometry.distance(geometry.query_index(here), torch.arange(geometry.num_tokens, device=here))
    return stable_argsort(distance)
