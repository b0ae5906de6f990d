"""Which tokens a query may choose.

Shapes: Q queries, N tokens, M candidates.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from convnn.ops.geometry import Geometry
from convnn.ops.settings import Selection
from convnn.ops.subsets import random_subset

RELATIVE = ("window", "stride")
"""Kinds of candidates that depend on the query."""


def is_relative(selection: Selection) -> bool:
    """Return whether a query's candidates depend on where it is, so that it can have fewer than others."""
    return selection.candidates in RELATIVE or selection.causal


def fixed_subset(total: int, count: int, seed: int) -> list[int]:
    """Return ``count`` of ``range(total)``, sorted; the same ones for the same seed on every device."""
    return sorted(random.Random(seed).sample(range(total), count))


# A traced graph takes the fixed subset as a constant: Python's generators cannot be traced.
_fixed_subset = torch.compiler.assume_constant_result(fixed_subset)


def candidate_tokens(
    geometry: Geometry, selection: Selection, *, pads: bool, training: bool, device: torch.device | None = None
) -> Tensor | None:
    """Return the tokens that may be chosen by any query, (M,) int64 in raster order, or None for all of them.

    Prefix tokens are always candidates. ``grid`` spans the map without its padding ring. ``random`` draws anew
    at each training step, one subset for the whole batch (see ``draws``); ``eval_candidates`` says
    what happens at evaluation. A sample as large as the map is the whole map, and so is a grid with more points per
    side than the map has on either (as in the paper). ``window`` and ``stride`` further depend on the query, see
    ``out_of_reach``.

    Args:
        geometry: of the map.
        selection: how candidates are chosen.
        pads: whether tokens of the zero ring may be chosen.
        training: whether random candidates are drawn anew.
        device: of the result.
    """
    prefix = torch.arange(geometry.prefix, device=device)
    if selection.candidates == "grid" and selection.num_candidates <= max(geometry.height, geometry.width):
        columns = geometry.padded_shape[1]
        axes = []
        for side, pad in zip((geometry.height, geometry.width), geometry.padding, strict=True):
            count = min(selection.num_candidates, side)
            if selection.grid_rounding != "nearest":  # in float32, whose rounding errors decide between two tokens
                points = torch.linspace(0, side - 1, count, dtype=torch.float32)
            else:
                points = torch.linspace(0, side - 1, count, dtype=torch.float64).round()
            axes.append(points.long().to(device) + (0 if selection.grid_rounding == "sheared" else pad))
        if selection.grid_rounding == "sheared":  # the authors' number: column times the height, and the row
            tokens = (axes[1][:, None] * geometry.height + axes[0]).flatten() + geometry.prefix
            return torch.cat([prefix, tokens])
        grid = (axes[0][:, None] * columns + axes[1]).flatten() + geometry.prefix
        return torch.cat([prefix, grid])
    if geometry.has_ring and not pads:
        tokens = geometry.inner_tokens(device)
    else:
        tokens = torch.arange(geometry.prefix, geometry.num_tokens, device=device)
    count = selection.num_candidates
    if selection.candidates == "random" and count < len(tokens):
        if training or selection.eval_candidates == "resample":
            tokens = tokens[random_subset(len(tokens), count, tokens.device)]
        elif selection.eval_candidates == "same":
            subset = _fixed_subset(len(tokens), count, selection.candidate_seed)
            tokens = tokens[torch.tensor(subset, device=device)]
    if geometry.prefix + len(tokens) == geometry.num_tokens:
        return None
    return torch.cat([prefix, tokens])


def out_of_reach(geometry: Geometry, selection: Selection, queries: Tensor, tokens: Tensor) -> Tensor | None:
    """Return which tokens the candidates or ``causal`` keep from a query, (Q, M) bool, or None: none."""
    if not is_relative(selection):
        return None
    if selection.candidates not in RELATIVE:
        away = torch.zeros(len(queries), len(tokens), dtype=torch.bool, device=queries.device)
    elif selection.candidates == "window":
        # Tokens between the steps of a dilation are farther than the map's sides together.
        reach = min(selection.num_candidates, sum(geometry.padded_shape))
        away = geometry.distance(queries[:, None], tokens) > reach
    else:
        own, other = geometry.coordinates(queries[:, None]), geometry.coordinates(tokens)
        steps = [(a - b) % selection.num_candidates for a, b in zip(own, other, strict=True)]
        away = steps[0] + steps[1] > 0
    if selection.causal:
        own, other = geometry.coordinates(queries[:, None]), geometry.coordinates(tokens)
        away = away | (other[0] > own[0]) | (other[1] > own[1])
    return away & (tokens >= geometry.prefix) & (queries >= geometry.prefix)[:, None]


def most_candidates(geometry: Geometry, selection: Selection, tokens: Tensor | None) -> tuple[int, int]:
    """Return how many of the candidate ``tokens`` a query can have at most: one on the grid, and any.

    They differ for ``candidates=window`` and ``stride``, which prefix queries are not bound to. With ``causal`` some
    have fewer.
    """
    every = geometry.num_tokens if tokens is None else len(tokens)
    if selection.candidates not in RELATIVE:
        return every, every
    count = selection.num_candidates
    if selection.candidates == "window":
        # Windows of the parity of the kernel: an even one has a token less on the query's shorter side.
        lanes = zip(geometry.padded_shape, geometry.kernel, geometry.dilation, strict=True)
        reach = count + 1 if selection.causal else 2 * count
        rows, cols = (min(reach + (m % 2 and not selection.causal), -(-side // d)) for side, m, d in lanes)
    else:
        rows, cols = (-(-side // count) for side in geometry.padded_shape)
    on_grid = min(geometry.prefix + rows * cols, every)
    return on_grid, every if geometry.prefix else on_grid
