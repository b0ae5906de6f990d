"""Which tokens a query takes: the k best of its candidates under a total order.

Shapes: B batch, H heads, Q queries, N tokens, M candidates, K neighbours, D channels per head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from convnn.ops import choice
from convnn.ops.candidates import candidate_tokens, most_candidates
from convnn.ops.geometry import Geometry
from convnn.ops.neighbors import Neighbors, join
from convnn.ops.scores import Block, Scores, Search, at_end, lacking, precise, spanned
from convnn.ops.settings import Selection
from convnn.ops.slots import in_slots
from convnn.ops.threads import run_blocks
from convnn.ops.topk import runs_at_once, stable_topk
from convnn.ops.triton import dispatch, select


def select_neighbors(
    q: Tensor,
    k: Tensor,
    geometry: Geometry,
    selection: Selection,
    *,
    blend: float | Tensor = 1.0,
    training: bool = False,
    backend: str = "auto",
    bias: Tensor | None = None,
    blocked: Tensor | None = None,
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
        blend: one number, or a tensor (H,) strictly between 0 and 1.
        training: draw random candidates anew.
        backend: ``auto``, ``torch`` or ``triton``, see ``convnn.ops.triton.dispatch``. On CUDA ``auto`` measures.
        bias: added to the similarities with ``selection.bias_selects``, broadcastable to (B, H, Q, N).
        blocked: True for tokens that a query may not choose, broadcastable to (B, H, Q, N). With a bias that chooses,
            with this, or for queries on a map of their own, plain torch computes, whatever the backend.

    Raises:
        ConfigError: if ``backend`` is ``triton`` and its kernel cannot serve the case.
        ValueError: if k exceeds the candidates and ``k_policy`` is ``error``.
    """
    by_features, by_position = at_end(blend, 1), at_end(blend, 0)
    ranged = selection.mix == "sum" and not (by_features or by_position)
    pads = selection.pad_candidates or not by_features
    candidates = candidate_tokens(geometry, selection, pads=pads, training=training, device=q.device)
    selection = replace(selection, k=possible_k(geometry, selection, candidates))
    queries = geometry.query_places(q.device)
    split = 0 if by_features else geometry.prefix
    # The meta device, on which costs are counted, has no autocast.
    plain = nullcontext() if q.device.type == "meta" else torch.autocast(q.device.type, enabled=False)
    size = len(queries), k.shape[2]
    bias = _spread(None if bias is None else precise(bias), *size) if selection.bias_selects else None
    blocked = _spread(blocked, *size)
    with torch.no_grad(), plain:
        best = rank
        unknown = q.device.type == "meta" and not is_in_torch_dispatch_mode()
        fits = (candidates is None or selection.k <= len(candidates)) and bias is None and blocked is None
        fits = fits and geometry.queries is None
        if unknown:
            best = without_data
        elif not by_position and fits and dispatch.selects(backend, q, k, selection):
            best = select.best_tokens if backend == "triton" else _fastest
        else:
            q, k = precise(q), precise(k)
        found = []
        for part, share in ((slice(0, split), 1.0), (slice(split, None), blend)):
            if len(queries[part]):
                more = (None if t is None else t[:, :, part] for t in (bias, blocked))
                search = Search(q[:, :, part], k, queries[part], candidates, geometry, selection, share, ranged, *more)
                found.append(best(search))
        chosen = found[0] if len(found) == 1 else join(*found)
        index, valid = in_slots(chosen.index, chosen.valid, selection.slots, queries, geometry)
        return Neighbors(index, valid, chosen.low, chosen.high, candidates)


def _spread(x: Tensor | None, queries: int, tokens: int) -> Tensor | None:
    return None if x is None else x.detach().expand(*(1,) * (4 - x.ndim), *x.shape[:-2], queries, tokens)


