"""Which tokens a query takes: candidates, then the k best under a total order.

Shapes: B batch, H heads, Q queries, N tokens, M candidates, K neighbours, D channels per head.
"""

from __future__ import annotations

import random
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convnn import backend as kernels
from convnn.draws import random_subset
from convnn.geometry import Geometry, window_order
from convnn.similarity import ALIKE, deviation, pair_similarity, score_terms, span, with_positions

# Scores held at once; more go through in chunks. On a CPU a chunk should stay in the cache (measured: 4 times faster
# than all at once for 4096 x 1156 scores), on a GPU it should only bound memory (64 Mi scores: 256 MiB in float32).
CHUNK_SCORES = {"cpu": 1 << 18}
CHUNK_SCORES_ELSEWHERE = 1 << 26

_RELATIVE = ("window", "stride")
"""Kinds of candidates that depend on the query."""


@dataclass(frozen=True)
class Selection:
    """How neighbours are chosen. The fields are those of ``convnn.config.OperatorConfig``."""

    similarity: str = "cosine"
    mix: str = "sum"
    distance: str = "chebyshev"
    candidates: str = "all"
    num_candidates: int = 32
    eval_candidates: str = "same"
    candidate_seed: int = 0
    pad_candidates: bool = True
    self_first: bool = True
    slots: str = "rank"
    k_policy: str = "error"


