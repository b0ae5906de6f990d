"""Aggregation along edges with its derivatives: products, distances, sums and convolutions of each query's neighbours.

No function keeps gathered neighbours for the backward pass, which gathers them again, a chunk at a time: kept are the
tokens, the weights and the edges. For second derivatives (``create_graph``) and for batches of gradients the neighbours
are gathered after all, see ``differentiated``.

Shapes: K neighbours, E queries and T tokens of all images and heads, D or C channels, O output channels, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from convnn.ops import native
from convnn.ops.edges import Edges, in_cache
from convnn.ops.precision import as_given
from convnn.ops.topk import runs_at_once

Backward = Callable[[Any, Tensor], tuple[Tensor | None, ...]]


def _keep(ctx: Any, edges: Edges, *tensors: Tensor | None) -> None:
    # Rows are saved as tensors are, so that a backward pass frees them; on ``ctx`` they would live as the loss does.
    ctx.save_for_backward(*tensors, edges.rows)
    ctx.graph = edges.num_tokens, edges.items, edges.ordered


def _kept(ctx: Any) -> tuple[Edges, list[Any]]:
    *tensors, rows = ctx.saved_tensors
    return Edges(rows, *ctx.graph), tensors


def differentiated(plain: Callable[..., Tensor]) -> Callable[[Backward], Backward]:
    """Make the backward pass of a ``Function`` differentiable: ``create_graph`` differentiates ``plain`` instead.

    The fast backward passes below work in place and call kernels whose own derivatives are wrong or missing, so
    autograd must not record them. Without ``create_graph`` gradients are off in a backward pass, nothing records it,
    and the fast one runs. With ``create_graph`` they are on: then the forward pass is computed once more in plain
    operations, and torch differentiates that, as often as it is asked to. So it does for several gradients at once
    (``is_grads_batched``), which work in place does not serve either.

    Args:
        plain: the forward pass in torch's own operations, of the saved tensors and the edges.
    """

    def decorate(backward: Backward) -> Backward:
        @wraps(backward)
        def chosen(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            again = torch.is_grad_enabled()
            if not (again or torch._C._functorch.is_legacy_batchedtensor(grad)) and runs_at_once():
                with as_given(grad):
                    return backward(ctx, grad)
            edges, saved = _kept(ctx)
            with torch.enable_grad(), as_given(grad):
                # ``Sum`` saves its table only if the weights need a gradient. If not, the output is linear in the
                # table, so that no gradient depends on the table's values, and zeros will do.
                shape = edges.num_tokens, grad.shape[-1]
                saved = [grad.new_zeros(shape, requires_grad=True) if need and x is None else x
                         for x, need in zip(saved, ctx.needs_input_grad, strict=False)]  # fmt: skip
                # Views, since one input may have been computed from another (weights from the table): the gradient
                # asked for is that of each input alone, and a view is where it stops.
                inputs = [None if x is None else x.view_as(x) for x in saved]
                wanted = [x for x, need in zip(inputs, ctx.needs_input_grad, strict=False) if need and x is not None]
                found = iter(torch.autograd.grad(plain(*inputs, edges), wanted, grad, create_graph=again))
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
        _keep(ctx, edges, queries, table)
        return edges.dot(queries, table)

    @staticmethod
    @differentiated(lambda queries, table, edges: (_gathered(table, None, edges) * queries[:, None]).sum(-1))
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        edges, (queries, table) = _kept(ctx)
        grad = grad.contiguous()
        for_queries = edges.gather_sum(table, grad) if ctx.needs_input_grad[0] else None
        for_table = edges.scatter_sum(queries, grad) if ctx.needs_input_grad[1] else None
        return for_queries, for_table, None


class Distance(torch.autograd.Function):
    """Negative squares of the distance of queries (E, D) to their tokens (T, D): (E, K), at least float32."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, table: Tensor, edges: Edges) -> Tensor:  # noqa: D102
        _keep(ctx, edges, queries, table)
        out = table.new_empty(edges.rows.shape, dtype=torch.promote_types(table.dtype, torch.float32))
        for part in edges.parts(table, edges.rows.shape[1] * table.shape[1]):
            away = edges.taken(table, part).sub_(queries[part, None])
            out[part] = away.square_().sum(-1, dtype=out.dtype).neg_()
        return out

    @staticmethod
    @differentiated(lambda queries, table, edges: -(_gathered(table, None, edges) - queries[:, None]).square().sum(-1))
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        edges, (queries, table) = _kept(ctx)
        for_queries, for_table = torch.zeros_like(queries), edges.zeros_for_tokens(table)
        for part in edges.parts(table, edges.rows.shape[1] * table.shape[1]):
            back = edges.taken(table, part).sub_(queries[part, None]).mul_(grad[part, :, None].to(table.dtype) * -2)
            torch.sum(back, 1, out=for_queries[part]).neg_()
            if ctx.needs_input_grad[1]:
                edges.add_to_tokens(for_table, part, back, None)
        return for_queries, for_table.to(table.dtype) if ctx.needs_input_grad[1] else None, None


