"""What candidates are compared by: features, position or a blend of both. Which are kept is ``selection``'s matter.

The terms of a score are prepared once, for the plain path here and for the Triton kernel alike; the plain path then
computes scores in blocks that fit a core's cache.

Shapes: B batch, H heads, Q queries, N tokens, M candidates, D channels per head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from convnn.ops import native
from convnn.ops.candidates import is_relative, out_of_reach
from convnn.ops.geometry import Geometry
from convnn.ops.precision import product
from convnn.ops.settings import Selection
from convnn.ops.similarity import ALIKE, deviation, own_similarity, score_terms, span, with_positions
from convnn.ops.threads import unobserved
from convnn.ops.topk import runs_at_once

# Scores held at once; more go through in chunks. On a CPU a chunk should stay in the cache (measured: 4 times faster
# than all at once for 4096 x 1156 scores), on a GPU it should only bound memory (16 Mi scores: 64
# MiB in float32, and the keys that they are ranked by).
CHUNK_SCORES = {"cpu": 1 << 19}
CHUNK_SCORES_ELSEWHERE = 1 << 24


def spanned(selection: Selection) -> int:
    """Return how many of a query's candidates, best first, its neighbours span."""
    return 1 + (selection.k - 1) * selection.rank_step


def lacking(selection: Selection, tokens: int, blocked: Tensor | None) -> bool:
    """Return whether queries can have fewer than k neighbours among so many candidates."""
    return is_relative(selection) or spanned(selection) > tokens or blocked is not None


def at_end(blend: float | Tensor, end: int) -> bool:
    """Return whether a blend stands at an end of the spectrum; a learned one (a tensor) never does."""
    return isinstance(blend, float) and blend == end


def precise(x: Tensor) -> Tensor:
    """Return float64 as it is and all else in float32, in which neighbours are ranked."""
    return x if x.dtype == torch.float64 else x.float()


@dataclass(frozen=True)
class Search:
    """Queries that look for their neighbours, and where they look."""

    q: Tensor
    """Queries, (B, H, Q, D)."""
    k: Tensor
    """Keys of all tokens, (B, H, N, D)."""
    queries: Tensor
    """The token that each query sits on, (Q,), or its number where it sits on none: ``Geometry.query_places``."""
    candidates: Tensor | None
    """Tokens that may be chosen, (M,); None: every token."""
    geometry: Geometry
    selection: Selection
    blend: float | Tensor
    """A number, (H,), or in a compiled graph ()."""
    ranged: bool
    """Find what the range of the similarities needs too, see ``convnn.ops.similarity.span``."""
    bias: Tensor | None = None
    """Added to the scores that choose, (B or 1, H or 1, Q, N)."""
    blocked: Tensor | None = None
    """Tokens that a query may not choose, (B or 1, H or 1, Q, N) bool."""


@dataclass(frozen=True)
class Terms:
    """What scores are made of, before any query meets a candidate."""

    q: Tensor
    """Queries, (B H, Q, D); with ``mix=concat`` coordinates stand behind the features."""
    k: Tensor
    """Keys of all tokens, (B H, N, D)."""
    share: float | Tensor
    """The blend: a number, (B H, 1, 1), or in a compiled graph () in float64."""
    mixed: bool
    """Position is still to be added to the scores of ``q`` and ``k`` (``mix=sum`` between the ends)."""
    floor: Tensor
    """Differences of similarity below this are rounding errors of the features, (B H, Q, 1)."""
    own: Tensor | None
    """Similarity of each query to its own token where that need not be a candidate, (B H, Q, 1)."""