def runs_at_once() -> bool:
    """Return whether values can be looked at: not in compiled or traced graphs, nor in transforms of ``torch.func``."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return not torch._C._are_functorch_transforms_active()


def stable_topk(score: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest of the last axis, larger first, ties to the lower index.

    ``torch.topk`` leaves ties open and breaks them differently on each device. So where the k + 1 largest differ, as
    they mostly do, it is right; else for float32 the score and the index are packed into one int64 whose order is the
    wanted one, so that no two keys are equal. Only a CPU looks first: elsewhere the look would wait for the device.
    """
    if score.device.type == "cpu" and k < score.shape[-1] and runs_at_once():
        values, indices = score.topk(k + 1, dim=-1)
        if bool((values[..., 1:] < values[..., :-1]).all()):
            return indices[..., :k]
    if score.dtype != torch.float32 or torch.jit.is_tracing():  # whose graphs have no view of other bits
        return score.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    bits = (score + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # now integers compare as the floats do
    key = bits.long()
    key <<= 32
    key |= torch.arange(score.shape[-1] - 1, -1, -1, device=score.device)
    return key.topk(k, dim=-1).indices


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
            points = torch.linspace(0, side - 1, min(selection.num_candidates, side), dtype=torch.float64)
            axes.append(points.round().long().to(device) + pad)
        grid = (axes[0][:, None] * columns + axes[1]).flatten() + geometry.prefix
        return torch.cat([prefix, grid])
    if any(geometry.padding) and not pads:
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
    """Return which tokens ``candidates=window`` or ``stride`` keeps from a query, (Q, M) bool, or None: none."""
    if selection.candidates not in _RELATIVE:
        return None
    if selection.candidates == "window":
        away = geometry.distance(queries[:, None], tokens) > selection.num_candidates
    else:
        own, other = geometry.coordinates(queries[:, None]), geometry.coordinates(tokens)
        steps = [(a - b) % selection.num_candidates for a, b in zip(own, other, strict=True)]
        away = steps[0] + steps[1] > 0
    return away & (tokens >= geometry.prefix) & (queries >= geometry.prefix)[:, None]


def most_candidates(geometry: Geometry, selection: Selection, tokens: Tensor | None) -> tuple[int, int]:
    """Return how many of the candidate ``tokens`` a query can have at most: one on the grid, and any.

    They differ for ``candidates=window`` and ``stride``, which prefix queries are not bound to.
    """
    every = geometry.num_tokens if tokens is None else len(tokens)
    if selection.candidates not in _RELATIVE:
        return every, every
    count = selection.num_candidates
    if selection.candidates == "window":
        rows, cols = (min(2 * count + 1, side) for side in geometry.padded_shape)
    else:
        rows, cols = (-(-side // count) for side in geometry.padded_shape)
    on_grid = min(geometry.prefix + rows * cols, every)
    return on_grid, every if geometry.prefix else on_grid


@dataclass(frozen=True)
class Neighbors:
    """The neighbours of each query. B and H are 1 where the choice depends on the geometry alone."""

    index: Tensor
    """Token indices, (B, H, Q, K) int64."""
    valid: Tensor | None
    """False where a query has fewer than K candidates (``window``, ``stride``), (B, H, Q, K); None: nowhere."""
    low: Tensor | None = None
    """Least and largest similarity among the candidates of each query, (B, H, Q, 1), where ``mix=sum`` needs them;
    ``high`` is infinite where all are alike."""
    high: Tensor | None = None
    candidates: Tensor | None = None
    """The tokens that were candidates of any query, (M,); None: all."""


def select_neighbors(
    q: Tensor,
    k: Tensor,
    geometry: Geometry,
    selection: Selection,
    *,
    num: int,
    blend: float | Tensor,
    training: bool,
    backend: str = "auto",
) -> Neighbors:
    """Return each query's neighbours: (B, H, Q, D), (B, H, N, D) -> index (B or 1, H or 1, Q, K).

    Selection is hard: no gradient passes. It runs in float32 (float64 for float64 input), whatever autocast says.
    At ``blend`` 0 it depends on the geometry alone. Prefix tokens have no position: as queries they select by
    features at any blend; as candidates of others they count as infinitely far, or with ``mix=concat`` as in the
    middle of the map.

    Args:
        q: queries.
        k: keys.
        geometry: where they are.
        selection: how neighbours are chosen.
        num: neighbours per query.
        blend: one number, or a tensor (H,) strictly between 0 and 1.
        training: draw random candidates anew.
        backend: ``auto``, ``torch`` or ``triton``, see ``convnn.backend``.

    Raises:
        ConfigError: if ``backend`` is ``triton`` and its kernel cannot serve the case.
        ValueError: if ``num`` exceeds the candidates and ``k_policy`` is ``error``.
    """
    device = q.device
    by_features, at_position = (isinstance(blend, float) and blend == end for end in (1, 0))
    ranged = selection.mix == "sum" and not (by_features or at_position)
    pads = selection.pad_candidates or not by_features
    candidates = candidate_tokens(geometry, selection, pads=pads, training=training, device=device)
    available, most = most_candidates(geometry, selection, candidates)
    if num > available:
        if selection.k_policy == "error":
            raise ValueError(
                f"k={num} exceeds the {available} candidates of a {geometry.height}x{geometry.width} map "
                f"(padding {geometry.padding}, {geometry.prefix} prefix tokens); lower k or set k_policy=clamp"
            )
        num = min(num, most)
    queries = geometry.query_index(device)
    split = 0 if by_features else geometry.prefix
    # The meta device, on which costs are counted, has no autocast.
    with torch.no_grad(), nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False):
        best = _best
        if not at_position and kernels.selects(backend, q, k, selection, num):
            best = _best_by_kernel
        else:
            q, k = (t if t.dtype == torch.float64 else t.float() for t in (q, k))
        found = []
        for part, share in ((slice(0, split), 1.0), (slice(split, None), blend)):
            if len(queries[part]):
                own = q[:, :, part], k, queries[part]
                found.append(best(*own, candidates, geometry, selection, num=num, blend=share, ranged=ranged))
        chosen = found[0] if len(found) == 1 else _join(*found)
        index, valid = chosen.index, chosen.valid
        if selection.slots == "raster":
            if valid is None:
                index = index.sort(dim=-1).values
            else:  # fillers last
                order = index.masked_fill(~valid, geometry.num_tokens).argsort(dim=-1, stable=True)
                index, valid = index.gather(-1, order), valid.gather(-1, order)
        elif selection.slots == "window":
            slot = window_slots(index, queries, geometry, valid)
            index = torch.empty_like(index).scatter_(-1, slot, index)
            valid = None if valid is None else torch.empty_like(valid).scatter_(-1, slot, valid)
        return Neighbors(index, valid, chosen.low, chosen.high, candidates)


def _best_by_kernel(*args: Any, **kwargs: Any) -> Neighbors:
    """Return what ``_best`` returns, from ``convnn.backend``; float32 order, inputs in their own precision."""
    index, low, high = kernels.best_tokens(*args, **kwargs)
    return Neighbors(index, None, low, high)


def _join(a: Neighbors, b: Neighbors) -> Neighbors:
    """Return the neighbours of prefix queries followed by those of grid queries."""
    size = torch.broadcast_shapes(a.index.shape[:2], b.index.shape[:2])

    def cat(x: Tensor | None, y: Tensor | None) -> Tensor | None:
        if x is None or y is None:
            return None
        return torch.cat([t.expand(*size, -1, -1) for t in (x, y)], dim=2)

    index = cat(a.index, b.index)
    assert index is not None
    return Neighbors(index, cat(a.valid, b.valid), cat(a.low, b.low), cat(a.high, b.high))


def window_slots(index: Tensor, queries: Tensor, geometry: Geometry, valid: Tensor | None = None) -> Tensor:
    """Return the slot of each neighbour when those in the kernel window of their query keep the slot of their tap.

    Slots are numbered as at blend 0, nearest tap first; neighbours outside the window fill the free slots, best
    first. So a neighbour that comes in changes one slot, and a layer moves away from a convolution without a jump.

    Args:
        index: neighbours in rank order, (B, H, Q, K).
        queries: token of each query, (Q,).
        geometry: of the map.
        valid: False for fillers, which are no neighbours and take what slot is left.
    """
    k = index.shape[-1]
    rows, cols = geometry.coordinates(index)
    own_rows, own_cols = (t[:, None] for t in geometry.coordinates(queries))
    tap, inside = torch.zeros_like(index), (index >= geometry.prefix) & (queries >= geometry.prefix)[:, None]
    for delta, m, d in zip((rows - own_rows, cols - own_cols), geometry.kernel, geometry.dilation, strict=True):
        step = delta.div(d, rounding_mode="floor") + m // 2
        inside = inside & (delta % d == 0) & (step >= 0) & (step < m)
        tap = tap * m + step
    order = window_order(geometry.kernel).argsort().to(index.device)
    slot = order[tap.where(inside, 0)]
    inside = inside & (slot < k) & (True if valid is None else valid)
    taken = torch.zeros_like(index).scatter_add_(-1, slot.where(inside, 0), inside.long())
    free = taken.argsort(dim=-1, stable=True)  # free slots first, in order
    outsiders = inside.long().argsort(dim=-1, stable=True)  # positions in the ranking, outsiders first
    slot_of = torch.empty_like(index).scatter_(-1, outsiders, free)
    return torch.where(inside, slot, slot_of)


def _best(
    q: Tensor,
    k: Tensor,
    queries: Tensor,
    candidates: Tensor | None,
    geometry: Geometry,
    selection: Selection,
    *,
    num: int,
    blend: float | Tensor,
    ranged: bool,
) -> Neighbors:
    """Return the ``num`` best candidates of the given queries in rank order, chunk by chunk.

    ``ranged`` asks for the range of the similarities too.
    """
    at_position = isinstance(blend, float) and blend == 0
    mixed = not isinstance(blend, float) or 0 < blend < 1
    b, h = (1, 1) if at_position else q.shape[:2]
    tokens = torch.arange(geometry.num_tokens, device=q.device) if candidates is None else candidates
    share = blend.to(q.dtype).expand(h).repeat(b)[:, None, None] if isinstance(blend, Tensor) else blend
    q, k = q.flatten(0, 1), k.flatten(0, 1)
    own_score, floor = None, q.new_zeros(b * h, len(queries), 1)
    if ranged and selection.similarity == "euclidean":  # of squared distances that are rounding errors of the features
        floor = ALIKE**2 * q.square().sum(-1, keepdim=True)
    if ranged and selection.self_first and candidates is not None:
        own_score = pair_similarity(q, k[:, queries, None], selection.similarity)
    if not at_position:
        if mixed and selection.mix == "concat":
            positions, scale = geometry.positions(q.device), deviation(k)
            q = with_positions(q, positions[queries], share, scale)
            k = with_positions(k, positions, share, scale)
            mixed = False
        q, keys, bias = score_terms(q, k if candidates is None else k[:, candidates], selection.similarity)
        keys = keys.mT
    limit = CHUNK_SCORES.get(q.device.type, CHUNK_SCORES_ELSEWHERE)
    query_chunk = min(len(queries), max(1, limit // len(tokens)))
    batch_chunk = max(1, limit // (len(tokens) * query_chunk))
    first_slot = int(selection.self_first)
    best = torch.empty(b * h, len(queries), num, dtype=torch.int64, device=q.device)
    valid = torch.ones_like(best, dtype=torch.bool) if selection.candidates in _RELATIVE else None
    low, high = (q.new_empty(b * h, len(queries), 1) for _ in range(2)) if ranged else (None, None)
    for first in range(0, len(queries), query_chunk):
        part = slice(first, first + query_chunk)
        own = queries[part]
        outside = out_of_reach(geometry, selection, own, tokens)
        taken = outside  # what may not be ranked: tokens out of reach, and the query itself where it has its place
        if selection.self_first and not (candidates is None and outside is None):
            itself = own[:, None] == tokens
            taken = itself if outside is None else outside | itself
        if at_position or mixed:
            distance = geometry.distance(own[:, None], tokens, selection.distance)
            distance = distance.masked_fill(tokens < geometry.prefix, torch.inf)
            distance = distance if at_position else distance.to(q.dtype) / geometry.extent
        for item in range(0, b * h, batch_chunk):
            items = slice(item, item + batch_chunk)
            if at_position:
                score = -distance[None]
            else:
                score = q[items, part] @ keys[items]
                if bias is not None:
                    score = score + bias[items]
                if low is not None and high is not None:
                    low[items, part] = _inside(score, outside, torch.inf).amin(-1, keepdim=True)
                    high[items, part] = _inside(score, outside, -torch.inf).amax(-1, keepdim=True)
                if mixed and low is not None and high is not None:
                    own_share = share[items] if isinstance(share, Tensor) else share
                    least, largest = span(low[items, part], high[items, part], floor[items, part])
                    # As blend_scores does, in place.
                    score.sub_(least).div_(largest - least).mul_(own_share).sub_((1 - own_share) * distance)
            if taken is not None:
                score = score.masked_fill_(taken, -torch.inf)
            elif selection.self_first:  # here token and column are the same
                score = score.scatter_(-1, own[:, None].expand(*score.shape[:-1], 1), -torch.inf)
            ranked = stable_topk(score, num - first_slot)
            best[items, part, :first_slot] = own[:, None]
            best[items, part, first_slot:] = tokens[ranked]
            if valid is not None and taken is not None:
                # Prefix tokens can have a score of -inf too, but come before the tokens that were taken out.
                valid[items, part, first_slot:] = ~taken.expand_as(score).gather(-1, ranked)
    if low is not None and high is not None:
        low, high = span(low, high, floor)
        if selection.similarity == "euclidean":
            # score_terms leaves out the query's own square, a constant that the similarity of a pair includes.
            own_square = (q / 2).square().sum(-1, keepdim=True)
            low, high = low - own_square, high - own_square
        if own_score is not None:  # the query's own token is a neighbour that need not be a candidate
            low, high = torch.minimum(low, own_score), torch.maximum(high, own_score)
    found = (None if t is None else t.unflatten(0, (b, h)) for t in (best, valid, low, high))
    index, valid, low, high = found
    assert index is not None
    return Neighbors(index, valid, low, high)


def _inside(score: Tensor, outside: Tensor | None, fill: float) -> Tensor:
    return score if outside is None else score.masked_fill(outside, fill)
