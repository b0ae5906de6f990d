"""The operator: geometry -> similarity -> selection -> aggregation, without parameters of its own.

Shapes: B batch, H heads, Q queries, N tokens, K neighbours, D channels per head, C input and O output channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convnn.ops import choice, natten
from convnn.ops.aggregation import (
    gather_tokens,
    max_of_neighbors,
    mix,
    mix_candidates,
    neighbor_similarity,
    walks_edges,
    with_own_scores,
)
from convnn.ops.edges import Edges, in_cache, summed_in_order
from convnn.ops.geometry import Geometry
from convnn.ops.neighbors import Neighbors
from convnn.ops.selection import select_neighbors
from convnn.ops.settings import Mixing, Selection
from convnn.ops.similarity import blend_scores, deviation, pair_similarity, with_positions
from convnn.ops.triton import attention, dispatch


def neighbor_aggregate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: Geometry,
    selection: Selection,
    mixing: Mixing,
    *,
    blend: float | Tensor = 1.0,
    weight: Tensor | None = None,
    groups: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    bias: Tensor | None = None,
    blocked: Tensor | None = None,
) -> Tensor:
    """Aggregate each query's nearest neighbours (ConvNN, arXiv 2511.14137, section 3).

    Args:
        q: queries (B, H, Q, D).
        k: keys (B, H, N, D).
        v: values (B, H, N, C).
        geometry: where the Q queries and N tokens are.
        selection: which neighbours each query gets.
        mixing: how they are weighed and mixed.
        blend: 0 selects by position, 1 by features; a tensor (H,) strictly between is learnable;
            a tensor () is a number between that may change without a new compilation.
        weight: slot weights, (O, C / groups, at least K) for full ones or (C, at least K) for depthwise ones; None
            for ``aggregation=sum`` and ``max_relative``. The 1x1 of ``separable`` is not applied here.
        groups: of full slot weights.
        dropout: probability of dropping a neighbour's weight while training.
        training: draw random candidates and dropout.
        bias: added to the similarities that weigh, and with ``selection.bias_selects`` to those that choose,
            broadcastable to (B, H, Q, N); gradients flow to it.
        blocked: True for tokens that are never a query's neighbours, broadcastable to (B, H, Q, N). With either plain
            torch computes, whatever the backend.

    Returns:
        (B, H, Q, O) with full slot weights, else (B, H, Q, C).

    Raises:
        ConfigError: if ``backend`` is ``triton`` and its kernels cannot serve the case.
        ValueError: if slot weights are missing or not used, or k exceeds the candidates.
    """
    if (weight is None) != (mixing.aggregation in ("sum", "max_relative")):
        raise ValueError(f"aggregation={mixing.aggregation} {'needs' if weight is None else 'takes no'} slot weights")
    blend = blend if isinstance(blend, Tensor) else float(blend)
    more = {"bias": bias, "blocked": blocked}
    found = select_neighbors(q, k, geometry, selection, blend=blend, training=training, backend=mixing.backend, **more)
    num, drop = found.index.shape[-1], dropout if training else 0.0
    weight = _used_weight(weight, v.shape[-1], groups, num)

    def plain(q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None) -> Tensor:
        more = {"blend": blend, "groups": groups, "dropout": drop, "bias": bias}
        return aggregate_plainly(q, k, v, weight, found, geometry, selection, mixing, **more)  # type: ignore[arg-type]

    summed = mixing.weighting == "softmax" and (weight is None or weight.ndim == 2)
    fused = summed and bias is None and blocked is None
    kernels: dict[str, Way] = {}
    if fused and dispatch.attends(q, k, v, weight, selection, mixing, num=num, dropout=drop):
        how = {"similarity": selection.similarity, "temperature": mixing.temperature}
        kernel = partial(_by_kernel, found, how)
        kernels = {"triton": kernel, "triton in order": partial(kernel, ordered=True)}
        if mixing.backend == "triton":
            return kernels[_fastest("attention", mixing, kernels, q, k, v, weight, num)](q, k, v, weight)
    if torch.compiler.is_compiling():
        ways = kernels | {"torch": plain}  # unmeasured, the kernel: it makes no block of neighbours
    else:
        ways = {"torch": plain} | kernels
    if dispatch.measured(mixing.backend, v.device) and not choice.measures_for_graphs():
        if walks_edges(v) and not in_cache(v) and _needs_gradient(q, k, v, weight):
            ways["torch atomic"] = partial(_by_chance, plain)
        if fused and drop == 0 and natten.serves(geometry, selection, mixing, blend, (k.shape[-1], v.shape[-1])):
            ways["natten"] = partial(_by_natten, geometry, selection.similarity, mixing.temperature)
    step = "attention" if fused else "aggregation"
    return ways[_fastest(step, mixing, ways, q, k, v, weight, num)](q, k, v, weight)


Way = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Aggregates q, k, v with slot weights."""