def prepare(search: Search) -> Terms:
    """Return what the scores of ``search`` are made of."""
    q, k, blend, selection = search.q, search.k, search.blend, search.selection
    b, h = q.shape[:2]
    q, k = q.flatten(0, 1), k.flatten(0, 1)
    dtype = precise(q[:0]).dtype
    mixed = not (at_end(blend, 0) or at_end(blend, 1))
    share = blend.to(q.device) if isinstance(blend, Tensor) else blend
    if isinstance(share, Tensor) and (share.ndim or runs_at_once()):  # one that stays () is rounded as a number is
        share = share.to(dtype).expand(h).repeat(b)[:, None, None]
    own, floor = None, q.new_zeros(b * h, len(search.queries), 1, dtype=dtype)
    if search.ranged and selection.similarity == "euclidean":
        floor = ALIKE**2 * precise(q).square().sum(-1, keepdim=True)
    if search.ranged and selection.self_first and search.candidates is not None:
        own = own_similarity(precise(q), precise(k[:, search.queries]), selection.similarity)
        if search.bias is not None:
            column = search.queries[:, None].expand(*search.bias.shape[:-1], 1)
            own = own + search.bias.gather(-1, column).expand(b, h, -1, -1).flatten(0, 1)
    if mixed and selection.mix == "concat":
        q, k, mixed = precise(q), precise(k), False
        positions, scale = search.geometry.positions(q.device), deviation(k)
        q, k = with_positions(q, positions[search.queries], share, scale), with_positions(k, positions, share, scale)
    return Terms(q, k, share, mixed, floor, own)


