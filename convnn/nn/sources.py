"""Layers of timm that compute attention in a class of their own, as timm's ``Attention``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.attention import Attention
from torch import nn

from convnn.errors import ConfigError


@dataclass(frozen=True)
class Source:
    """An attention layer by another name."""

    layer: Attention
    """timm's ``Attention`` with its projections: the function of it where ``exact``."""
    exact: bool
    num_prefix_tokens: int | None
    """Tokens before the grid that it sees, where the model's own number is not that."""


def attention_classes() -> tuple[Any, ...]:
    """Return the classes of other names that are known here; only modules that were imported have instances."""
    convit: Any = sys.modules.get("timm.models.convit")
    return () if convit is None else (convit.GPSA, convit.MHSA)


@torch.no_grad()
def source_of(layer: nn.Module) -> Source | None:
    """Return what stands behind an attention layer of another name, or None.

    ConViT's gated layers come before its class token does, and mix in their positions: of them the content's
    projections are taken. Its other layers are plain attention.
    """
    if not isinstance(layer, attention_classes()):
        return None
    gated = hasattr(layer, "gating_param")
    own: Any = layer
    parts = (own.qk, own.v) if gated else (own.qkv,)
    dim, biased = own.proj.in_features, parts[0].bias is not None
    drops = {"attn_drop": own.attn_drop.p, "proj_drop": own.proj_drop.p}
    plain = Attention(dim, own.num_heads, qkv_bias=biased, proj_bias=own.proj.bias is not None, **drops)
    plain.to(own.proj.weight.device, own.proj.weight.dtype)
    plain.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
    if biased:
        plain.qkv.bias.copy_(torch.cat([part.bias for part in parts]))
    plain.proj.load_state_dict(own.proj.state_dict())
    return Source(plain.train(layer.training), exact=not gated, num_prefix_tokens=0 if gated else None)


def replaceable(layer: nn.Module, init: str, name: str) -> tuple[nn.Module, int | None]:
    """Return the layer that a replacement is built from, and the number of its prefix tokens where it differs.

    Raises:
        ConfigError: for ``init=transfer`` of a layer whose function has no place in a replacement.
    """
    source = source_of(layer)
    if source is None:
        return layer, None
    if init == "transfer" and not source.exact:
        raise ConfigError(
            f"swap.init=transfer: '{name}' is a {type(layer).__name__}, whose positions have no place in its "
            "replacement; use fresh, or exclude it (swap.exclude)"
        )
    return source.layer, source.num_prefix_tokens