def possible_k(geometry: Geometry, selection: Selection, candidates: Tensor | None) -> int:
    """Return how many neighbours the queries get: k, or fewer where ``k_policy=clamp`` meets fewer candidates.

    With ``self_first`` a query that is no candidate has itself besides: one neighbour more than there are candidates.

    Raises:
        ValueError: if k exceeds the candidates and ``k_policy`` is ``error``.
    """
    available, most = most_candidates(geometry, selection, candidates)
    if spanned(selection) <= available:
        return selection.k
    if selection.rank_step > 1 and selection.k_policy == "error":
        raise ValueError(
            f"k={selection.k} with rank_step={selection.rank_step} needs {spanned(selection)} candidates of the "
            f"{available} of a {geometry.height}x{geometry.width} map; lower either or set k_policy=clamp"
        )
    if selection.k_policy == "error":
        raise ValueError(
            f"k={selection.k} exceeds the {available} candidates of a {geometry.height}x{geometry.width} map "
            f"(padding {geometry.padding}, {geometry.prefix} prefix tokens); lower k or set k_policy=clamp"
        )
    outsiders = selection.candidates in ("random", "grid") or geometry.queries_on_ring
    beside = (candidates is not None and outsiders) or selection.self_again is not None
    reach = most + int(selection.self_first and beside)
    return min(selection.k, 1 + (reach - 1) // selection.rank_step)


def rank(search: Search) -> Neighbors:
    """Return the k best candidates of the queries, best first, and the range of the similarities if it is asked for.

    Index shape: (B or 1, H or 1, Q, K).
    """
    scores = Scores(search)
    parts = _shared_out(scores, search.q.device) if runs_at_once() else _in_turn(scores)
    size = scores.batch, scores.heads
    if not parts:  # no query
        return Neighbors(torch.empty(*size, 0, search.selection.k, dtype=torch.int64, device=search.q.device))
    index, valid, low, high = (_assembled(parts, i) for i in range(4))
    if low is not None and high is not None:
        low, high = scores.similarity_range(low, high)
    found = (None if t is None else t.unflatten(0, size) for t in (index, valid, low, high))
    return Neighbors(*found)  # type: ignore[arg-type]


def _rank_precisely(search: Search) -> Neighbors:
    return rank(replace(search, q=precise(search.q), k=precise(search.k)))


def _fastest(search: Search) -> Neighbors:
    """Do what ``rank`` does, by plain torch or the kernel, whichever was measured to be faster."""

    def plain() -> tuple[Tensor | None, ...]:
        found = _rank_precisely(search)
        return found.index, found.valid, found.low, found.high

    ways: dict[str, Callable[[], object]] = {"torch": choice.as_in_graphs(plain)}
    ways["triton"] = partial(select.best_tokens, search)
    if torch.compiler.is_compiling():  # unmeasured, the kernel: it needs no scores of all pairs
        ways = dict(reversed(ways.items()))
    selection, (b, h, queries, channels) = search.selection, search.q.shape
    candidates = search.k.shape[2] if search.candidates is None else len(search.candidates)
    rough = {"items": b * h, "queries": queries, "candidates": candidates, "channels": channels}
    kind = f"{selection.similarity} {'by features' if at_end(search.blend, 1) else 'blended'}"
    way = choice.pick("selection", search.q, kind, {"k": selection.k}, rough, ways)
    return select.best_tokens(search) if way == "triton" else _rank_precisely(search)


def without_data(search: Search) -> Neighbors:
    """Return what ``rank`` returns, without its values: on the meta device nothing can be ranked.

    Where operations are counted ``rank`` itself runs.
    """
    q, selection, blocked = search.q, search.selection, search.blocked
    tokens = search.k.shape[2] if search.candidates is None else len(search.candidates)
    size = 1, 1, q.shape[2], 1
    if blocked is not None or not at_end(search.blend, 0):
        size = (*q.shape[:3], 1)
    index = q.new_empty(*size[:3], selection.k, dtype=torch.int64)
    valid = torch.empty_like(index, dtype=torch.bool) if lacking(selection, tokens, blocked) else None
    low, high = (precise(q).new_empty(size) if search.ranged else None for _ in "lh")
    return Neighbors(index, valid, low, high)


Piece = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def _in_turn(scores: Scores) -> list[list[Piece]]:
    return [[_ranked(scores, False, block) for block in blocks] for blocks in scores.blocks()]


def _shared_out(scores: Scores, device: torch.device) -> list[list[Piece]]:
    counts: list[int] = []

    def jobs() -> Iterator[Callable[[], Piece]]:
        for blocks in scores.blocks():
            counts.append(len(blocks))
            for block in blocks:
                yield partial(_ranked, scores, scores.compiled, block)

    pieces = iter(run_blocks(jobs(), device))
    return [list(islice(pieces, count)) for count in counts]


def _ranked(scores: Scores, compiled: bool, block: Block) -> Piece:
    """Return the best candidates of a block, (items, part, K), which of them are valid, and the range of the scores."""
    selection, valid = scores.selection, None
    own = scores.queries[block.part, None]
    if compiled:
        index, low, high = scores.best(block)
        index = index if scores.all else scores.tokens[index]
        if selection.self_first:
            index[..., :1] = own
    else:
        score, low, high = scores.compute(block)
        ranked = stable_topk(score, scores.kept)
        if scores.short:
            # Prefix tokens can have a score of -inf too, but come before the tokens that were taken out.
            taken = scores.taken(block)
            taken = torch.zeros_like(score, dtype=torch.bool) if taken is None else taken
            valid = ~taken.expand_as(score).gather(-1, ranked)
        index = scores.tokens[ranked]
        if selection.self_first:
            own = own.expand(*index.shape[:-1], 1)
            index = torch.cat([own, index], dim=-1)
            valid = None if valid is None else torch.cat([torch.ones_like(own, dtype=torch.bool), valid], dim=-1)
    if selection.rank_step > 1:
        index = index[..., :: selection.rank_step]
        valid = None if valid is None else valid[..., :: selection.rank_step]
    return index, valid, low, high


def _assembled(parts: list[list[Piece]], i: int) -> Tensor | None:
    """Put the i-th tensors of all pieces together; None where they are none."""
    if parts[0][0][i] is None:
        return None
    rows = [torch.cat([piece[i] for piece in row]) if len(row) > 1 else row[0][i] for row in parts]  # type: ignore[misc]
    return torch.cat(rows, dim=1) if len(rows) > 1 else rows[0]  # type: ignore[arg-type]
