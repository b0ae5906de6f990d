"""Aggregation: each query's neighbours are gathered, weighted and mixed into one output.

Shapes: B batch, H heads, Q queries, N tokens, K neighbours, D channels per head, C input and O output channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import reduce

import torch
from torch import Tensor
from torch.autograd import Function

from convnn.ops import edge_functions
from convnn.ops.edges import Edges
from convnn.ops.precision import as_given, autocast_dtype
from convnn.ops.similarity import pair_similarity, unit
from convnn.ops.topk import runs_at_once

_blocks_only: ContextVar[bool] = ContextVar("blocks_only", default=False)


@contextmanager
def in_blocks() -> Iterator[None]:
    """Gather blocks of neighbours inside, never walk edges: torch's FLOP counter sees the products of blocks alone."""
    token = _blocks_only.set(True)
    try:
        yield
    finally:
        _blocks_only.reset(token)


def walks_edges(x: Tensor) -> bool:
    """Return whether ``ops.edges`` can aggregate: in eager mode on a CPU, on CUDA, and without data (``meta``).

    Compiled and traced graphs and the transforms of ``torch.func`` accept no ``autograd.Function`` that is given a
    Python object such as the graph, and none here has a rule for derivatives in forward mode.
    """
    if not runs_at_once() or _blocks_only.get() or torch.autograd.forward_ad._current_level >= 0:
        return False
    return x.device.type in ("cpu", "cuda", "meta") and x.is_floating_point()