def _fastest(
    step: str,
    mixing: Mixing,
    ways: Mapping[str, Way],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    num: int,
) -> str:
    """Return the fastest of several ways to mix ``num`` neighbours, with its gradient where one is taken."""
    if len(ways) == 1:
        return next(iter(ways))
    b, h, queries, channels = q.shape
    given = q, k, v, weight
    trained = _needs_gradient(*given)

    def once(way: Way) -> None:
        own = [None if t is None else t.detach().requires_grad_(t.requires_grad and trained) for t in given]
        with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):  # not those of a checkpoint around
            y = way(*own)  # type: ignore[arg-type]
            if trained:
                leaves = [t for t in own if t is not None and t.requires_grad]
                torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)

    kind = " ".join(("training" if trained else "inference", "sum" if weight is None else "depthwise"))
    if step == "aggregation":
        kind = " ".join(("training" if trained else "inference", mixing.weighting, mixing.aggregation))
    total = channels + v.shape[-1] + (0 if weight is None or weight.ndim == 2 else len(weight))
    rough = {"items": b * h, "queries": queries, "tokens": k.shape[2], "channels": total}
    timed = {name: partial(once, choice.as_in_graphs(way) if name == "torch" else way) for name, way in ways.items()}
    return choice.pick(step, v, kind, {"k": num}, rough, timed)


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _by_chance(plain: Way, q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None) -> Tensor:
    with summed_in_order(False):
        return plain(q, k, v, weight)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _by_kernel(
    found: Neighbors,
    how: dict[str, Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    ordered: bool = False,
) -> Tensor:
    return attention.attend_to_neighbors(q, k, v, found.index, found.valid, weight, ordered=ordered, **how)


def _by_natten(
    geometry: Geometry,
    similarity: str,
    temperature: float | Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
) -> Tensor:
    assert weight is None
    return natten.attend(q, k, v, geometry, similarity, temperature)


def aggregate_plainly(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    found: Neighbors,
    geometry: Geometry,
    selection: Selection,
    mixing: Mixing,
    *,
    blend: float | Tensor,
    groups: int,
    dropout: float,
    bias: Tensor | None,
) -> Tensor:
    """Return what ``neighbor_aggregate`` does once the neighbours are found, by torch's own operations."""
    graph = Edges.of(found.index, *v.shape[:3]) if walks_edges(v) else None
    near = None if bias is None else at_neighbors(bias, found.index, k)
    rho = neighbor_weights(q, k, found, selection, mixing, graph=graph, dropout=dropout, dtype=v.dtype, bias=near)
    if mixing.straight_through:
        chosen_by = near if selection.bias_selects else None
        own = selection_weights(q, k, geometry, selection, found, blend, mixing.temperature, chosen_by, graph)
        rho = own if rho is None else rho * own
    if mixing.aggregation == "max_relative":
        mine = v[:, :, geometry.query_index(v.device)]
        return max_of_neighbors(v, found.index, rho, mine, found.valid, graph)
    if graph is not None and weight is not None and groups == 1 and multiplies_first(found, selection, weight):
        first = geometry.query_index(v.device) if selection.self_first else None
        return mix_candidates(v, found.index, rho, weight, found.candidates, first)
    return mix(v, found.index, rho, weight, groups, graph)


def at_neighbors(bias: Tensor, index: Tensor, k: Tensor) -> Tensor:
    """Return a bias, broadcastable to (B, H, Q, N), at the neighbours ``index``: (B, H, Q, K); keys (B, H, N, D)."""
    b, h, n, _ = k.shape
    return bias.expand(b, h, index.shape[2], n).gather(-1, index.expand(b, h, -1, -1))


def _used_weight(weight: Tensor | None, channels: int, groups: int, num: int) -> Tensor | None:
    """Return the weights of the first ``num`` slots; grouped ones that are depthwise, (C, 1, K), as (C, K)."""
    if weight is None:
        return None
    depthwise = weight.ndim == 2 or groups == channels == len(weight)
    return (weight.flatten(1) if depthwise else weight)[..., :num]


def multiplies_first(found: Neighbors, selection: Selection, weight: Tensor) -> bool:
    """Return whether few candidates are better multiplied by all slot weights before they are gathered.

    That needs full weights, half as many candidates as queries, and the query's own token, which need not be a
    candidate, in a slot that is known.
    """
    few = found.candidates is not None and 2 * len(found.candidates) < found.index.shape[2]
    placed = not selection.self_first or (selection.slots == "rank" and weight.shape[-1] > 1)
    return few and placed and weight.ndim == 3


def neighbor_weights(
    q: Tensor,
    k: Tensor,
    found: Neighbors,
    selection: Selection,
    mixing: Mixing,
    *,
    graph: Edges | None,
    dropout: float,
    dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor | None:
    """Return what each neighbour weighs (the paper's rho), (B, H, Q, K), 0 where it is none; None: all weigh 1.

    Args:
        q: queries (B, H, Q, D).
        k: keys (B, H, N, D).
        found: the neighbours.
        selection: its similarity is what softmax and score are of.
        mixing: weighting and temperature.
        graph: the neighbours as edges, or None: gather them.
        dropout: probability of dropping a weight.
        dtype: of ones.
        bias: added to the similarities of the neighbours, (B, H, Q, K).
    """
    valid = None if found.valid is None else found.valid.to(dtype)
    if mixing.weighting == "ones":
        return valid
    score = neighbor_similarity(q, k, found.index, selection.similarity, graph)
    score = score if bias is None else score + bias
    score = with_own_scores(score, found.index, selection.self_again, mixing.self_score) / mixing.temperature
    if mixing.weighting == "softmax_far":
        score = -score
    if mixing.weighting.startswith("softmax"):
        if found.valid is not None and valid is not None:  # finite, for a query that sees nobody
            rho = score.masked_fill(~found.valid, torch.finfo(score.dtype).min).softmax(dim=-1) * valid
        else:
            rho = score.softmax(dim=-1)
    else:
        rho = score if valid is None else score * valid
    return F.dropout(rho, dropout, training=dropout > 0)


def selection_weights(
    q: Tensor,
    k: Tensor,
    geometry: Geometry,
    selection: Selection,
    found: Neighbors,
    blend: float | Tensor,
    temperature: float | Tensor,
    bias: Tensor | None = None,
    graph: Edges | None = None,
) -> Tensor:
    """Return ones that carry a gradient to the selection: a straight-through estimator, (B, H, Q, K).

    The hard choice of k neighbours has no gradient. Backward, this takes them as weighed by p = softmax(s / T) over
    the chosen ones instead, s being the score they were chosen by: the result is p / stop_gradient(p), whose value is
    1 and whose derivative is that of log p. A neighbour that would lower the loss gains score, relative to the other
    chosen ones; tokens that were not chosen get no gradient, so the estimator is biased. Through s it reaches the
    features, and the blend where that is a tensor. Queries whose candidates are all alike pass no gradient to them.
    Prefix tokens have no position: as queries they are scored by features, as neighbours at no distance (with
    ``mix=concat`` at the map's centre). A ``bias`` that bore on the choice, (B, H, Q, K), gets its gradient too.
    """
    queries = geometry.query_places(q.device)
    own = (queries >= geometry.prefix)[:, None]  # prefix queries choose by features whatever the blend
    one = q.new_ones(())
    if isinstance(blend, Tensor):
        blend = blend[:, None, None] if blend.ndim else blend.to(q.device, q.dtype)
    share = torch.where(own, one * blend, one)  # (1 or H, Q, 1)
    if isinstance(blend, float) and blend in (0, 1):
        features = neighbor_similarity(q, k, found.index, selection.similarity, graph)
        score = share * (features if bias is None else features + bias)
    elif selection.mix == "concat":
        positions, scale = geometry.positions(q.device), deviation(k).detach()
        here = with_positions(q, positions[queries], share, scale)
        keys = gather_tokens(k, found.index)
        there = with_positions(keys, positions[found.index], share[..., None], scale[..., None])
        score = pair_similarity(here, there, selection.similarity)
        score = score if bias is None else score + bias
    else:
        assert found.low is not None and found.high is not None
        distance = geometry.distance(queries[:, None], found.index, selection.distance).to(q.dtype) / geometry.extent
        distance = torch.where(own & (found.index >= geometry.prefix), distance, 0)
        features = neighbor_similarity(q, k, found.index, selection.similarity, graph)
        features = features if bias is None else features + bias
        score = blend_scores(features, distance, share, found.low.to(q.dtype), found.high.to(q.dtype))
    score = score / temperature
    if found.valid is not None:
        score = score.masked_fill(~found.valid, torch.finfo(score.dtype).min)
    log_p = score.log_softmax(dim=-1)
    return (log_p - log_p.detach()).exp()