def whole_range(low: Tensor, high: Tensor, doubled: Tensor, own: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """Return the range of similarities from that of scores, which leave out each query's own square.

    Args:
        low: least score of each query, (B H, Q, 1).
        high: largest score.
        doubled: the queries as ``score_terms`` returns them; twice the queries where the distance is Euclidean.
        own: see ``Terms``; the query's own token is a neighbour even where it is no candidate.
        kind: of similarity.
    """
    if kind == "euclidean":
        own_square = (doubled / 2).square().sum(-1, keepdim=True)
        low, high = low - own_square, high - own_square
    return (low, high) if own is None else (torch.minimum(low, own), torch.maximum(high, own))


@dataclass(frozen=True)
class Block:
    """Some queries of some images and heads, all of whose candidates are compared together."""

    items: slice
    """Of the B H images and heads."""
    part: slice
    """Of the Q queries."""
    own: Tensor
    """The tokens that the queries sit on, (part,)."""
    distance: Tensor | tuple[Tensor, Tensor] | None
    """From the queries to every candidate where position counts, (part, M), as a share of the map if it is blended; or
    with ``Scores.along_axes`` to every row and to every column, (part, rows) and (part, columns)."""
    outside: Tensor | None
    """Candidates out of reach, (part, M) bool; None: none."""
    taken: Tensor | None
    """Which candidates may not be ranked: those out of reach, and the query itself where it has its place, (part, M)
    bool; None: at most the query itself."""


class Scores:
    """The scores of queries for all candidates, in blocks, and the range of the similarities."""

    def __init__(self, search: Search) -> None:
        """Prepare; queries and keys are float32 or float64."""
        self.geometry, self.selection, self.queries = search.geometry, search.selection, search.queries
        self.ranged, self.by_position = search.ranged, at_end(search.blend, 0)
        candidates = search.candidates
        self.all = candidates is None
        """Every token is a candidate, so that column and token are the same."""
        self.tokens = torch.arange(search.k.shape[2], device=search.q.device) if candidates is None else candidates
        alike = self.by_position and search.blocked is None
        self.batch, self.heads = (1, 1) if alike else search.q.shape[:2]
        self.added = None if self.by_position else self._of_candidates(search.bias)
        self.blocked = self._of_candidates(search.blocked)
        self.terms = prepare(search)
        if not self.by_position:
            keys = self.terms.k if self.all else self.terms.k[:, self.tokens]
            self.q, keys, self.bias = score_terms(self.terms.q, keys, self.selection.similarity)
            self.keys = keys.mT
        self.compiled = runs_at_once() and self._serves()
        """``native`` ranks pairs: nothing but position, a blend and the query itself bears on their scores."""
        every = self.all and self.selection.distance == "chebyshev"
        self.along_axes = self.compiled and self.terms.mixed and every
        """It finds distances itself, from those along both axes."""

    @property
    def kept(self) -> int:
        """How many candidates are ranked for each query: all that its neighbours span but itself, where it is first."""
        return spanned(self.selection) - int(self.selection.self_first)

    @property
    def short(self) -> bool:
        """Queries can have fewer than k neighbours: the last slots hold fillers that do not count."""
        return lacking(self.selection, len(self.tokens), self.blocked)

    def _serves(self) -> bool:
        plain = self.selection.self_again is None and self.selection.score_step is None
        if self.by_position or self.short or self.added is not None or not plain or not unobserved():
            return False
        return native.serves(self.kept, self.q, self.keys, self.bias)

    def blocks(self) -> Iterator[list[Block]]:
        """Yield for each part of the queries its blocks, one for each part of the items.

        What depends on positions alone is computed once for each part of the queries. Graphs that are compiled, traced
        or transformed get one block of everything: loops over sizes would fix the size of the batch.
        """
        items, queries, tokens = self.batch * self.heads, self.queries, self.tokens
        step, item_step = len(queries), items
        if runs_at_once():
            limit = CHUNK_SCORES.get(queries.device.type, CHUNK_SCORES_ELSEWHERE)
            if self.compiled and self.q.shape[-1] <= native.FEW_CHANNELS:  # whose scores are not held at all
                limit = max(limit, items * len(queries) * len(tokens) // (4 * torch.get_num_threads()))
            step = min(len(queries), max(1, limit // len(tokens)))
            item_step = max(1, limit // (len(tokens) * step))
        for first in range(0, len(queries), step) if step else ():
            part = slice(first, first + step)
            own = queries[part]
            outside = out_of_reach(self.geometry, self.selection, own, tokens)
            taken = outside
            apart = self.selection.self_first and self.selection.self_again is None
            if apart and not (self.all and outside is None):
                itself = own[:, None] == tokens
                taken = itself if outside is None else outside | itself
            distance = self._distance(own) if self.by_position or self.terms.mixed else None
            starts = range(0, items, item_step) if runs_at_once() and items else (0,)
            yield [Block(slice(i, i + item_step), part, own, distance, outside, taken) for i in starts]

    def best(self, block: Block) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return what ``stable_topk`` makes of ``compute``, behind a slot for the query itself where it is first, and
        the range, where ``compiled`` says that this can."""
        share, items, first = self.terms.share, block.items, int(self.selection.self_first)
        ranking = native.Ranking(
            self.kept,
            own=self._own_columns[block.own] if first else torch.full_like(block.own, -1),
            share=share[items].detach() if isinstance(share, Tensor) else share,
            distance=block.distance,
            floor=self.terms.floor[items, block.part] if self.ranged else None,
            alike=ALIKE,
        )
        bias = None if self.bias is None else self.bias[items].detach()
        return native.rank_pairs(self.q[items, block.part].detach(), self.keys[items].detach(), bias, ranking, first)

    @cached_property
    def _own_columns(self) -> Tensor:
        """The column of each token among the candidates; -1: none."""
        columns = torch.full((self.terms.k.shape[1],), -1)
        columns[self.tokens] = torch.arange(len(self.tokens))
        return columns

    def compute(self, block: Block) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the scores of a block, (items, part, M), and least and largest of each query if they were asked for.

        Scores are -inf where a candidate may not be ranked.
        """
        score, low, high = self._score(block)
        again, taken, own = self.selection.self_again, self.taken(block), block.own
        if self.selection.self_first and again is not None:
            score = score.masked_fill_(own[:, None] == self.tokens, again)
        if self.selection.score_step is not None and not self.by_position:
            score = score.div(self.selection.score_step).round_()
        if taken is not None:
            if self.blocked is not None:  # a prefix token at -inf is allowed, and comes before those that are not
                score = score.clamp_(min=torch.finfo(score.dtype).min)
            score = score.masked_fill_(taken, -torch.inf)
        elif self.selection.self_first and again is None:
            score = score.scatter_(-1, own[:, None].expand(*score.shape[:-1], 1), -torch.inf)
        return score, low, high

    def taken(self, block: Block) -> Tensor | None:
        """Return which candidates of a block may not be ranked, ([items,] part, M) bool; None: see ``Block.taken``."""
        blocked = self._part(self.blocked, block)
        if blocked is None:
            return block.taken
        taken = block.taken
        if taken is None and self.selection.self_first and self.selection.self_again is None:
            taken = block.own[:, None] == self.tokens
        return blocked if taken is None else blocked | taken

    def _of_candidates(self, x: Tensor | None) -> Tensor | None:
        """Return the columns of the candidates: (B or 1, H or 1, Q, N) -> (B, H, Q, M)."""
        if x is None:
            return None
        return (x if self.all else x[..., self.tokens]).expand(self.batch, self.heads, -1, -1)

    def _part(self, x: Tensor | None, block: Block) -> Tensor | None:
        """Return the rows of a block: (B, H, Q, M) -> (items, part, M)."""
        if x is None:
            return None
        items = torch.arange(self.batch * self.heads, device=x.device)[block.items]
        return x[items // self.heads, items % self.heads, block.part]

    def _distance(self, own: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return the distance from queries on the tokens ``own`` to every candidate, as a ``Block`` has it."""
        if self.along_axes:
            rows, cols = (steps.to(self.q.dtype) / self.geometry.extent for steps in self.geometry.steps_to_all(own))
            return rows, cols
        if self.all:
            distance = self.geometry.distance_to_all(own, self.selection.distance)
        else:
            distance = self.geometry.distance(own[:, None], self.tokens, self.selection.distance)
        if self.geometry.prefix:
            distance = distance.masked_fill(self.tokens < self.geometry.prefix, torch.inf)
        return distance if self.by_position else distance.to(self.q.dtype) / self.geometry.extent

    def _score(self, block: Block) -> tuple[Tensor, Tensor | None, Tensor | None]:
        items, part, distance, outside = block.items, block.part, block.distance, block.outside
        if self.by_position:
            assert isinstance(distance, Tensor)
            blocked = self._part(self.blocked, block)
            return -(distance[None] if blocked is None else distance.expand(blocked.shape)), None, None
        score = product(self.q[items, part], self.keys[items])
        if self.bias is not None:
            score = score + self.bias[items]
        added, blocked = self._part(self.added, block), self._part(self.blocked, block)
        score = score if added is None else score + added
        if blocked is not None:
            outside = blocked if outside is None else blocked | outside
        if not self.ranged:
            return score, None, None
        low = _within(score, outside, torch.inf).amin(-1, keepdim=True)  # aminmax takes ten times as long
        high = _within(score, outside, -torch.inf).amax(-1, keepdim=True)
        if self.terms.mixed:
            assert isinstance(distance, Tensor)
            share = self.terms.share
            share = share[items] if isinstance(share, Tensor) and share.ndim else share
            least, largest = span(low, high, self.terms.floor[items, part])
            # As blend_scores does, in place: the block is the largest thing here.
            score.sub_(least).mul_(share / (largest - least)).sub_((1 - share) * distance)
        return score, low, high

    def similarity_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return least and largest similarity of each query from those of the scores of all blocks, (B H, Q, 1)."""
        low, high = span(low, high, self.terms.floor)
        return whole_range(low, high, self.q, self.terms.own, self.selection.similarity)


def _within(score: Tensor, outside: Tensor | None, fill: float) -> Tensor:
    return score if outside is None else score.masked_fill(outside, fill)
