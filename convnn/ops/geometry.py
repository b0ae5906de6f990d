"""Positions: the zero-padded feature map, the output positions (queries) on it, prefix tokens, and distances.

Shapes: N tokens (prefix first, then the padded grid in raster order), Q queries (prefix first, then the output grid).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from convnn.ops.precision import has_float64

Pair = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """A feature map with its zero padding as a grid of tokens, and the output positions as queries on some of them.

    ``kernel``, ``stride``, ``padding`` and ``dilation`` are (rows, columns) and mean what they mean for a
    convolution: the query of output pixel (i, j) is the centre of that pixel's kernel window.
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

    @property
    def padded_shape(self) -> Pair:
        """Rows and columns of the map with its zero padding."""
        return self.height + 2 * self.padding[0], self.width + 2 * self.padding[1]

    @property
    def out_shape(self) -> Pair:
        """Rows and columns of the output, as for a convolution."""
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
        axes = zip(self.kernel, self.padding, self.dilation, strict=True)
        return any(p > d * (m - 1) // 2 for m, p, d in axes)

    def query_index(self, device: torch.device | None = None) -> Tensor:
        """Return the token at the centre of each query's kernel window, for prefix queries themselves: (Q,) int64."""
        # The window of output row i starts at token i * stride; its centre lies half the dilated kernel further.
        rows, cols = (
            torch.arange(n, device=device) * s + d * (m - 1) // 2
            for n, m, s, d in zip(self.out_shape, self.kernel, self.stride, self.dilation, strict=True)
        )
        grid = rows[:, None] * self.padded_shape[1] + cols + self.prefix
        return torch.cat([torch.arange(self.prefix, device=device), grid.flatten()])

    def coordinates(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return row and column on the padded map of token indices; prefix tokens have none and must not be asked."""
        index = index - self.prefix
        return index // self.padded_shape[1], index % self.padded_shape[1]

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
        """Return the distance between tokens of the map: token indices, broadcast against each other -> float32.

        Its unit is one step of the dilation; tokens between the dilated kernel's taps are farther than all tokens on
        them. For a kernel that is not square, rows and columns are scaled so that its window holds exactly the nearest
        tokens. Ordered by (Chebyshev distance, raster index), the m*m nearest tokens of a query are the m x m window in
        one fixed order at every position; with Euclidean distance that fails from 7 x 7 on.
        """
        own, other = self.coordinates(queries), self.coordinates(keys)
        rows, cols = (self.steps(axis, own[axis], other[axis]) for axis in (0, 1))
        return _length(rows, cols, metric)

    def distance_to_all(self, queries: Tensor, metric: str = "chebyshev") -> Tensor:
        """Return ``distance`` from queries (Q,) to every token, axis by axis: (Q, N); 0 to prefix tokens."""
        rows, cols = self.steps_to_all(queries)
        grid = _length(rows[:, :, None], cols[:, None], metric).flatten(1)
        return torch.cat([grid.new_zeros(len(grid), self.prefix), grid], dim=1) if self.prefix else grid

    def steps_to_all(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Return the distances from queries (Q,) along each axis: to rows (Q, rows) and to columns (Q, columns)."""
        own = self.coordinates(queries[:, None])
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
        radius = [m // 2 for m in self.kernel]
        delta = (self.window_centre(axis, own) - other).abs()
        steps = (delta / d if d > 1 else delta).to(torch.float32)
        if d > 1:
            steps = steps + far * (delta % d != 0)
        if radius[0] != radius[1]:  # along an axis where the kernel is 1 wide, all but the query's own line is far
            steps = steps * (max(radius) / radius[axis] if radius[axis] else far)
        return steps


def _length(rows: Tensor, cols: Tensor, metric: str) -> Tensor:
    return torch.maximum(rows, cols) if metric == "chebyshev" else (rows.square() + cols.square()).sqrt()


def window_order(kernel: Pair) -> Tensor:
    """Return the taps of a kernel (in raster numbers), those nearest to its centre first: (kh * kw,) int64.

    Ties in Chebyshev distance (scaled as in ``Geometry.distance``) go to the lower raster index.
    """
    geometry = Geometry(kernel[0], kernel[1], kernel=kernel)
    taps = torch.arange(geometry.num_tokens)
    distance = geometry.distance(geometry.query_index(), taps)
    return distance.sort(stable=True).indices
