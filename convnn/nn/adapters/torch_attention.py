"""``torch.nn.MultiheadAttention`` as self-attention: torch's own encoder, torchvision's ViT."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from convnn.nn.adapters.base import Adapter, merged, refuse, split
from convnn.nn.neighbor_attention import Heads


class Multihead(Adapter):
    """``MultiheadAttention`` called with one sequence as query, key and value, without masks or weights."""

    layers = ("torch.nn.modules.activation:MultiheadAttention",)

    def refusal(self, layer: Any) -> str | None:
        """Return what of the constructor's extras is there, if any."""
        if not layer._qkv_same_embed_dim:
            return "has keys or values of another width than its queries: it is no self-attention"
        if layer.bias_k is not None or layer.add_zero_attn:
            return "adds a token of its own (add_bias_kv, add_zero_attn)"
        return None

    def size(self, layer: Any) -> tuple[int, int]:
        """Return H and C."""
        return layer.num_heads, layer.head_dim

    def dropout(self, layer: Any) -> float:
        """Return the layer's."""
        return layer.dropout

    def stands_for(self, layer: Any) -> dict[str, Any]:
        """Keep ``TransformerEncoderLayer`` off its fast path, which attends by itself with the weights it reads."""
        return {"batch_first": layer.batch_first, "in_proj_bias": None}

    def read(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> Heads:
        """Return the heads of (B, N, channels), of (N, B, channels) without ``batch_first``, or of (N, channels)."""
        refuse(key_padding_mask=key_padding_mask, attn_mask=attn_mask, is_causal=is_causal)
        if need_weights:
            raise ValueError("need_weights is not supported: pass need_weights=False; neighborhood() has the weights")
        if key is not query or value is not query:
            raise ValueError("query, key and value must be the same tensor: only self-attention can choose neighbours")
        if query.is_nested:
            raise ValueError("nested tensors are not supported: all sequences must be of one length")
        shape = query.shape
        x = query[None] if query.ndim == 2 else query if layer.batch_first else query.transpose(0, 1)
        qkv = F.linear(x, layer.in_proj_weight, layer.in_proj_bias)
        return Heads(*split(qkv, layer.num_heads), rest=shape)

    def write(self, layer: Any, y: Tensor, heads: Heads) -> tuple[Tensor, None]:
        """Return (the output, None), as without ``need_weights``."""
        x = layer.out_proj(merged(y))
        if len(heads.rest) == 2:
            return x[0], None
        return (x if layer.batch_first else x.transpose(0, 1)), None


ADAPTERS = (Multihead(),)
