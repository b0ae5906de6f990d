"""Attention between convolutions: those before are part of how queries, keys and values are made, those after of how
the output is.

Shapes: B batch, H heads, N tokens, C channels of values per head, h x w a map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convnn.nn.adapters.base import Adapter, merged, per_head, scaled
from convnn.nn.neighbor_attention import Heads
from convnn.ops.geometry import QueryMap


class _Convolved(Adapter):
    grid_from_model = False

    def prefix(self, layer: Any) -> int | None:
        """Return 0."""
        return 0


class Strided(_Convolved):
    """LowFormer's and CPUBone's ``ConvAttention``: attention on a coarser map, which is then made fine again."""

    layers = ("timm.models.lowformer:ConvAttention", "timm.models.cpubone:ConvAttention")

    def size(self, layer: Any) -> tuple[int, int]:
        """Return H and C."""
        return layer.num_heads, layer.head_dim

    def read(self, layer: Any, x: Tensor) -> Heads:
        """Return the heads of a map (B, channels, h, w)."""
        size, stride = x.shape[-2:], layer.att_stride
        if getattr(layer, "small_kernels", False) and stride > 1:
            x = F.pad(x, (0, -size[1] % stride, 0, -size[0] % stride))
        x = layer.pwise(layer.conv_proj(x))
        grid = x.shape[-2], x.shape[-1]
        q, k, v = per_head(x.flatten(2).mT, layer.num_heads).chunk(3, dim=-1)
        return Heads(q, k, v, grid=grid, rest=(size, grid))

    def write(self, layer: Any, y: Tensor, heads: Heads) -> Tensor:
        """Return (B, channels, h, w)."""
        (height, width), grid = heads.rest
        x = layer.upsampling(layer.o_proj(merged(y).mT.unflatten(2, grid)))
        return x[..., :height, :width]


class Cascaded(_Convolved):
    """EfficientViT's ``CascadedGroupAttention`` (arXiv 2305.07027): a head reads what the one before it has made."""

    layers = ("timm.models.efficientvit_msra:CascadedGroupAttention",)
    in_turn = True

    def tokens(self, layer: Any) -> int | None:
        """Return N of the table."""
        return layer.resolution**2

    def size(self, layer: Any) -> tuple[int, int]:
        """Return H and C."""
        return layer.num_heads, layer.val_dim

    def read(self, layer: Any, x: Tensor) -> Heads:
        """Return the first head of a map (B, channels, h, w)."""
        return self.head(layer, x.chunk(layer.num_heads, dim=1)[0], 0)

    def head(self, layer: Any, x: Tensor, number: int) -> Heads:
        """Return a head of its share of the channels, (B, channels / H, h, w)."""
        size = x.shape[-2], x.shape[-1]
        q, k, v = layer.qkvs[number](x).split([layer.key_dim, layer.key_dim, layer.val_dim], dim=1)
        q, k, v = (t.flatten(2).mT[:, None] for t in (layer.dws[number](q), k, v))
        bias = layer.attention_biases[number, layer.attention_bias_idxs][None, None]
        return Heads(scaled(q, layer.scale), k, v, bias=bias, grid=size, head=number)

    def attend(self, layer: Any, mix: Callable[[Heads], Tensor], *args: Any, **given: Any) -> Tensor:
        """Return (B, channels, h, w)."""
        (x,) = (*args, *given.values())
        shares, size = x.chunk(layer.num_heads, dim=1), x.shape[-2:]
        made: list[Tensor] = []
        for number, share in enumerate(shares):
            share = share + made[-1] if made else share
            made.append(mix(self.head(layer, share, number))[:, 0].mT.unflatten(2, size))
        return layer.proj(torch.cat(made, dim=1))


class Halo(_Convolved):
    """``HaloAttn`` (arXiv 2103.12731): blocks of queries; keys are those of a block and a halo, zeros beyond the map.

    Positions are products of the queries with embeddings of offsets: a bias.
    """

    layers = ("timm.layers.halo_attn:HaloAttn",)

    def tokens(self, layer: Any) -> int | None:
        """Return those of a block with its halo."""
        return layer.win_size**2

    def size(self, layer: Any) -> tuple[int, int]:
        """Return H and C."""
        return layer.num_heads, layer.dim_head_v

    def read(self, layer: Any, x: Tensor) -> Heads:
        """Return the heads of the blocks of a map (B, channels, h, w): B * blocks of them."""
        block, halo, heads, window = layer.block_size, layer.halo_size, layer.num_heads, layer.win_size
        if x.shape[2] % block or x.shape[3] % block:
            raise ValueError(f"a {x.shape[2]}x{x.shape[3]} map is not made of whole blocks of {block}x{block}")
        blocks = x.shape[2] // block, x.shape[3] // block
        own = layer.block_size_ds
        q = layer.q(x).unflatten(3, (blocks[1], own)).unflatten(2, (blocks[0], own))
        q = q.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)  # (B * blocks, Q, H * D)
        kv = F.pad(layer.kv(x), [halo] * 4).unfold(2, window, block).unfold(3, window, block)
        kv = kv.permute(0, 2, 3, 4, 5, 1).flatten(3, 4).flatten(0, 2)  # (B * blocks, N, H * (D + C))
        q = per_head(q, heads)
        k, v = per_head(kv, heads).split([layer.dim_head_qk, layer.dim_head_v], dim=-1)
        bias = layer.pos_embed(q) * (layer.scale if layer.scale_pos_embed else 1)
        queries = QueryMap((own, own), (halo, halo), (layer.block_stride, layer.block_stride))
        return Heads(q, k, v, bias=bias, grid=(window, window), queries=queries, rest=blocks)

    def write(self, layer: Any, y: Tensor, heads: Heads) -> Tensor:
        """Return (B, channels, h, w), pooled if the layer does that."""
        (rows, columns), own = heads.rest, layer.block_size_ds
        x = merged(y).unflatten(0, (-1, rows, columns)).unflatten(3, (own, own))  # (B, blocks, own, own, channels)
        return layer.pool(x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3))


ADAPTERS = (Strided(), Cascaded(), Halo())