class Sum(torch.autograd.Function):
    """Weighted sums of each query's tokens: table (T, D), weights (E, K) or None -> (E, D)."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, weights: Tensor | None, edges: Edges) -> Tensor:  # noqa: D102
        _keep(ctx, edges, table if ctx.needs_input_grad[1] else None, weights)
        return edges.gather_sum(table, weights)

    @staticmethod
    @differentiated(lambda table, weights, edges: _gathered(table, weights, edges).sum(1))
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        edges, (table, weights) = _kept(ctx)
        grad = grad.contiguous()
        for_table = edges.scatter_sum(grad, weights) if ctx.needs_input_grad[0] else None
        for_weights = edges.dot(grad, table) if ctx.needs_input_grad[1] else None
        return for_table, for_weights, None


class Largest(torch.autograd.Function):
    """The largest of each query's weighed tokens, per channel: table (T, D), weights (E, K) or None -> (E, D).

    ``valid`` (E, K) bool, or None: which neighbours count. As in ``torch.amax``, those that are equally large share
    the gradient.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, weights: Tensor | None, valid: Tensor | None, edges: Edges) -> Tensor:  # noqa: D102
        _keep(ctx, edges, table, weights, valid)
        out = table.new_empty(len(edges.rows), table.shape[1])
        for part in edges.parts(table, edges.rows.shape[1] * table.shape[1]):
            out[part] = _counting(_weighted(edges.taken(table, part), weights, part), valid, part).amax(1)
        return out

    @staticmethod
    @differentiated(
        lambda table, weights, valid, edges: _counting(
            _gathered(table, weights, edges), valid, slice(None), in_place=False
        ).amax(1)
    )
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        edges, (table, weights, valid) = _kept(ctx)
        for_table = edges.zeros_for_tokens(table) if ctx.needs_input_grad[0] else None
        for_weights = torch.empty_like(weights) if ctx.needs_input_grad[1] else None
        for part in edges.parts(table, edges.rows.shape[1] * table.shape[1]):
            taken = edges.taken(table, part)
            kept = taken if for_weights is None else taken.clone()
            taken = _counting(_weighted(taken, weights, part), valid, part)
            first = taken == taken.amax(1, keepdim=True)
            shared = grad[part] / first.sum(1)
            if valid is not None:
                first &= valid[part, :, None]
            back = torch.mul(first, shared[:, None], out=taken)
            if for_weights is not None:
                for_weights[part] = kept.mul_(back).sum(-1)
            if for_table is not None:
                edges.add_to_tokens(for_table, part, back, weights)
        return None if for_table is None else for_table.to(table.dtype), for_weights, None, None


def _counting(taken: Tensor, valid: Tensor | None, part: slice, in_place: bool = True) -> Tensor:
    """Put gathered rows (e, K, C) that do not count to -inf."""
    if valid is None:
        return taken
    out = ~valid[part, :, None]
    return taken.masked_fill_(out, -torch.inf) if in_place else taken.masked_fill(out, -torch.inf)


