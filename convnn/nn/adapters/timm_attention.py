"""timm's ``Attention``: the plain one, which every operator knows, and its variants with a gate, norm or own width."""

from __future__ import annotations

from typing import Any

from timm.layers.attention import Attention
from torch import Tensor, nn

from convnn.nn.adapters.base import Adapter, merged, refuse, split
from convnn.nn.neighbor_attention import Heads


def beyond_plain(layer: Attention) -> str | None:
    """Return what a layer has beyond plain attention, or None."""
    if layer.attn_dim != layer.qkv.in_features:
        return f"has a width of its own ({layer.attn_dim})"
    if layer.gate is not None or not isinstance(layer.norm, nn.Identity):
        return "has a gate or output norm"
    return None


def gated(layer: Any, y: Tensor, gate: Tensor | None) -> Tensor:
    """Return the output of layers with an output norm and a gate: (B, H, N, C) -> (B, N, channels)."""
    x = layer.norm(merged(y))
    return layer.proj_drop(layer.proj(x if gate is None else x * gate))


def gate_of(layer: Any, x: Tensor) -> Tensor | None:
    """Return what multiplies the channels before the projection, (B, N, H * C), or None."""
    return None if layer.gate is None else layer.gate(x).sigmoid()


class TimmAttention(Adapter):
    """``Attention``."""

    layers = ("timm.layers.attention:Attention",)

    def attention(self, layer: Any) -> Attention | None:
        """Return the layer, if it is plain."""
        return layer if beyond_plain(layer) is None else None

    def read(self, layer: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Heads:
        """Return the heads of (B, N, channels)."""
        refuse(attn_mask=attn_mask, is_causal=is_causal)
        q, k, v = split(layer.qkv(x), layer.num_heads)
        return Heads(layer.q_norm(q), layer.k_norm(k), v, rest=gate_of(layer, x))

    def write(self, layer: Any, y: Tensor, heads: Heads) -> Tensor:
        """Return (B, N, channels), normalised and gated."""
        return gated(layer, y, heads.rest)


ADAPTERS = (TimmAttention(),)
