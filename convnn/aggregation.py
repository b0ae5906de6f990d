"""What becomes of the neighbours: gathering, weighting and mixing.

Shapes: B batch, H heads, Q queries, N tokens, K neighbours, D channels per head, C input and O output channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Return the tokens at ``index``: (B, H, N, D), (B or 1, H or 1, Q, K) -> (B, H, Q, K, D)."""
    b, h, n, d = x.shape
    start = torch.arange(b * h, device=x.device).mul_(n).view(b, h, 1, 1)
    rows = (index + start).flatten()
    return x.reshape(b * h * n, d).index_select(0, rows).view(b, h, *index.shape[2:], d)


def mix_conv(x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    """Give every slot its own full or grouped weights: (B, H, Q, K, C), (O, C / groups, K) -> (B, H, Q, O)."""
    b, h, q, k, c = x.shape
    o = weight.shape[0]
    if groups == 1:
        return (x.reshape(b * h * q, k * c) @ weight.permute(2, 1, 0).reshape(k * c, o)).view(b, h, q, o)
    if groups == c == o:
        return mix_depthwise(x, weight.squeeze(1))
    x = x.view(b * h * q, k, groups, c // groups).permute(2, 0, 1, 3).reshape(groups, b * h * q, k * c // groups)
    w = weight.view(groups, o // groups, c // groups, k).permute(0, 3, 2, 1).reshape(groups, -1, o // groups)
    return (x @ w).transpose(0, 1).reshape(b, h, q, o)


def mix_depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """Weigh every slot and channel: (B, H, Q, K, D), (D, K) -> (B, H, Q, D)."""
    return (x * weight.t()).sum(dim=-2)


def mix_sum(x: Tensor) -> Tensor:
    """Add the neighbours up: (B, H, Q, K, D) -> (B, H, Q, D)."""
    return x.sum(dim=-2)


def mix_max_relative(x: Tensor, own: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the largest difference to the query's own token, per channel: (B, H, Q, K, D), (B, H, Q, D) -> the same.

    The aggregation of vision graphs (ViG, arXiv 2206.00272): max_j (x_j - x_i).
    """
    if valid is not None:
        x = x.masked_fill(~valid[..., None], -torch.inf)
    return x.amax(dim=-2) - own
