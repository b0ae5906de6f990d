"""Talking heads (arXiv 2003.02436), as in CaiT: scores are mixed among the heads, and their weights.

A mixed score is one dot product: of the queries of all heads, each times its share, with the keys of all heads. So a
head chooses its neighbours by mixed scores. Its weights, which add up to 1, are applied to the values of all heads, and
the heads' outputs are mixed after. The second mix's bias weighs all tokens alike, neighbours or not.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from convnn.nn.adapters.base import Adapter, per_head, split
from convnn.nn.neighbor_attention import Heads


class TalkingHeads(Adapter):
    """CaiT's ``TalkingHeadAttn``."""

    layers = ("timm.models.cait:TalkingHeadAttn",)

    def refusal(self, layer: Any) -> str | None:
        """Return that mixed weights cannot be dropped."""
        return "drops mixed weights (attn_drop), which talking heads here cannot" if layer.attn_drop.p else None

    def prefix(self, layer: Any) -> int | None:
        """Return 0: CaiT's class token comes in later."""
        return 0

    def size(self, layer: Any) -> tuple[int, int]:
        """Return H, and C of all heads together."""
        return layer.num_heads, layer.proj.in_features

    def read(self, layer: Any, x: Tensor) -> Heads:
        """Return the heads of (B, N, channels): D and C are those of all heads."""
        q, k, v = split(layer.qkv(x), layer.num_heads)
        bias = layer.proj_l.bias[:, None, None] if layer.proj_l.bias is not None else None
        return Heads(*of_all_heads(q * layer.scale, k, v, layer.proj_l.weight), bias=bias, rest=v)

    def write(self, layer: Any, y: Tensor, heads: Heads) -> Tensor:
        """Return (B, N, channels)."""
        mixed = mixed_again(y, heads.rest, layer.proj_w.weight, layer.proj_w.bias)
        return layer.proj_drop(layer.proj(mixed.flatten(2)))


class TalkingMap(Adapter):
    """EfficientFormer V2's ``Attention2d`` of a map, maybe on a coarser one: talking heads, and a convolution of the
    values that is added to what they give."""

    layers = ("timm.models.efficientformer_v2:Attention2d",)
    grid_from_model = False

    def prefix(self, layer: Any) -> int | None:
        """Return 0."""
        return 0

    def tokens(self, layer: Any) -> int | None:
        """Return N of the table."""
        return layer.N

    def size(self, layer: Any) -> tuple[int, int]:
        """Return H, and C of all heads together."""
        return layer.num_heads, layer.dh

    def read(self, layer: Any, x: Tensor) -> Heads:
        """Return the heads of (B, channels, h, w)."""
        x = x if layer.stride_conv is None else layer.stride_conv(x)
        made, grid = layer.v(x), tuple(layer.resolution)
        q, k, v = (per_head(t.flatten(2).mT, layer.num_heads) for t in (layer.q(x), layer.k(x), made))
        mix = layer.talking_head1.weight.flatten(1)
        bias = torch.einsum("gh,hqn->gqn", mix, layer.attention_biases[:, layer.attention_bias_idxs])
        bias = bias + layer.talking_head1.bias[:, None, None]
        return Heads(*of_all_heads(q * layer.scale, k, v, mix), bias=bias, grid=grid, rest=(v, layer.v_local(made)))

    def write(self, layer: Any, y: Tensor, heads: Heads) -> Tensor:
        """Return (B, channels, h, w)."""
        v, local = heads.rest
        mixed = mixed_again(y, v, layer.talking_head2.weight.flatten(1), layer.talking_head2.bias)
        x = mixed.flatten(2).mT.reshape(local.shape) + local
        x = x if layer.upsample is None else layer.upsample(x)
        return layer.proj(layer.act(x))


def of_all_heads(q: Tensor, k: Tensor, v: Tensor, mix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values of all heads side by side, whose products are mixed scores.

    Args:
        q: (B, H, N, D), scaled.
        k: (B, H, N, D).
        v: (B, H, N, C).
        mix: (H that weigh, H).

    Returns:
        (B, H, N, H * D) twice, and (B, H, N, H * C).
    """
    heads = q.shape[1]
    shares = mix[:, None, :, None] * math.sqrt(heads * q.shape[-1])  # (H, 1, H, 1)
    every = q.transpose(1, 2)[:, None] * shares  # (B, H, N, H, D)
    keys, values = (t.transpose(1, 2).flatten(2)[:, None].expand(-1, heads, -1, -1) for t in (k, v))
    return every.flatten(3), keys, values


def mixed_again(y: Tensor, v: Tensor, mix: Tensor, bias: Tensor | None) -> Tensor:
    """Return what mixed weights give: (B, H, N, H * C) and values (B, H, N, C) -> (B, N, H, C)."""
    parts = y.unflatten(-1, (v.shape[1], -1))  # (B, heads that weigh, N, heads of values, C)
    mixed = (parts * mix.t()[:, None, :, None]).sum(1)
    return mixed if bias is None else mixed + (bias[:, None] * v.sum(2))[:, None]


ADAPTERS = (TalkingHeads(), TalkingMap())
