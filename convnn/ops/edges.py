"""The graph of neighbours: edges from queries to tokens, and sums along them that hold no block of gathered neighbours.

The neighbours of all queries, gathered, are K times as large as the tokens: on a CPU moving them costs more than the
arithmetic, on a GPU they are what fills the memory. Neighbours are instead the edges of a sparse graph from queries to
tokens. Weighted sums are ``F.embedding_bag``. What needs the neighbours themselves gathers those of a few queries at a
time, as many as stay in a core's cache or within ``CHUNK_BYTES``. Sums for the tokens, which a backward pass needs, go
over the transposed graph: for each token, the queries that chose it, always in the same order.

Shapes: N tokens of an item (an image and head), K neighbours, E queries and T tokens of all items, D or C channels.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from convnn.ops import native

BLOCK = 1 << 19
"""Gathered elements held at once on a CPU: 2 MiB in float32, which stay in a core's cache."""
CHUNK_BYTES = 1 << 27
"""Bytes of gathered neighbours held at once elsewhere. A backward pass holds up to three such chunks: the neighbours,
their gradient, and where the neighbours' weights get one too the product of both."""

_in_order: ContextVar[bool] = ContextVar("in_order", default=True)
_transposed = WeakTensorKeyDictionary()
"""The transposed graph of ``rows``, for as long as these exist: two steps of one layer share it."""


@contextmanager
def summed_in_order(always: bool) -> Iterator[None]:
    """Choose how layers called inside sum gradients for tokens, on a GPU and in half precision.

    Args:
        always: over the transposed graph, in the same order each time; else with ``index_add_``, whose order on a GPU
            is that of chance, except under torch's deterministic algorithms, and which sorts no edges.
    """
    token = _in_order.set(always)
    try:
        yield
    finally:
        _in_order.reset(token)