def _precision(*tensors: Tensor | None) -> torch.dtype:
    """Return what sums along edges are computed in: autocast's precision where that is on, else the highest given."""
    given = [t for t in tensors if t is not None]
    dtype = reduce(torch.promote_types, [t.dtype for t in given])
    lowered = autocast_dtype(given[0])
    return dtype if lowered is None or dtype == torch.float64 else lowered


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Return the tokens at ``index``: (B, H, N, D), (B or 1, H or 1, Q, K) -> (B, H, Q, K, D)."""
    b, h, n, d = x.shape
    # All tokens become one table of B H N rows, those of a batch item and head starting at (b * H + h) * N: one
    # index_select of whole rows, where torch.gather would need the index once per channel.
    start = torch.arange(b * h, device=x.device).mul_(n).view(b, h, 1, 1)
    rows = (index + start).flatten()
    return x.reshape(b * h * n, d).index_select(0, rows).view(b, h, *index.shape[2:], d)


def neighbor_similarity(q: Tensor, k: Tensor, index: Tensor, kind: str, graph: Edges | None) -> Tensor:
    """Return the similarity of each query to its neighbours: (B, H, Q, D), (B, H, N, D) -> (B, H, Q, K).

    It is computed along the edges of ``graph``, if there is one.
    """
    if graph is None:
        return pair_similarity(q, gather_tokens(k, index), kind)
    if kind == "euclidean":
        dtype = torch.promote_types(q.dtype, k.dtype)
        score = _walk(edge_functions.Distance, dtype, _table(q), _table(k), graph=graph)
        score = score.to(dtype) if autocast_dtype(q) is None else score
    else:
        q, k = (unit(q), unit(k)) if kind == "cosine" else (q / math.sqrt(q.shape[-1]), k)
        score = _walk(edge_functions.Dot, _precision(q, k), _table(q), _table(k), graph=graph)
    return score.view(*q.shape[:3], index.shape[-1])


def with_own_scores(score: Tensor, index: Tensor, again: float | None, first: float | None) -> Tensor:
    """Return the similarities (B, H, Q, K) with ``self_again`` and ``self_score`` in place of those of the own token.

    Both need the query's own token to stand first in the index.
    """
    if again is None and first is None:
        return score
    own, others = score[..., :1], score[..., 1:]
    if again is not None:
        others = others.masked_fill(index[..., 1:] == index[..., :1], again)
    return torch.cat([own if first is None else torch.full_like(own, first), others], dim=-1)


def mix(
    v: Tensor,
    index: Tensor,
    rho: Tensor | None,
    weight: Tensor | None,
    groups: int,
    graph: Edges | None,
) -> Tensor:
    """Sum each query's neighbours, weighted by ``rho`` and slot weights: (B, H, N, C) -> (B, H, Q, O or C).

    Args:
        v: values.
        index: neighbours, (B or 1, H or 1, Q, K).
        rho: weights of the neighbours (the paper's rho), (B, H, Q, K), or None: ones.
        weight: of the slots: (O, C / groups, K), depthwise (C, K), or None: their sum.
        groups: of full weights.
        graph: the neighbours as edges, or None: gather them.
    """
    full = weight is not None and weight.ndim == 3
    if graph is None:
        x = gather_tokens(v, index)
        if rho is not None:
            x = x * rho[..., None]
        if weight is None:
            return x.sum(dim=-2)
        return mix_conv(x, weight, groups) if full else (x * weight.t()).sum(dim=-2)
    dtype, table, weights = _precision(v, rho, weight), _table(v), _of_edges(rho, v)
    if weight is None:
        y = _walk(edge_functions.Sum, dtype, table, weights, graph=graph)
    elif full:
        y = _walk(edge_functions.Conv, dtype, table, weights, _in_groups(weight, groups), graph=graph)
    else:
        y = _walk(edge_functions.Depthwise, dtype, table, weights, weight.t().contiguous(), graph=graph)
    return y.view(*v.shape[:2], index.shape[2], y.shape[-1])


def mix_candidates(
    v: Tensor, index: Tensor, rho: Tensor | None, weight: Tensor, candidates: Tensor | None, own: Tensor | None
) -> Tensor:
    """Do what ``mix`` does with full weights, but multiply the M candidates by all slots before they are gathered.

    With fewer candidates than queries that is less work: M K products of rows with weight matrices instead of Q K.

    Args:
        v: values, (B, H, N, C).
        index: neighbours, (B or 1, H or 1, Q, K).
        rho: weights of the neighbours, or None.
        weight: (O, C, K).
        candidates: the tokens that neighbours are among, (M,).
        own: the queries' own tokens, (Q,), if those are their first neighbours: they need not be candidates, and are
            multiplied apart.
    """
    assert candidates is not None
    b, h, n, c = v.shape
    first = int(own is not None)
    slots = index.shape[-1] - first
    # Candidate number m times slot r is row m * slots + r of the products of a batch item and head.
    place = torch.zeros(n, dtype=torch.int64, device=v.device)
    place[candidates] = torch.arange(len(candidates), device=v.device) * slots
    rows = place[index[..., first:]] + torch.arange(slots, device=v.device)
    graph = Edges.of(rows, b, h, len(candidates) * slots)
    weights = None if rho is None else _of_edges(rho[..., first:], v)
    wide = weight[..., first:].permute(1, 2, 0).reshape(c, -1)
    y = _walk(
        edge_functions.ConvFirst, _precision(v, rho, weight), _table(v[:, :, candidates]), weights, wide, graph=graph
    ).view(b, h, index.shape[2], len(weight))
    if own is None:
        return y
    mine = v[:, :, own] @ weight[..., 0].t()
    return y + (mine if rho is None else mine * rho[..., :1])


def max_of_neighbors(
    v: Tensor, index: Tensor, rho: Tensor | None, own: Tensor, valid: Tensor | None, graph: Edges | None
) -> Tensor:
    """Return the largest difference to the query's own token, per channel: (B, H, N, D) -> (B, H, Q, D).

    Args:
        v: values.
        index: neighbours, (B or 1, H or 1, Q, K).
        rho: weights of the neighbours, or None: ones.
        own: the queries' tokens, (B, H, Q, D).
        valid: which neighbours count, as ``index``, or None: all.
        graph: the neighbours as edges, or None: gather them.
    """
    if graph is None:
        return mix_max_relative(gather_tokens(v, index) * (1 if rho is None else rho[..., None]), own, valid)
    dtype = torch.promote_types(v.dtype, v.dtype if rho is None else rho.dtype)
    table, weights, counts = _table(v).to(dtype), _of_edges(rho, v), _of_edges(valid, v)
    weights = None if weights is None else weights.to(dtype)
    with as_given(table):
        y = edge_functions.Largest.apply(table, weights, counts, graph)
    return y.view(own.shape) - own


def _walk(function: type[Function], dtype: torch.dtype, *tensors: Tensor | None, graph: Edges) -> Tensor:
    """Apply a function of ``edge_functions`` in this precision."""
    given = [None if t is None else t.to(dtype) for t in tensors]
    with as_given(graph.rows):
        return function.apply(*given, graph)


def _of_edges(x: Tensor | None, v: Tensor) -> Tensor | None:
    """Return a number for each edge: (B or 1, H or 1, Q, K) -> (E, K)."""
    return None if x is None else x.expand(*v.shape[:2], -1, -1).reshape(-1, x.shape[-1])


def _in_groups(weight: Tensor, groups: int) -> Tensor:
    """Return weights as ``edge_functions.Conv`` has them: (O, C / groups, K) -> (groups, K C / groups, O / groups)."""
    return weight.unflatten(0, (groups, -1)).permute(0, 3, 2, 1).flatten(1, 2)


def _table(x: Tensor) -> Tensor:
    """Return all tokens as rows: (B, H, N, D) -> (B H N, D)."""
    return x.reshape(-1, x.shape[-1])


def mix_conv(x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    """Sum the slots, each times its own weight matrix: (B, H, Q, K, C), (O, C / groups, K) -> (B, H, Q, O)."""
    b, h, q, k, c = x.shape
    o = weight.shape[0]
    if groups == 1:  # one product: the K slots of C channels side by side, as im2col does for a convolution
        return (x.reshape(b * h * q, k * c) @ weight.permute(2, 1, 0).reshape(k * c, o)).view(b, h, q, o)
    x = x.view(b * h * q, k, groups, c // groups).permute(2, 0, 1, 3).reshape(groups, b * h * q, k * c // groups)
    w = weight.view(groups, o // groups, c // groups, k).permute(0, 3, 2, 1).reshape(groups, -1, o // groups)
    return (x @ w).transpose(0, 1).reshape(b, h, q, o)


def mix_max_relative(x: Tensor, own: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the largest difference to the query's own token, per channel: (B, H, Q, K, D), (B, H, Q, D) -> the same.

    The aggregation of vision graphs (ViG, arXiv 2206.00272): max_j (x_j - x_i).
    """
    if valid is not None:
        x = x.masked_fill(~valid[..., None], -torch.inf)
    return x.amax(dim=-2) - own
