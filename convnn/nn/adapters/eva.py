"""Attention with rotary positions: EVA, DINOv3 and their kin (``EvaAttention``, ``AttentionRope``).

Positions turn queries and keys of the grid before they are compared, so that they bear on who is a neighbour.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from torch import Tensor

from convnn.nn.adapters.base import Adapter, biased, per_head, refuse, split
from convnn.nn.adapters.timm_attention import gate_of, gated
from convnn.nn.neighbor_attention import Heads


class Rotary(Adapter):
    """``EvaAttention`` and ``AttentionRope``: fused or split projections, biases apart, fewer heads of keys."""

    layers = ("timm.models.eva:EvaAttention", "timm.layers.attention:AttentionRope")

    def prefix(self, layer: Any) -> int | None:
        """Return the tokens that are not turned."""
        return layer.num_prefix_tokens

    def read(
        self,
        layer: Any,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Heads:
        """Return the heads of (B, N, channels), turned by ``rope``."""
        refuse(attn_mask=attn_mask, is_causal=is_causal)
        heads = layer.num_heads
        if layer.qkv is None:
            groups = heads, getattr(layer, "num_kv_heads", heads), getattr(layer, "num_kv_heads", heads)
            parts = zip((layer.q_proj, layer.k_proj, layer.v_proj), groups, strict=True)
            q, k, v = (per_head(part(x), count) for part, count in parts)
        else:
            q, k, v = split(biased(layer, x) if hasattr(layer, "q_bias") else layer.qkv(x), heads)
        q, k = layer.q_norm(q), layer.k_norm(k)
        if rope is not None:
            q, k = (turned(layer, t, rope).type_as(v) for t in (q, k))
        if k.shape[1] != heads:
            k, v = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (k, v))
        return Heads(q, k, v, rest=gate_of(layer, x))

    def write(self, layer: Any, y: Tensor, heads: Heads) -> Tensor:
        """Return (B, N, channels), normalised and gated."""
        return gated(layer, y, heads.rest)


def turned(layer: Any, x: Tensor, rope: Tensor) -> Tensor:
    """Return (B, H, N, D) with the tokens behind the prefix turned."""
    prefix = layer.num_prefix_tokens
    grid = apply_rot_embed_cat(x[:, :, prefix:], rope, half=layer.rotate_half)
    return torch.cat([x[:, :, :prefix], grid], dim=2)


ADAPTERS = (Rotary(),)
