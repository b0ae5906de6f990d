"""The ends of the spectrum by torch's own convolution and attention.

Shapes: B batch, H heads, Q queries, N tokens, K neighbours, D channels per head, C input and O output channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from convnn.ops.candidates import candidate_tokens, most_candidates, out_of_reach
from convnn.ops.geometry import Geometry
from convnn.ops.settings import Mixing, Selection
from convnn.ops.similarity import unit
from convnn.ops.slots import slots_to_kernel


def is_convolution(geometry: Geometry, selection: Selection, mixing: Mixing, blend: float | Tensor) -> bool:
    """Return whether the settings choose exactly the kernel window, so that ``convolve`` may stand in."""
    return (
        isinstance(blend, float)
        and blend == 0
        and mixing.weighting == "ones"
        and selection.k == math.prod(geometry.kernel)
        and selection.distance == "chebyshev"
        and selection.candidates == "all"
        and selection.self_again is None
        and selection.rank_step == 1
    )


def convolve(
    x: Tensor, geometry: Geometry, selection: Selection, weight: Tensor, bias: Tensor | None, groups: int
) -> Tensor:
    """Compute the position end through ``F.conv2d``: (B, C, h, w), weight (O, C / groups, K) -> (B, O, h', w')."""
    kernel = slots_to_kernel(weight[..., : math.prod(geometry.kernel)], geometry.kernel, selection.slots)
    if any(geometry.extra):
        x = F.pad(x, (0, geometry.extra[1], 0, geometry.extra[0]))
    return F.conv2d(x, kernel, bias, geometry.stride, geometry.padding, geometry.dilation, groups)


def attends_to_all(geometry: Geometry, selection: Selection, mixing: Mixing, *, pads: bool) -> bool:
    """Return whether every candidate is a neighbour and the order is lost, so that ``attend`` may stand in."""
    if mixing.weighting != "softmax" or mixing.aggregation != "sum" or mixing.straight_through:
        return False
    if mixing.self_score is not None or selection.self_again is not None or selection.rank_step > 1:
        return False
    if selection.similarity == "euclidean" or selection.candidates == "random":
        return False
    if selection.self_first and selection.candidates == "grid":  # a query off the grid adds itself to the candidates
        return False
    candidates = candidate_tokens(geometry, selection, pads=pads, training=False)
    _, most = most_candidates(geometry, selection, candidates)
    return selection.k == most or (selection.k > most and selection.k_policy == "clamp")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: Geometry,
    selection: Selection,
    *,
    pads: bool,
    temperature: float | Tensor,
    dropout: float,
    bias: Tensor | None = None,
    blocked: Tensor | None = None,
) -> Tensor:
    """Attend to all candidates through fused attention: (B, H, Q, D), (B, H, N, D), (B, H, N, C) -> (B, H, Q, C).

    ``bias`` is added to the similarities, tokens that are ``blocked`` are left out, as ``neighbor_aggregate`` does.
    """
    candidates = candidate_tokens(geometry, selection, pads=pads, training=False, device=q.device)
    tokens = torch.arange(geometry.num_tokens, device=q.device) if candidates is None else candidates
    if candidates is not None:
        k, v = k[:, :, candidates], v[:, :, candidates]
        bias, blocked = (None if t is None else t[..., candidates] for t in (bias, blocked))
    outside = out_of_reach(geometry, selection, geometry.query_places(q.device), tokens)
    if isinstance(temperature, Tensor):  # the scale of fused attention is a number
        q, scale = q / temperature.to(q.device), 1.0
    else:
        scale = 1 / temperature
    if selection.similarity == "cosine":
        q, k = unit(q), unit(k)
    else:
        scale /= math.sqrt(q.shape[-1])
    if blocked is not None:
        outside = blocked if outside is None else outside | blocked
    mask = None if outside is None else ~outside
    if bias is not None:
        mask = bias / temperature if outside is None else (bias / temperature).masked_fill(outside, -torch.inf)
        mask = mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, scale=scale)
