"""Which tokens a query takes: candidates, then the k best under a total order.

Shapes: B batch, H heads, Q queries, N tokens, M candidates, K neighbours, D channels per head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from convnn.geometry import Geometry, window_order
from convnn.similarity import blend_scores, score_terms

# Scores held at once; more go through in chunks. On a CPU a chunk should stay in the cache (measured: 4 times faster
# than all at once for 4096 x 1156 scores), on a GPU it should only bound memory (64 Mi scores: 256 MiB in float32).
CHUNK_SCORES = {"cpu": 1 << 18}
CHUNK_SCORES_ELSEWHERE = 1 << 26


@dataclass(frozen=True)
class Selection:
    """How neighbours are chosen. The fields are those of ``convnn.config.OperatorConfig``."""

    similarity: str = "cosine"
    distance: str = "chebyshev"
    candidates: str = "all"
    num_candidates: int = 32
    eval_candidates: str = "same"
    candidate_seed: int = 0
    pad_candidates: bool = True
    self_first: bool = True
    slots: str = "rank"
    k_policy: str = "error"


def stable_topk(score: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest of the last axis, larger first, ties to the lower index.

    ``torch.topk`` leaves ties open and breaks them differently on each device. For float32 the score and the
    index are packed into one int64 whose order is the wanted one, so that no two keys are equal.
    """
    if score.dtype != torch.float32:
        return score.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    bits = (score + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    bits ^= (bits >> 31).bitwise_and_(0x7FFFFFFF)  # now integers compare as the floats do
    key = bits.long()
    key <<= 32
    key |= torch.arange(score.shape[-1] - 1, -1, -1, device=score.device)
    return key.topk(k, dim=-1).indices


def candidate_tokens(
    geometry: Geometry, selection: Selection, *, blend: float, training: bool, device: torch.device | None = None
) -> Tensor | None:
    """Return the tokens that may be chosen, (M,) int64 in raster order, or None for all of them.

    Prefix tokens are always candidates. ``grid`` spans the map without its padding ring. ``random`` draws anew
    from torch's global generator at each training step, one subset for the whole batch; ``eval_candidates`` says
    what happens at evaluation. A sample as large as the map is the whole map.
    """
    prefix = torch.arange(geometry.prefix, device=device)
    with_pads = selection.pad_candidates or blend < 1
    if selection.candidates == "grid":
        (ph, pw), (_, columns) = geometry.padding, geometry.padded_shape
        axes = []
        for side, pad in ((geometry.height, ph), (geometry.width, pw)):
            points = torch.linspace(0, side - 1, min(selection.num_candidates, side), dtype=torch.float64)
            axes.append(points.round().long().to(device) + pad)
        grid = (axes[0][:, None] * columns + axes[1]).flatten() + geometry.prefix
        return torch.cat([prefix, grid])
    if any(geometry.padding) and not with_pads:
        tokens = (~geometry.is_pad(device)).nonzero().squeeze(1)[geometry.prefix :]
    else:
        tokens = torch.arange(geometry.prefix, geometry.num_tokens, device=device)
    if selection.candidates == "random" and selection.num_candidates < len(tokens):
        if training or selection.eval_candidates == "resample":
            drawn = torch.randperm(len(tokens), device=device)
        elif selection.eval_candidates == "same":
            generator = torch.Generator().manual_seed(selection.candidate_seed)
            drawn = torch.randperm(len(tokens), generator=generator).to(device)
        else:
            drawn = torch.arange(len(tokens), device=device)[:0]
        if len(drawn):
            tokens = tokens[drawn[: selection.num_candidates].sort().values]
    if geometry.prefix + len(tokens) == geometry.num_tokens:
        return None
    return torch.cat([prefix, tokens])


def select_neighbors(
    q: Tensor, k: Tensor, geometry: Geometry, selection: Selection, *, num: int, blend: float, training: bool
) -> Tensor:
    """Return each query's neighbours as token indices: (B, H, Q, D), (B, H, N, D) -> (B or 1, H or 1, Q, K) int64.

    Selection is hard: no gradient passes. It runs in float32 (float64 for float64 input), whatever autocast says.
    At ``blend`` 0 it depends on the geometry alone and the first two axes are 1. Prefix tokens have no position:
    as queries they select by features at any blend, as candidates of others they count as infinitely far.

    Raises:
        ValueError: if ``num`` exceeds the candidates and ``k_policy`` is ``error``.
    """
    device = q.device
    candidates = candidate_tokens(geometry, selection, blend=blend, training=training, device=device)
    available = geometry.num_tokens if candidates is None else len(candidates)
    if num > available:
        if selection.k_policy == "error":
            raise ValueError(
                f"k={num} exceeds the {available} candidates of a {geometry.height}x{geometry.width} map "
                f"(padding {geometry.padding}, {geometry.prefix} prefix tokens); lower k or set k_policy=clamp"
            )
        num = available
    queries = geometry.query_index(device)
    split = geometry.prefix if blend < 1 else 0
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        q, k = (t if t.dtype == torch.float64 else t.float() for t in (q, k))
        parts = []
        if split:
            parts.append(_best(q[:, :, :split], k, queries[:split], candidates, geometry, selection, num, 1.0))
        parts.append(_best(q[:, :, split:], k, queries[split:], candidates, geometry, selection, num, blend))
        if len({p.shape[:2] for p in parts}) > 1:
            parts = [p.expand(q.shape[0], q.shape[1], -1, -1) for p in parts]
        index = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
        if selection.slots == "raster":
            return index.sort(dim=-1).values
        return window_slots(index, queries, geometry) if selection.slots == "window" else index


def window_slots(index: Tensor, queries: Tensor, geometry: Geometry) -> Tensor:
    """Put neighbours that lie in the kernel window of their query into the slot of their tap.

    Slots are numbered as at blend 0, nearest tap first; neighbours outside the window fill the free slots, best
    first. So a neighbour that comes in changes one slot, and a layer moves away from a convolution without a jump.

    Args:
        index: neighbours in rank order, (B, H, Q, K).
        queries: token of each query, (Q,).
        geometry: of the map.
    """
    k = index.shape[-1]
    rows, cols = geometry.coordinates(index)
    own_rows, own_cols = (t[:, None] for t in geometry.coordinates(queries))
    tap, inside = torch.zeros_like(index), torch.ones_like(index, dtype=torch.bool)
    for delta, m, d in zip((rows - own_rows, cols - own_cols), geometry.kernel, geometry.dilation, strict=True):
        step = delta.div(d, rounding_mode="floor") + m // 2
        inside &= (delta % d == 0) & (step >= 0) & (step < m)
        tap = tap * m + step
    order = window_order(geometry.kernel).argsort().to(index.device)
    slot = order[tap.where(inside, 0)]
    inside &= slot < k
    taken = torch.zeros_like(index).scatter_add_(-1, slot.where(inside, 0), inside.long())
    free = taken.argsort(dim=-1, stable=True)  # free slots first, in order
    outsiders = inside.long().argsort(dim=-1, stable=True)  # positions in the ranking, outsiders first
    slot_of = torch.empty_like(index).scatter_(-1, outsiders, free)
    slot_of = torch.where(inside, slot, slot_of)
    return torch.empty_like(index).scatter_(-1, slot_of, index)


def _best(
    q: Tensor,
    k: Tensor,
    queries: Tensor,
    candidates: Tensor | None,
    geometry: Geometry,
    selection: Selection,
    num: int,
    blend: float,
) -> Tensor:
    """Return the ``num`` best candidates of the given queries, (B or 1, H or 1, Q, num), chunk by chunk."""
    b, h = (1, 1) if blend == 0 else q.shape[:2]
    tokens = torch.arange(geometry.num_tokens, device=q.device) if candidates is None else candidates
    if blend > 0:
        keys = k if candidates is None else k[:, :, candidates]
        q, keys, bias = score_terms(q.flatten(0, 1), keys.flatten(0, 1), selection.similarity)
        keys = keys.mT
    limit = CHUNK_SCORES.get(q.device.type, CHUNK_SCORES_ELSEWHERE)
    query_chunk = min(len(queries), max(1, limit // len(tokens)))
    batch_chunk = max(1, limit // (len(tokens) * query_chunk))
    best = torch.empty(b * h, len(queries), num, dtype=torch.int64, device=q.device)
    for first in range(0, len(queries), query_chunk):
        part = slice(first, first + query_chunk)
        own = queries[part]
        if blend < 1:
            distance = geometry.distance(own, tokens, selection.distance)
            distance.masked_fill_(tokens < geometry.prefix, torch.inf)
        for item in range(0, b * h, batch_chunk):
            items = slice(item, item + batch_chunk)
            if blend == 0:
                score = -distance[None]
            else:
                score = q[items, part] @ keys[items]
                if bias is not None:
                    score += bias[items]
                if blend < 1:
                    score = blend_scores(score, distance / geometry.extent, blend)
            if selection.self_first:
                score.masked_fill_(own[:, None] == tokens, -torch.inf)
                best[items, part, 0] = own
                best[items, part, 1:] = tokens[stable_topk(score, num - 1)]
            else:
                best[items, part] = tokens[stable_topk(score, num)]
    return best.view(b, h, len(queries), num)
