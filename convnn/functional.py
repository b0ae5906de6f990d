"""The operator: geometry -> similarity -> selection -> aggregation, without parameters of its own.

Shapes: B batch, H heads, Q queries, N tokens, K neighbours, D channels per head, C input and O output channels.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from convnn.aggregation import gather_tokens, mix_conv, mix_depthwise, mix_sum
from convnn.geometry import Geometry, window_order
from convnn.selection import Selection, select_neighbors
from convnn.similarity import pair_similarity


def neighbor_aggregate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: Geometry,
    selection: Selection,
    *,
    num: int,
    blend: float = 1.0,
    weighting: str = "ones",
    temperature: float = 1.0,
    dropout: float = 0.0,
    aggregation: str = "sum",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    groups: int = 1,
    training: bool = False,
) -> Tensor:
    """Aggregate each query's ``num`` nearest neighbours (ConvNN, arXiv 2511.14137, section 3).

    Args:
        q: queries (B, H, Q, D).
        k: keys (B, H, N, D).
        v: values (B, H, N, C).
        geometry: where the Q queries and N tokens are.
        selection: how neighbours are chosen.
        num: neighbours per query.
        blend: 0 selects by position, 1 by features.
        weighting: ``ones``, or ``softmax`` of the feature similarity over the temperature.
        temperature: divides the similarity before the softmax.
        dropout: probability of dropping a softmax weight while training.
        aggregation: ``conv``, ``depthwise`` or ``sum``.
        weight: (O, C / groups, >= num) for conv, (C, >= num) for depthwise.
        bias: (O,), for conv.
        groups: of conv.
        training: draw random candidates and dropout.

    Returns:
        (B, H, Q, O) for conv, else (B, H, Q, C).
    """
    index = select_neighbors(q, k, geometry, selection, num=num, blend=blend, training=training)
    x = gather_tokens(v, index)
    if weighting == "softmax":
        score = pair_similarity(q, gather_tokens(k, index), selection.similarity) / temperature
        x = x * F.dropout(score.softmax(dim=-1), dropout, training)[..., None]
    if aggregation == "sum":
        return mix_sum(x)
    assert weight is not None
    weight = weight[..., : index.shape[-1]]
    return mix_conv(x, weight, bias, groups) if aggregation == "conv" else mix_depthwise(x, weight)


def is_convolution(geometry: Geometry, selection: Selection, *, num: int, blend: float, weighting: str) -> bool:
    """Return whether the settings choose exactly the kernel window, so that ``convolve`` may stand in."""
    return (
        blend == 0
        and weighting == "ones"
        and num == math.prod(geometry.kernel)
        and selection.distance == "chebyshev"
        and selection.candidates == "all"
    )


def convolve(
    x: Tensor, geometry: Geometry, selection: Selection, weight: Tensor, bias: Tensor | None, groups: int
) -> Tensor:
    """Compute the position end through ``F.conv2d``: (B, C, h, w), weight (O, C / groups, K) -> (B, O, h', w')."""
    kernel = slots_to_kernel(weight[..., : math.prod(geometry.kernel)], geometry.kernel, selection.slots)
    return F.conv2d(x, kernel, bias, geometry.stride, geometry.padding, geometry.dilation, groups)


def slots_to_kernel(weight: Tensor, kernel: tuple[int, int], slots: str) -> Tensor:
    """Return slot weights (O, C, kh * kw) as a convolution kernel (O, C, kh, kw); see ``kernel_to_slots``."""
    if slots != "raster":
        weight = weight[..., window_order(kernel).argsort().to(weight.device)]
    return weight.unflatten(-1, kernel)


def kernel_to_slots(kernel: Tensor, slots: str) -> Tensor:
    """Return a convolution kernel (O, C, kh, kw) as slot weights (O, C, kh * kw), nearest tap first unless raster."""
    weight = kernel.flatten(2)
    if slots != "raster":
        weight = weight[..., window_order((kernel.shape[2], kernel.shape[3])).to(weight.device)]
    return weight


def is_attention(selection: Selection, *, num: int, num_tokens: int, weighting: str, aggregation: str) -> bool:
    """Return whether every token is a neighbour and the order is lost, so that ``attend`` may stand in."""
    every = selection.candidates == "all" and (
        num == num_tokens or (num > num_tokens and selection.k_policy == "clamp")
    )
    return every and weighting == "softmax" and aggregation == "sum" and selection.similarity != "euclidean"


def attend(q: Tensor, k: Tensor, v: Tensor, similarity: str, temperature: float, dropout: float) -> Tensor:
    """Compute k = n through fused attention: (B, H, Q, D), (B, H, N, D), (B, H, N, C) -> (B, H, Q, C)."""
    scale = 1 / temperature
    if similarity == "cosine":
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    else:
        scale /= math.sqrt(q.shape[-1])
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