class Depthwise(torch.autograd.Function):
    """Sums with a weight per slot and channel: table (T, D), weights (E, K) or None, slots (K, D) -> (E, D)."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, weights: Tensor | None, slots: Tensor, edges: Edges) -> Tensor:  # noqa: D102
        _keep(ctx, edges, table, weights, slots)
        out = table.new_zeros(len(edges.rows), table.shape[1])
        if not in_cache(table):
            for part in edges.parts(table, slots.numel()):
                taken = _weighted(edges.taken(table, part), weights, part)
                torch.sum(taken.mul_(slots), 1, out=out[part])
            return out
        for part in edges.parts(table, table.shape[1]):
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
        edges, (table, weights, slots) = _kept(ctx)
        back = _depthwise_by_slots if in_cache(table) else _depthwise_by_chunks
        for_table, for_weights, for_slots = back(grad, table, weights, slots, edges)
        return for_table, for_weights, for_slots, None


def _depthwise_by_slots(
    grad: Tensor, table: Tensor, weights: Tensor | None, slots: Tensor, edges: Edges
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the gradients of ``Depthwise``, slot by slot: on a CPU the cache holds one at a time."""
    for_table, for_slots = torch.zeros_like(table), torch.zeros_like(slots)
    for_weights = None if weights is None else torch.empty_like(weights)
    for part in edges.parts(table, table.shape[1]):
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
    return for_table, for_weights, for_slots


