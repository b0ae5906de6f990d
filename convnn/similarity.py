"""How alike two tokens are: by features, by position, or by a blend of both.

Shapes: B batch, H heads, Q queries, N tokens, K neighbours, D channels per head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def feature_similarity(q: Tensor, k: Tensor, kind: str) -> Tensor:
    """Return the similarity of every query to every token: (B, H, Q, D), (B, H, N, D) -> (B, H, Q, N).

    ``cosine``; ``euclidean``: negative squared distance; ``dot``: q.k / sqrt(D). Larger is more alike.
    """
    if kind == "cosine":
        return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    if kind == "dot":
        return (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
    # Distances do not change under translation; around the mean fewer digits cancel.
    mean = k.mean(dim=-2, keepdim=True)
    q, k = q - mean, k - mean
    squares = q.square().sum(-1, keepdim=True) + k.square().sum(-1)[..., None, :]
    return (2 * q @ k.transpose(-2, -1) - squares).clamp(max=0)


def pair_similarity(q: Tensor, k: Tensor, kind: str) -> Tensor:
    """Return the same for each query's own neighbours: (B, H, Q, D), (B, H, Q, K, D) -> (B, H, Q, K)."""
    if kind == "cosine":
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    elif kind == "dot":
        q = q / math.sqrt(q.shape[-1])
    else:
        return -(q[..., None, :] - k).square().sum(-1)
    return (k @ q[..., None]).squeeze(-1)


def blend_scores(features: Tensor, distance: Tensor, blend: float) -> Tensor:
    """Mix feature similarity (B, H, Q, N) with position: ``blend * f + (1 - blend) * p``, both in [0, 1].

    p = 1 / (1 + distance), distance (Q, N) in pixels; f is the feature similarity scaled to [0, 1] over the
    candidates of each query, so that a blend means the same for every kind of similarity and every layer.
    """
    low, high = features.aminmax(dim=-1, keepdim=True)
    scaled = (features - low) / (high - low).clamp_min(torch.finfo(features.dtype).tiny)
    return blend * scaled + (1 - blend) / (1 + distance.to(features.dtype))
