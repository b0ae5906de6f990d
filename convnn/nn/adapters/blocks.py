"""Attention of plain transformers that is more than a layer of attention: two of them, an MLP beside it, padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from convnn.nn.adapters.base import Adapter, merged, per_head, refuse, scaled
from convnn.nn.neighbor_attention import Heads


class ParallelBlock(Adapter):
    """``ParallelScalingBlock`` (arXiv 2302.05442), a block whose one projection makes q, k, v and the MLP's features.

    The replacement is the whole block, of which the attention alone has fewer neighbours.
    """

    layers = ("timm.models.vision_transformer:ParallelScalingBlock",)

    def size(self, layer: Any) -> tuple[int, int]:
        """Return H and C."""
        return layer.num_heads, layer.head_dim

    def read(self, layer: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Heads:
        """Return the heads of (B, N, channels)."""
        refuse(attn_mask=attn_mask, is_causal=is_causal)
        hidden, *parts = layer.in_proj(layer.in_norm(x)).split(layer.in_split, dim=-1)
        hidden = hidden if layer.mlp_bias is None else hidden + layer.mlp_bias
        q, k, v = (per_head(part, layer.num_heads) for part in parts)
        return Heads(layer.q_norm(q), layer.k_norm(k), v, rest=(x, hidden))

    def write(self, layer: Any, y: Tensor, heads: Heads) -> Tensor:
        """Return (B, N, channels): the block's input and what attention and MLP add to it."""
        x, hidden = heads.rest
        hidden = layer.mlp_drop(layer.mlp_act(hidden))
        if layer.out_proj is not None:
            added = layer.out_proj(torch.cat([merged(y), hidden], dim=-1))
        else:
            added = layer.attn_out_proj(merged(y)) + layer.mlp_out_proj(hidden)
        return x + layer.drop_path(layer.ls(added))


class Difference(Adapter):
    """``DiffAttention`` (arXiv 2410.05258): one attention less a share of another, which choose each for itself."""

    layers = ("timm.layers.diff_attention:DiffAttention",)

    def size(self, layer: Any) -> tuple[int, int]:
        """Return the number of attentions, two for each head, and C."""
        return 2 * layer.num_heads, 2 * layer.head_dim

    def read(self, layer: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Heads:
        """Return the heads of (B, N, channels)."""
        refuse(attn_mask=attn_mask, is_causal=is_causal)
        q, k, v = layer.qkv(x).chunk(3, dim=-1)
        q, k = (per_head(t, 2 * layer.num_heads) for t in (q, k))
        v = per_head(v, layer.num_heads).repeat_interleave(2, dim=1)
        return Heads(layer.q_norm(q), layer.k_norm(k), v)

    def write(self, layer: Any, y: Tensor, heads: Heads) -> Tensor:
        """Return (B, N, channels)."""
        one, other = y.unflatten(1, (-1, 2)).unbind(2)
        x = layer.sub_norm(one - layer._compute_lambda().type_as(y) * other)
        return layer.proj_drop(layer.proj(layer.norm(merged(x * (1 - layer.lambda_init)))))


class Padded(Adapter):
    """Gemma 4's ``Gemma4Attention``: normalised and rotated, with a mask of the patches that are padding."""

    layers = ("timm.models.gemma4_vit:Gemma4Attention",)
    grid_from_model = False

    def prefix(self, layer: Any) -> int | None:
        """Return 0."""
        return 0

    def size(self, layer: Any) -> tuple[int, int]:
        """Return H and C."""
        return layer.num_heads, layer.head_dim

    def read(self, layer: Any, x: Tensor, rope_cos: Tensor, rope_sin: Tensor, attn_mask: Tensor | None = None) -> Heads:
        """Return the heads of (B, N, channels). Patches with a mask of -inf are no neighbours; the rest is a bias."""
        from timm.models.gemma4_vit import apply_multidimensional_rope

        q = layer.q_norm(layer.q_proj(x).unflatten(-1, (layer.num_heads, -1)))
        k = layer.k_norm(layer.k_proj(x).unflatten(-1, (layer.num_kv_heads, -1)))
        v = layer.v_norm(layer.v_proj(x).unflatten(-1, (layer.num_kv_heads, -1)))
        turn = {"ndim": 2, "unsqueeze_dim": 2}
        q, k = (apply_multidimensional_rope(t, rope_cos, rope_sin, **turn) for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        k, v = (t.repeat_interleave(layer.num_kv_groups, dim=1) for t in (k, v))
        blocked = None if attn_mask is None else attn_mask == -torch.inf
        bias = None if attn_mask is None or blocked is None else attn_mask.masked_fill(blocked, 0)
        return Heads(scaled(q, 1.0), k, v, bias=bias, blocked=blocked)

    def write(self, layer: Any, y: Tensor, heads: Heads) -> Tensor:
        """Return (B, N, channels)."""
        return layer.proj_drop(layer.o_proj(merged(y)))


ADAPTERS = (ParallelBlock(), Difference(), Padded())
