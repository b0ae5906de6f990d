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


def mix_conv(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
    """Give every slot its own full or grouped weights: (B, H, Q, K, C), (O, C / groups, K) -> (B, H, Q, O)."""
    b, h, q, k, c = x.shape
    o = weight.shape[0]
    if groups == 1:
        y = x.reshape(b * h * q, k * c) @ weight.permute(2, 1, 0).reshape(k * c, o)
    else:
        x = x.view(b * h * q, k, groups, c // groups).permute(2, 0, 1, 3).reshape(groups, b * h * q, -1)
        w = weight.view(groups, o // groups, c // groups, k).permute(0, 3, 2, 1).reshape(groups, -1, o // groups)
        y = (x @ w).transpose(0, 1).reshape(b * h * q, o)
    if bias is not None:
        y = y + bias
    return y.view(b, h, q, o)


def mix_depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """Weigh every slot and channel: (B, H, Q, K, D), (D, K) -> (B, H, Q, D)."""
    return (x * weight.t()).sum(dim=-2)


def mix_sum(x: Tensor) -> Tensor:
    """Add the neighbours up: (B, H, Q, K, D) -> (B, H, Q, D)."""
    return x.sum(dim=-2)
