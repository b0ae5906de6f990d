"""How alike two tokens are: by features, by position, or by a blend of both.

Shapes: B batch, H heads, Q queries, N tokens, K neighbours, D channels per head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ALIKE = 1e-5
"""Similarities that differ by less than this share of the largest count as equal: float32 does not tell them apart."""


def unit(x: Tensor) -> Tensor:
    """Return vectors of length 1 along the last axis; zero vectors stay zero and pass no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    # Divided by infinity a zero vector is 0 with gradient 0; by its norm, or a tiny one, NaN or a huge gradient.
    return x / norm.masked_fill(norm <= max(1e-12, torch.finfo(norm.dtype).tiny), torch.inf)


def score_terms(q: Tensor, k: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (q', k', bias) such that ``q' @ k'.mT + bias`` is the similarity up to a constant per query.

    ``cosine``; ``euclidean``: negative squared distance; ``dot``: q.k / sqrt(D). Larger is more alike.

    Args:
        q: (..., Q, D).
        k: (..., N, D).
        kind: of similarity.

    Returns:
        (..., Q, D), (..., N, D) and None or (..., 1, N).
    """
    if kind == "cosine":
        return unit(q), unit(k), None
    if kind == "dot":
        return q / math.sqrt(q.shape[-1]), k, None
    # -|q - k|^2 = 2 q.k - |k|^2 - |q|^2, whose last term is the constant of the query. Distances do not change under
    # translation; around the mean fewer digits cancel.
    mean = k.mean(dim=-2, keepdim=True)
    q, k = q - mean, k - mean
    return 2 * q, k, -k.square().sum(-1)[..., None, :]


def pair_similarity(q: Tensor, k: Tensor, kind: str) -> Tensor:
    """Return the similarity of each query to its own neighbours: (B, H, Q, D), (B, H, Q, K, D) -> (B, H, Q, K)."""
    if kind == "cosine":
        q, k = unit(q), unit(k)
    elif kind == "dot":
        q = q / math.sqrt(q.shape[-1])
    else:
        return -(q[..., None, :] - k).square().sum(-1)
    return (k @ q[..., None]).squeeze(-1)


def own_similarity(q: Tensor, k: Tensor, kind: str) -> Tensor:
    """Return the similarity of each query to one token of its own: (..., Q, D) twice -> (..., Q, 1)."""
    if kind == "euclidean":
        return -(q - k).square().sum(-1, keepdim=True)
    q, k = (unit(q), unit(k)) if kind == "cosine" else (q / math.sqrt(q.shape[-1]), k)
    return (q * k).sum(-1, keepdim=True)  # no matrix product, whose precision may be lowered


def blend_scores(features: Tensor, distance: Tensor, blend: float | Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Blend feature similarity (..., Q, N) with position: ``blend * f - (1 - blend) * d``.

    Both are shares of their range: f is the similarity scaled from [low, high], its range over the candidates of
    each query, to [0, 1], so that a blend means the same for every kind of similarity and every layer; d (Q, N) is the
    distance over the extent of the map, so that at 0.5 a tenth of the map weighs as much as a tenth of the similarity.
    Where all candidates are alike, ``high`` is infinite (see ``span``) and f is 0: position alone decides.
    """
    return (features - low) * (blend / (high - low)) - (1 - blend) * distance


def span(low: Tensor, high: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the range of each query's similarities, with ``high`` infinite where they count as equal.

    They do where they differ by at most ``ALIKE`` of the largest or by at most ``floor``. Scaled to an infinite range
    all of them become 0 (see ``blend_scores``), where the true range would blow rounding errors up to scores.
    """
    alike = high - low <= torch.maximum(ALIKE * torch.maximum(low.abs(), high.abs()), floor)
    return low, high.masked_fill(alike, torch.inf)


def with_positions(x: Tensor, positions: Tensor, blend: float | Tensor, deviation: Tensor) -> Tensor:
    """Return ``[blend * x / deviation, (1 - blend) * positions]``: (..., N, D), (N, 2) -> (..., N, D + 2).

    The paper's blend ("Loc_Col"): features and coordinates are concatenated and compared by one similarity.
    """
    positions = positions.to(x.dtype).expand(*x.shape[:-1], 2)
    return torch.cat([x * (blend / deviation), positions * (1 - blend)], dim=-1)


def deviation(x: Tensor) -> Tensor:
    """Return the standard deviation over tokens and channels, infinite if all are equal: (..., N, D) -> (..., 1, 1)."""
    spread = x.std(dim=(-2, -1), keepdim=True, correction=int(x.shape[-2:].numel() > 1))
    return spread.masked_fill(spread <= ALIKE * x.abs().amax(dim=(-2, -1), keepdim=True), torch.inf)
