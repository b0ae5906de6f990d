"""Neighbour aggregation without the gathered block: sums, products and convolutions over the edges of a graph.

The neighbours of all queries, gathered, are K times as large as the tokens, and on a CPU moving them costs more than
the arithmetic. Neighbours are instead the edges of a sparse graph from queries to tokens: weighted sums are
``F.embedding_bag``, dot products ``torch.sparse.sampled_addmm``, and what needs the gathered neighbours (weights per
slot) gathers a few queries' at a time. The backward pass sums over the transposed graph: for each token, the queries
that chose it. For second derivatives (``create_graph``) the neighbours are gathered after all, see ``differentiated``.

Shapes: B batch, H heads, Q queries, N tokens, K neighbours, E = B H Q queries and T = B H N tokens in all, D or C
channels, O output channels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convnn.ops import native

BLOCK = 1 << 19
"""Gathered elements held at once: 2 MiB in float32, which stay in a core's cache."""


class Edges:
    """Which tokens each query takes, as rows of a table of all tokens (T, D)."""

    def __init__(self, index: Tensor, batch: int, heads: int, num_tokens: int) -> None:
        """Take token indices (B or 1, H or 1, Q, K)."""
        b, h, q, k = batch, heads, *index.shape[2:]
        self.num_tokens = b * h * num_tokens
        small = max(self.num_tokens, b * h * q * k) < 2**31  # int32 halves what is read of the indices
        # Row of token n of batch item b and head h: (b * H + h) * N + n.
        start = torch.arange(b * h, device=index.device).mul_(num_tokens).view(b, h, 1, 1)
        self.rows = (index + start).to(torch.int32 if small else torch.int64).view(-1, k)
        """Rows of the neighbours, (E, K)."""

    @cached_property
    def _by_token(self) -> tuple[Tensor, Tensor]:
        """The transposed graph: edges, as flat indices of ``rows``, sorted by token, and where each token's begin."""
        tokens, order = self.rows.flatten().sort(stable=True)
        every = torch.arange(self.num_tokens, device=tokens.device, dtype=tokens.dtype)
        start = torch.searchsorted(tokens, every, out_int32=tokens.dtype == torch.int32)
        return order.to(tokens.dtype), start

    def gather_sum(self, table: Tensor, weights: Tensor | None) -> Tensor:
        """Return each query's sum of ``weights`` (E, K) times its tokens: (T, D) -> (E, D)."""
        return F.embedding_bag(self.rows, table, mode="sum", per_sample_weights=weights)

    def scatter_sum(self, values: Tensor, weights: Tensor | None) -> Tensor:
        """Return each token's sum of ``weights`` (E, K) times the queries that take it: (E, D) -> (T, D)."""
        edges, start = self._by_token
        # Edge number e K + r is slot r of query e.
        queries = edges.div(self.rows.shape[1], rounding_mode="floor")
        weights = None if weights is None else weights.flatten()[edges]
        return F.embedding_bag(queries, values, start, mode="sum", per_sample_weights=weights)

    def dot(self, queries: Tensor, table: Tensor) -> Tensor:
        """Return the products of each query with its tokens: (E, D), (T, D) -> (E, K)."""
        e, k = self.rows.shape
        _accept_sparse()
        # A sparse matrix (E, T) with K entries in every row; sampled_addmm computes queries @ table.T at these alone.
        start = torch.arange(e + 1, device=queries.device, dtype=self.rows.dtype) * k
        empty = queries.new_zeros(e * k)
        graph = torch.sparse_csr_tensor(start, self.rows.flatten(), empty, (e, len(table)), check_invariants=False)
        return torch.sparse.sampled_addmm(graph, queries, table.t()).values().view(e, k)

    def parts(self, width: int) -> Iterator[slice]:
        """Yield slices of the queries; gathered, at ``width`` elements a query, a slice stays within ``BLOCK``."""
        step = max(1, BLOCK // max(width, 1))
        for first in range(0, len(self.rows), step):
            yield slice(first, first + step)


@lru_cache(maxsize=1)
def _accept_sparse() -> None:
    """Silence torch's warning that sparse CSR tensors are in beta: it comes once, here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1))


Backward = Callable[[Any, Tensor], tuple[Tensor | None, ...]]


def differentiated(plain: Callable[..., Tensor]) -> Callable[[Backward], Backward]:
    """Make the backward pass of a ``Function`` differentiable: ``create_graph`` differentiates ``plain`` instead.

    The fast backward passes below work in place and call kernels whose own derivatives are wrong or missing, so
    autograd must not record them. Without ``create_graph`` gradients are off in a backward pass, nothing records it,
    and the fast one runs. With ``create_graph`` they are on: then the forward pass is computed once more in plain
    operations, and torch differentiates that, as often as it is asked to.

    Args:
        plain: the forward pass in torch's own operations, of the saved tensors and the edges.
    """

    def decorate(backward: Backward) -> Backward:
        @wraps(backward)
        def chosen(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            if not torch.is_grad_enabled():
                return backward(ctx, grad)
            shape = ctx.edges.num_tokens, grad.shape[1]
            # ``Sum`` saves its table only if the weights need a gradient. If not, the output is linear in the table, so
            # that no gradient depends on the table's values, and zeros will do.
            saved = [grad.new_zeros(shape, requires_grad=True) if need and x is None else x
                     for x, need in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)]  # fmt: skip
            # Views, since one input may have been computed from another (weights from the table): the gradient asked
            # for is that of each input alone, and a view is where it stops.
            inputs = [None if x is None else x.view_as(x) for x in saved]
            wanted = [x for x, need in zip(inputs, ctx.needs_input_grad, strict=False) if need and x is not None]
            found = iter(torch.autograd.grad(plain(*inputs, ctx.edges), wanted, grad, create_graph=True))
            return tuple(next(found) if need else None for need in ctx.needs_input_grad)

        return chosen

    return decorate


def _gathered(table: Tensor, weights: Tensor | None, edges: Edges) -> Tensor:
    """Return each query's weighed tokens: (T, D) -> (E, K, D)."""
    taken = table.index_select(0, edges.rows.flatten()).view(*edges.rows.shape, -1)
    return taken if weights is None else taken * weights[..., None]


class Dot(torch.autograd.Function):
    """Products of queries (E, D) with their tokens (T, D): (E, K)."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, table: Tensor, edges: Edges) -> Tensor:  # noqa: D102
        ctx.save_for_backward(queries, table)
        ctx.edges = edges
        return edges.dot(queries, table)

    @staticmethod
    @differentiated(lambda queries, table, edges: (_gathered(table, None, edges) * queries[:, None]).sum(-1))
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        (queries, table), edges = ctx.saved_tensors, ctx.edges
        grad = grad.contiguous()
        for_queries = edges.gather_sum(table, grad) if ctx.needs_input_grad[0] else None
        for_table = edges.scatter_sum(queries, grad) if ctx.needs_input_grad[1] else None
        return for_queries, for_table, None


class Sum(torch.autograd.Function):
    """Weighted sums of each query's tokens: table (T, D), weights (E, K) or None -> (E, D)."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, weights: Tensor | None, edges: Edges) -> Tensor:  # noqa: D102
        ctx.save_for_backward(table if ctx.needs_input_grad[1] else None, weights)
        ctx.edges = edges
        return edges.gather_sum(table, weights)

    @staticmethod
    @differentiated(lambda table, weights, edges: _gathered(table, weights, edges).sum(1))
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        (table, weights), edges = ctx.saved_tensors, ctx.edges
        grad = grad.contiguous()
        for_table = edges.scatter_sum(grad, weights) if ctx.needs_input_grad[0] else None
        for_weights = edges.dot(grad, table) if ctx.needs_input_grad[1] else None
        return for_table, for_weights, None


class Depthwise(torch.autograd.Function):
    """Sums with a weight per slot and channel: table (T, D), weights (E, K) or None, slots (K, D) -> (E, D)."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, weights: Tensor | None, slots: Tensor, edges: Edges) -> Tensor:  # noqa: D102
        ctx.save_for_backward(table, weights, slots)
        ctx.edges = edges
        out = table.new_zeros(len(edges.rows), table.shape[1])
        for part in edges.parts(table.shape[1]):
            own = out[part]
            for slot, rows in enumerate(edges.rows[part].t()):
                taken = table.index_select(0, rows)
                if weights is not None:
                    taken *= weights[part, slot, None]
                own.addcmul_(taken, slots[slot])
        return out

    @staticmethod
    @differentiated(lambda table, weights, slots, edges: (_gathered(table, weights, edges) * slots).sum(1))
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        (table, weights, slots), edges = ctx.saved_tensors, ctx.edges
        for_table, for_slots = torch.zeros_like(table), torch.zeros_like(slots)
        for_weights = None if weights is None else torch.empty_like(weights)
        for part in edges.parts(table.shape[1]):
            own = grad[part]
            for slot, rows in enumerate(edges.rows[part].t()):
                product = table.index_select(0, rows).mul_(own)
                back = own * slots[slot]
                if weights is None or for_weights is None:
                    for_slots[slot] += product.sum(0)
                else:
                    weight = weights[part, slot]
                    for_slots[slot] += weight @ product
                    for_weights[part, slot] = product @ slots[slot]
                    back *= weight[:, None]
                native.add_rows(for_table, rows, back)
        return for_table, for_weights, for_slots, None


class Conv(torch.autograd.Function):
    """Full weights per slot: table (T, C), weights (E, K) or None, slots (K C, O) -> (E, O)."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, weights: Tensor | None, slots: Tensor, edges: Edges) -> Tensor:  # noqa: D102
        ctx.save_for_backward(table, weights, slots)
        ctx.edges = edges
        out = table.new_empty(len(edges.rows), slots.shape[1])
        for part in edges.parts(len(slots)):
            taken = _weighted(table.index_select(0, edges.rows[part].flatten()), weights, part)
            torch.mm(taken.view(-1, len(slots)), slots, out=out[part])
        return out

    @staticmethod
    @differentiated(lambda table, weights, slots, edges: _gathered(table, weights, edges).flatten(1) @ slots)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        (table, weights, slots), edges = ctx.saved_tensors, ctx.edges
        grad = grad.contiguous()
        for_table, for_slots = torch.zeros_like(table), torch.zeros_like(slots)
        for_weights = None if weights is None else torch.empty_like(weights)
        for part in edges.parts(len(slots)):
            rows, own = edges.rows[part].flatten(), grad[part]
            taken = table.index_select(0, rows)
            back = (own @ slots.t()).view(len(rows), -1)
            # Before ``_weighted``, which multiplies ``taken`` and ``back`` in place.
            if for_weights is not None:
                for_weights[part] = (back * taken).sum(-1).view(len(own), -1)
            for_slots.addmm_(_weighted(taken, weights, part).view(len(own), -1).t(), own)
            native.add_rows(for_table, rows, _weighted(back, weights, part))
        return for_table, for_weights, for_slots, None


def _weighted(taken: Tensor, weights: Tensor | None, part: slice) -> Tensor:
    """Multiply gathered rows (E K, C) in place by the weights of their edges."""
    return taken if weights is None else taken.mul_(weights[part].reshape(-1, 1))
