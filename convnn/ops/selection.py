"""Which tokens a query takes: candidates, then the k best under a total order.

Shapes: B batch, H heads, Q queries, N tokens, M candidates, K neighbours, D channels per head.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convnn.ops.candidates import RELATIVE, candidate_tokens, most_candidates, out_of_reach
from convnn.ops.geometry import Geometry, window_order
from convnn.ops.settings import Selection
from convnn.ops.similarity import ALIKE, deviation, pair_similarity, score_terms, span, with_positions
from convnn.ops.topk import stable_topk
from convnn.ops.triton import dispatch, launch

# Scores held at once; more go through in chunks. On a CPU a chunk should stay in the cache (measured: 4 times faster
# than all at once for 4096 x 1156 scores), on a GPU it should only bound memory (64 Mi scores: 256 MiB in float32).
CHUNK_SCORES = {"cpu": 1 << 18}
CHUNK_SCORES_ELSEWHERE = 1 << 26


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
        backend: ``auto``, ``torch`` or ``triton``, see ``convnn.ops.triton.dispatch``.

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
        if not at_position and dispatch.selects(backend, q, k, selection, num):
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
    """Return what ``_best`` returns, by the kernel; float32 order, inputs in their own precision."""
    index, low, high = launch.best_tokens(*args, **kwargs)
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
    valid = torch.ones_like(best, dtype=torch.bool) if selection.candidates in RELATIVE else None
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