def _depthwise_by_chunks(
    grad: Tensor, table: Tensor, weights: Tensor | None, slots: Tensor, edges: Edges
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the gradients of ``Depthwise``, all slots of a chunk together."""
    for_table, for_slots = edges.zeros_for_tokens(table), torch.zeros_like(slots, dtype=_of_sums(slots))
    for_weights = None if weights is None else torch.empty_like(weights)
    for part in edges.parts(table, slots.numel()):
        own = grad[part, None]
        product = edges.taken(table, part).mul_(own)
        if weights is None or for_weights is None:
            for_slots += product.sum(0, dtype=for_slots.dtype)
        else:
            by_slot = product.transpose(0, 1)  # (K, e, D)
            for_slots += torch.bmm(weights[part].t()[:, None], by_slot).squeeze(1)
            for_weights[part] = torch.bmm(by_slot, slots[..., None]).squeeze(-1).t()
        edges.add_to_tokens(for_table, part, torch.mul(own, slots, out=product), weights)
    return for_table.to(table.dtype), for_weights, for_slots.to(slots.dtype)


class Conv(torch.autograd.Function):
    """Full weights per slot: table (T, C), weights (E, K) or None, slots (G, K C / G, O / G) -> (E, O)."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, weights: Tensor | None, slots: Tensor, edges: Edges) -> Tensor:  # noqa: D102
        _keep(ctx, edges, table, weights, slots)
        out = table.new_empty(len(edges.rows), len(slots) * slots.shape[2])
        for part in edges.parts(table, slots.shape[0] * slots.shape[1]):
            taken = _in_groups(_weighted(edges.taken(table, part), weights, part), len(slots))
            if len(slots) == 1:
                torch.mm(taken[0], slots[0], out=out[part])
            else:
                out[part] = (taken @ slots).transpose(0, 1).flatten(1)
        return out

    @staticmethod
    @differentiated(
        lambda table, weights, slots, edges: (
            (_in_groups(_gathered(table, weights, edges), len(slots)) @ slots).transpose(0, 1).flatten(1)
        )
    )
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        edges, (table, weights, slots) = _kept(ctx)
        grad, groups = grad.contiguous(), len(slots)
        for_table = edges.zeros_for_tokens(table) if ctx.needs_input_grad[0] else None
        for_slots = torch.zeros_like(slots, dtype=_of_sums(slots)) if ctx.needs_input_grad[2] else None
        for_weights = torch.empty_like(weights) if ctx.needs_input_grad[1] else None
        for part in edges.parts(table, slots.shape[0] * slots.shape[1]):
            own = grad[part].unflatten(1, (groups, -1)).transpose(0, 1)  # (G, e, O / G)
            taken = edges.taken(table, part)
            back = None
            if for_table is not None or for_weights is not None:
                back = own @ slots.mT
                back = back.unflatten(2, (taken.shape[1], -1)).permute(1, 2, 0, 3).reshape(taken.shape)
            if for_weights is not None and back is not None:  # before ``_weighted``, which works in place
                for_weights[part] = (back * taken).sum(-1)
            if for_slots is not None:
                _add_product(for_slots, _in_groups(_weighted(taken, weights, part), groups).mT, own)
            del taken
            if for_table is not None and back is not None:
                edges.add_to_tokens(for_table, part, back, weights)
        for_table = None if for_table is None else for_table.to(table.dtype)
        return for_table, for_weights, None if for_slots is None else for_slots.to(slots.dtype), None


class ConvFirst(torch.autograd.Function):
    """``Conv`` of few tokens: all of them are multiplied by every slot, and each query sums up its products.

    Tokens (T, C), weights (E, K) or None, slots (C, K O), edges to the T K products -> (E, O). The products of a few
    items are held at once, in the backward pass too.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, weights: Tensor | None, slots: Tensor, edges: Edges) -> Tensor:  # noqa: D102
        _keep(ctx, edges, table, weights, slots)
        num, width = _slots_of(table, slots, edges)
        out = table.new_empty(len(edges.rows), width)
        for queries, products, part in edges.by_items(table, width):
            made = (table[_over(products, num)] @ slots).view(-1, width)
            out[queries] = part.gather_sum(made, None if weights is None else weights[queries])
        return out

    @staticmethod
    @differentiated(
        lambda table, weights, slots, edges: _gathered((table @ slots).view(edges.num_tokens, -1), weights, edges).sum(
            1
        )
    )
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        edges, (table, weights, slots) = _kept(ctx)
        num, width = _slots_of(table, slots, edges)
        grad = grad.contiguous()
        for_table, for_slots = torch.empty_like(table), torch.zeros_like(slots, dtype=_of_sums(slots))
        for_weights = torch.empty_like(weights) if ctx.needs_input_grad[1] else None
        for queries, products, part in edges.by_items(table, width):
            own, tokens = grad[queries], table[_over(products, num)]
            if for_weights is not None:
                for_weights[queries] = part.dot(own, (tokens @ slots).view(-1, width))
            back = part.scatter_sum(own, None if weights is None else weights[queries]).view(len(tokens), -1)
            torch.mm(back, slots.t(), out=for_table[_over(products, num)])
            _add_product(for_slots[None], tokens.t()[None], back[None])
        return for_table, for_weights, for_slots.to(slots.dtype), None


def _slots_of(table: Tensor, slots: Tensor, edges: Edges) -> tuple[int, int]:
    """Return how many slots a token is multiplied by, and the channels of a product."""
    num = edges.num_tokens // max(1, len(table))
    return num, slots.shape[1] // max(1, num)


def _over(rows: slice, num: int) -> slice:
    return slice(rows.start // num, rows.stop // num)


def _in_groups(taken: Tensor, groups: int) -> Tensor:
    """Return the channels of each group and slot side by side: (e, K, C) -> (G, e, K C / G)."""
    if groups == 1:
        return taken.flatten(1)[None]
    return taken.unflatten(2, (groups, -1)).permute(2, 0, 1, 3).flatten(2)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a @ b`` to ``total``, (G, n, m), in place."""
    if total.dtype != a.dtype:
        total += a @ b
    elif len(total) == 1:
        total[0].addmm_(a[0], b[0])
    else:
        total.baddbmm_(a, b)


def _of_sums(x: Tensor) -> torch.dtype:
    """Return the precision in which parts of a sum are added: float32 for half ones."""
    return torch.promote_types(x.dtype, torch.float32)


def _weighted(taken: Tensor, weights: Tensor | None, part: slice) -> Tensor:
    """Multiply gathered rows (e, K, C) in place by the weights of their edges."""
    return taken if weights is None else taken.mul_(weights[part, :, None])
