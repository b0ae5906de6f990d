"""Talking heads (arXiv 2003.02436), as in CaiT: scores are mixed among the heads, and so are their weights.

A mixed score is one dot product: of the queries of all heads, each times its share, with the keys of all heads. So a
head chooses its neighbours by mixed scores. Its weights, which add up to 1, are applied to the values of all heads, and
the heads' outputs are mixed after. The second mix's bias weighs all tokens alike, neighbours or not.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from convnn.nn.adapters.base import Adapter, split
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
        heads = layer.num_heads
        q, k, v = split(layer.qkv(x), heads)
        factor = layer.scale * math.sqrt(heads * q.shape[-1])
        shares = layer.proj_l.weight[:, None, :, None] * factor  # (H, 1, H, 1)
        every = q.transpose(1, 2)[:, None] * shares  # (B, H, N, H, D)
        keys, values = (t.transpose(1, 2).flatten(2)[:, None].expand(-1, heads, -1, -1) for t in (k, v))
        bias = layer.proj_l.bias[:, None, None] if layer.proj_l.bias is not None else None
        return Heads(every.flatten(3), keys, values, bias=bias, rest=v)

    def write(self, layer: Any, y: Tensor, heads: Heads) -> Tensor:
        """Return (B, N, channels)."""
        v = heads.rest
        parts = y.unflatten(-1, (layer.num_heads, -1))  # (B, heads that weigh, N, heads of values, D)
        mixed = (parts * layer.proj_w.weight.t()[:, None, :, None]).sum(1)  # (B, N, H, D)
        if layer.proj_w.bias is not None:
            mixed = mixed + (layer.proj_w.bias[:, None] * v.sum(2))[:, None]
        return layer.proj_drop(layer.proj(mixed.flatten(2)))


ADAPTERS = (TalkingHeads(),)
