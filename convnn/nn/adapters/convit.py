"""ConViT's layers (arXiv 2103.10697), through timm's plain ``Attention``."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.attention import Attention

from convnn.nn.adapters.base import Adapter


class ConViT(Adapter):
    """``MHSA``, plain attention by another name, and ``GPSA``, of whose gates and positions the content is left.

    The gated layers come before the class token does.
    """

    layers = ("timm.models.convit:GPSA", "timm.models.convit:MHSA")

    def loss(self, layer: Any) -> str | None:
        """Return that the gated layers mix in positions."""
        return "positions" if hasattr(layer, "gating_param") else None

    def prefix(self, layer: Any) -> int | None:
        """Return 0 for the gated layers."""
        return 0 if hasattr(layer, "gating_param") else None

    @torch.no_grad()
    def attention(self, layer: Any) -> Attention:
        """Return timm's attention with the layer's projections, of the gated ones those of the content."""
        parts = (layer.qk, layer.v) if hasattr(layer, "gating_param") else (layer.qkv,)
        dim, biased = layer.proj.in_features, parts[0].bias is not None
        drops = {"attn_drop": layer.attn_drop.p, "proj_drop": layer.proj_drop.p}
        plain = Attention(dim, layer.num_heads, qkv_bias=biased, proj_bias=layer.proj.bias is not None, **drops)
        plain.to(layer.proj.weight.device, layer.proj.weight.dtype)
        plain.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
        if biased:
            plain.qkv.bias.copy_(torch.cat([part.bias for part in parts]))
        plain.proj.load_state_dict(layer.proj.state_dict())
        return plain.train(layer.training)


ADAPTERS = (ConViT(),)