def in_cache(x: Tensor) -> bool:
    """Return whether neighbours are gathered in parts for a core's cache: on a CPU, in float32 or float64."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


class Edges:
    """Which tokens each query takes, as rows of a table of all tokens (T, D)."""

    def __init__(self, rows: Tensor, num_tokens: int, items: int, ordered: bool = True) -> None:
        """Take the rows of the table, (E, K).

        Args:
            rows: int32 or int64; a query's tokens are those of its item.
            num_tokens: T.
            items: images times heads; each has E / items queries and T / items tokens, in order.
            ordered: see ``summed_in_order``.
        """
        self.rows, self.num_tokens, self.items, self.ordered = rows, num_tokens, items, ordered

    @classmethod
    def of(cls, index: Tensor, batch: int, heads: int, num_tokens: int) -> Edges:
        """Return the graph of token indices (B or 1, H or 1, Q, K) among N tokens of each of B times H items."""
        b, h, q, k = batch, heads, *index.shape[2:]
        tokens = b * h * num_tokens
        small = max(tokens, b * h * q * k) < 2**31  # int32 halves what is kept and read of the indices
        # Row of token n of batch item b and head h: (b * H + h) * N + n.
        start = torch.arange(b * h, device=index.device).mul_(num_tokens).view(b, h, 1, 1)
        rows = (index + start).to(torch.int32 if small else torch.int64).view(-1, k)
        return cls(rows, tokens, b * h, _in_order.get())

    def gather_sum(self, table: Tensor, weights: Tensor | None) -> Tensor:
        """Return each query's sum of ``weights`` (E, K) times its tokens: (T, D) -> (E, D)."""
        return F.embedding_bag(self.rows, table, mode="sum", per_sample_weights=weights)

    def scatter_sum(self, values: Tensor, weights: Tensor | None) -> Tensor:
        """Return each token's sum of ``weights`` (E, K) times the queries that take it: (E, D) -> (T, D)."""
        if not (self.ordered or in_cache(values)):
            return self._scatter_by_chance(values, weights)
        edges, start = self._by_token()
        # Edge number e K + r is slot r of query e.
        queries = edges.div(self.rows.shape[1], rounding_mode="floor")
        weights = None if weights is None else weights.flatten()[edges]
        return F.embedding_bag(queries, values, start, mode="sum", per_sample_weights=weights)

    def _scatter_by_chance(self, values: Tensor, weights: Tensor | None) -> Tensor:
        total = self.zeros_for_tokens(values.new_empty(self.num_tokens, values.shape[1]))
        k = self.rows.shape[1]
        for part in self.parts(values, k * values.shape[1]):
            own = values[part, None].expand(-1, k, -1)
            own = own.contiguous() if weights is None else own * weights[part, :, None]
            self.add_to_tokens(total, part, own, None)
        return total.to(values.dtype)

    def dot(self, queries: Tensor, table: Tensor) -> Tensor:
        """Return the products of each query with its tokens: (E, D), (T, D) -> (E, K)."""
        e, k = self.rows.shape
        if not in_cache(table):
            out = queries.new_empty(e, k)
            for part in self.parts(table, k * table.shape[1]):
                torch.bmm(self.taken(table, part), queries[part, :, None], out=out[part, :, None])
            return out
        _accept_sparse()
        # A sparse matrix (E, T) with K entries in every row; sampled_addmm computes queries @ table.T at these alone.
        start = torch.arange(e + 1, device=queries.device, dtype=self.rows.dtype) * k
        empty = queries.new_zeros(e * k)
        graph = torch.sparse_csr_tensor(start, self.rows.flatten(), empty, (e, len(table)), check_invariants=False)
        return torch.sparse.sampled_addmm(graph, queries, table.t()).values().view(e, k)

    def parts(self, table: Tensor, width: int) -> Iterator[slice]:
        """Yield slices of the queries whose gathered neighbours may be held at once: whole items where these fit.

        Args:
            table: the tokens.
            width: elements that a query gathers.
        """
        limit = BLOCK if in_cache(table) else CHUNK_BYTES // table.element_size()
        step, own = max(1, limit // max(width, 1)), self._queries
        step -= step % own if step > own else 0
        for first in range(0, len(self.rows), step):
            yield slice(first, min(first + step, len(self.rows)))

    def by_items(self, table: Tensor, width: int) -> Iterator[tuple[slice, slice, Edges]]:
        """Yield queries, tokens and graph of as many whole items, at least one, as may be held at once.

        Args:
            table: the tokens, whose bytes count.
            width: elements to be held for a token.
        """
        own, tokens = self._queries, self.num_tokens // max(1, self.items)
        step = max(1, CHUNK_BYTES // max(1, tokens * width * table.element_size()))
        if step >= self.items:
            yield slice(0, len(self.rows)), slice(0, self.num_tokens), self
            return
        for first in range(0, self.items, step):
            last = min(first + step, self.items)
            queries, place = slice(first * own, last * own), slice(first * tokens, last * tokens)
            rows = self.rows[queries] - place.start
            yield queries, place, Edges(rows, place.stop - place.start, last - first, self.ordered)

    def taken(self, table: Tensor, part: slice) -> Tensor:
        """Return the neighbours of some queries, gathered: (T, C) -> (part, K, C)."""
        rows = self.rows[part]
        return table.index_select(0, rows.flatten()).view(*rows.shape, table.shape[1])

    def add_to_tokens(self, total: Tensor, part: slice, values: Tensor, weights: Tensor | None) -> None:
        """Add what the edges of some queries bring to their tokens, in place.

        Args:
            total: of the tokens, (T, C).
            part: of the queries, from ``parts``.
            values: of their edges, (part, K, C); may be overwritten.
            weights: of all edges, (E, K), or None.
        """
        values, factors = values.flatten(0, 1), None if weights is None else weights[part].flatten()
        if self.ordered and not in_cache(total):
            tokens, whole = self._tokens_of(part)
            edges, start = self._by_token_within(part, tokens, whole)
            factors = None if factors is None else factors[edges]
            sums = F.embedding_bag(edges, values, start, mode="sum", per_sample_weights=factors)
            if whole:
                total[tokens] = sums
            else:
                total[tokens] += sums
            return
        values = values if factors is None else values.mul_(factors[:, None])
        native.add_rows(total, self.rows[part].flatten(), values.to(total.dtype))

    def zeros_for_tokens(self, table: Tensor) -> Tensor:
        """Return what ``add_to_tokens`` starts from; unordered sums of half precision are float32."""
        half = table.element_size() < 4 and not self.ordered
        return torch.zeros_like(table, dtype=torch.float32 if half else table.dtype)

    @property
    def _queries(self) -> int:
        """Of an item."""
        return max(1, len(self.rows) // max(1, self.items))

    def _tokens_of(self, part: slice) -> tuple[slice, bool]:
        """Return the tokens of the items of some queries, and whether these are all queries of the items."""
        own, tokens = self._queries, self.num_tokens // max(1, self.items)
        first, last = part.start // own, -(-part.stop // own)
        return slice(first * tokens, last * tokens), (part.start, part.stop) == (first * own, last * own)

    def _by_token(self) -> tuple[Tensor, Tensor]:
        """The transposed graph: edges, as flat indices of ``rows``, sorted by token, and where each token's begin."""
        found = _transposed.get(self.rows)
        if found is None:
            found = _transposed[self.rows] = _sorted_by_token(self.rows.flatten(), self.num_tokens)
        return found

    def _by_token_within(self, part: slice, tokens: slice, whole: bool) -> tuple[Tensor, Tensor]:
        """Return the transposed graph of some queries, the first of their edges and of ``tokens`` being number 0."""
        if not whole:
            return _sorted_by_token(self.rows[part].flatten() - tokens.start, tokens.stop - tokens.start)
        edges, start = self._by_token()
        k = self.rows.shape[1]
        if part.stop - part.start == len(self.rows):
            return edges, start
        return edges[part.start * k : part.stop * k] - part.start * k, start[tokens] - part.start * k


def _sorted_by_token(rows: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    tokens, order = rows.sort(stable=True)
    every = torch.arange(num_tokens, device=tokens.device, dtype=tokens.dtype)
    start = torch.searchsorted(tokens, every, out_int32=tokens.dtype == torch.int32)
    return order.to(tokens.dtype), start


@lru_cache(maxsize=1)
def _accept_sparse() -> None:
    """Silence torch's warning that sparse CSR tensors are in beta: it comes once, here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1))
