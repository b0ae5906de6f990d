"""The operator: geometry -> similarity -> selection -> aggregation, without parameters of its own.

Shapes: B batch, H heads, Q queries, N tokens, K neighbours, D channels per head, C input and O output channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from convnn.ops.aggregation import (
    gather_tokens,
    mix,
    mix_candidates,
    mix_max_relative,
    neighbor_similarity,
    walks_edges,
)
from convnn.ops.edges import Edges
from convnn.ops.geometry import Geometry
from convnn.ops.selection import Neighbors, select_neighbors
from convnn.ops.settings import Selection
from convnn.ops.similarity import blend_scores, deviation, pair_similarity, with_positions
from convnn.ops.triton import dispatch, launch


def neighbor_aggregate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: Geometry,
    selection: Selection,
    *,
    num: int,
    blend: float | Tensor = 1.0,
    weighting: str = "ones",
    temperature: float = 1.0,
    dropout: float = 0.0,
    aggregation: str = "sum",
    weight: Tensor | None = None,
    groups: int = 1,
    straight_through: bool = False,
    training: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Aggregate each query's ``num`` nearest neighbours (ConvNN, arXiv 2511.14137, section 3).

    Args:
        q: queries (B, H, Q, D).
        k: keys (B, H, N, D).
        v: values (B, H, N, C).
        geometry: where the Q queries and N tokens are.
        selection: how neighbours are chosen.
        num: neighbours per query.
        blend: 0 selects by position, 1 by features; a tensor (H,) strictly between is learnable.
        weighting: ``ones``, or ``softmax`` or ``score`` of the feature similarity over the temperature.
        temperature: divides the similarity.
        dropout: probability of dropping a weight while training.
        aggregation: ``conv``, ``depthwise``, ``sum`` or ``max_relative``.
        weight: (O, C / groups, >= num) for conv, (C, >= num) for depthwise.
        groups: of conv.
        straight_through: let a gradient reach the selection, see ``selection_weights``.
        training: draw random candidates and dropout.
        backend: ``auto``, ``torch`` or ``triton``, see ``convnn.ops.triton.dispatch``.

    Returns:
        (B, H, Q, O) for conv, else (B, H, Q, C).

    Raises:
        ConfigError: if ``backend`` is ``triton`` and its kernels cannot serve the case.
    """
    blend = blend if isinstance(blend, Tensor) else float(blend)
    found = select_neighbors(q, k, geometry, selection, num=num, blend=blend, training=training, backend=backend)
    depthwise = aggregation == "depthwise" or (weight is not None and groups == v.shape[-1] == len(weight))
    if weighting == "softmax" and (depthwise or aggregation == "sum"):
        ranks = weight.flatten(1) if depthwise and weight is not None else None
        case = {"dropout": dropout if training else 0.0, "straight_through": straight_through}
        similarity = selection.similarity
        if dispatch.attends(backend, q, k, v, ranks, num=found.index.shape[-1], similarity=similarity, **case):
            parts = q, k, v, found.index, found.valid, ranks
            return launch.attend_to_neighbors(*parts, similarity=similarity, temperature=temperature)
    graph = Edges(found.index, *v.shape[:3]) if backend == "auto" and walks_edges(v) else None
    rho = None if found.valid is None else found.valid.to(v.dtype)
    if weighting != "ones":
        score = neighbor_similarity(q, k, found.index, selection.similarity, graph) / temperature
        if weighting == "softmax":
            if found.valid is not None:
                score = score.masked_fill(~found.valid, -torch.inf)
            rho = score.softmax(dim=-1)
        else:
            rho = score if rho is None else score * rho
        rho = F.dropout(rho, dropout, training)
    if straight_through:
        own = selection_weights(q, k, geometry, selection, found, blend, temperature)
        rho = own if rho is None else rho * own
    if aggregation == "max_relative":
        x = gather_tokens(v, found.index)
        x = x if rho is None else x * rho[..., None]
        return mix_max_relative(x, v[:, :, geometry.query_index(v.device)], found.valid)
    if weight is not None:
        weight = weight[..., : found.index.shape[-1]]
        few = found.candidates is not None and 2 * len(found.candidates) < found.index.shape[2]
        placed = not selection.self_first or (selection.slots == "rank" and weight.shape[-1] > 1)
        if graph is not None and few and placed and aggregation == "conv" and groups == 1:
            assert found.candidates is not None
            first = geometry.query_index(v.device) if selection.self_first else None
            return mix_candidates(v, found.index, rho, weight, found.candidates, first)
    return mix(v, found.index, rho, aggregation, weight, groups, graph)


def selection_weights(
    q: Tensor,
    k: Tensor,
    geometry: Geometry,
    selection: Selection,
    found: Neighbors,
    blend: float | Tensor,
    temperature: float,
) -> Tensor:
    """Return ones that carry a gradient to the selection: a straight-through estimator, (B, H, Q, K).

    The hard choice of k neighbours has no gradient. Backward, this takes them as weighed by p = softmax(s / T) over
    the chosen ones instead, s being the score they were chosen by: the result is p / stop_gradient(p), whose value is
    1 and whose derivative is that of log p. A neighbour that would lower the loss gains score, relative to the other
    chosen ones; tokens that were not chosen get no gradient, so the estimator is biased. Through s it reaches the
    features, and the blend where that is a tensor. Queries whose candidates are all alike pass no gradient to them.
    Prefix tokens have no position: as queries they are scored by features, as neighbours at no distance (with
    ``mix=concat`` at the map's centre).
    """
    keys = gather_tokens(k, found.index)
    queries = geometry.query_index(q.device)
    own = (queries >= geometry.prefix)[:, None]  # prefix queries choose by features whatever the blend
    one = q.new_ones(())
    blend = blend[:, None, None] if isinstance(blend, Tensor) else blend
    share = torch.where(own, one * blend, one)  # (1 or H, Q, 1)
    if isinstance(blend, float) and blend in (0, 1):
        score = share * pair_similarity(q, keys, selection.similarity)
    elif selection.mix == "concat":
        positions, scale = geometry.positions(q.device), deviation(k).detach()
        here = with_positions(q, positions[queries], share, scale)
        there = with_positions(keys, positions[found.index], share[..., None], scale[..., None])
        score = pair_similarity(here, there, selection.similarity)
    else:
        assert found.low is not None and found.high is not None
        distance = geometry.distance(queries[:, None], found.index, selection.distance).to(q.dtype) / geometry.extent
        distance = torch.where(own & (found.index >= geometry.prefix), distance, 0)
        features = pair_similarity(q, keys, selection.similarity)
        score = blend_scores(features, distance, share, found.low.to(q.dtype), found.high.to(q.dtype))
    score = score / temperature
    if found.valid is not None:
        score = score.masked_fill(~found.valid, torch.finfo(score.dtype).min)
    log_p = score.log_softmax(dim=-1)
    return (log_p - log_p.detach()).exp()
