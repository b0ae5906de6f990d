"""Plain attention on maps and groups: what differs is the layout of the input and where the projections lie.

Shapes: B batch, H heads, N tokens, h x w a map.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convnn.nn.adapters.base import Adapter, halves, merged, per_head, scaled, split
from convnn.nn.adapters.windows import in_windows, of_windows
from convnn.nn.neighbor_attention import Heads
from convnn.ops.geometry import QueryMap


class _Map(Adapter):
    """The input tells the grid, and all its tokens are on it."""

    grid_from_model = False

    def prefix(self, layer: Any) -> int | None:
        """Return 0."""
        return 0


class ChannelsLast(_Map):
    """Maps (B, h, w, channels): VOLO, and SAM's image encoder with its rotary or decomposed relative positions."""

    layers = ("timm.models.volo:Attention", "timm.models.vision_transformer_sam:Attention")

    def read(self, layer: Any, x: Tensor) -> Heads:
        """Return the heads."""
        b, height, width, _ = x.shape
        q, k, v = split(layer.qkv(x.flatten(1, 2)), layer.num_heads)
        (q, k), bias = layer_norms(layer, q, k), None
        if getattr(layer, "use_rel_pos", False):
            bias = decomposed(q, layer.rel_pos_h, layer.rel_pos_w, (height, width))
        elif getattr(layer, "rope", None) is not None:
            from timm.layers.pos_embed_sincos import apply_rot_embed_cat

            turn = layer.rope.get_embed()
            q, k = (apply_rot_embed_cat(t, turn).type_as(v) for t in (q, k))
        return Heads(q, k, v, bias=bias, grid=(height, width), rest=(b, height, width))

    def write(self, layer: Any, y: Tensor, heads: Heads) -> Tensor:
        """Return (B, h, w, channels)."""
        return super().write(layer, y, heads).unflatten(1, heads.rest[1:])


def layer_norms(layer: Any, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries and keys through the layer's norms, if it has any."""
    return (layer.q_norm(q), layer.k_norm(k)) if hasattr(layer, "q_norm") else (q, k)


def decomposed(q: Tensor, rows: Tensor, columns: Tensor, size: tuple[int, int]) -> Tensor:
    """Return SAM's bias: products of the queries with an embedding of the row and of the column offset.

    Args:
        q: (B, H, h * w, D).
        rows: (offsets, D), resized if the map is not as large as the layer was made for.
        columns: (offsets, D).
        size: h and w.
    """
    from timm.models.vision_transformer_sam import get_rel_pos

    x = q.unflatten(2, size)
    by_row = torch.einsum("bnhwc,hkc->bnhwk", x, get_rel_pos(size[0], size[0], rows))
    by_column = torch.einsum("bnhwc,wkc->bnhwk", x, get_rel_pos(size[1], size[1], columns))
    return (by_row[..., :, None] + by_column[..., None, :]).flatten(4, 5).flatten(2, 3)


class Pooled(_Map):
    """SAM 2's ``MultiScaleAttention``, which may pool its queries."""

    layers = ("timm.models.hieradet_sam2:MultiScaleAttention",)

    def read(self, layer: Any, x: Tensor) -> Heads:
        """Return the heads of a map (B, h, w, channels)."""
        q, k, v = split(layer.qkv(x.flatten(1, 2)), layer.num_heads)
        grid = own = x.shape[1], x.shape[2]
        if layer.q_pool is not None:
            pooled = layer.q_pool(merged(q).mT.unflatten(2, grid))
            own, q = (pooled.shape[2], pooled.shape[3]), per_head(pooled.flatten(2).mT, layer.num_heads)
        queries = None if layer.q_pool is None else QueryMap.over(grid, own)
        return Heads(q, k, v, grid=grid, queries=queries, rest=own)

    def write(self, layer: Any, y: Tensor, heads: Heads) -> Tensor:
        """Return (B, h, w, channels)."""
        return layer.proj(merged(y)).unflatten(1, heads.rest)


class ChannelsFirst(_Map):
    """Maps (B, channels, h, w): MaxViT's and timm's ``Attention2d``, Visformer, FastViT."""

    layers = (
        "timm.models.maxxvit:Attention2d",
        "timm.layers.attention2d:Attention2d",
        "timm.models.visformer:Attention",
        "timm.models.fastvit:Attention",
    )

    def size(self, layer: Any) -> tuple[int, int]:
        """Return H and C."""
        channels = layer.proj.in_channels if hasattr(layer.proj, "in_channels") else layer.proj.in_features
        return layer.num_heads, channels // layer.num_heads

    def read(
        self, layer: Any, x: Tensor, shared_rel_pos: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Heads:
        """Return the heads; a mask that is added to the scores is taken for a bias."""
        size = x.shape[-2], x.shape[-1]
        linear = isinstance(layer.qkv, torch.nn.Linear)
        qkv = layer.qkv(x.flatten(2).mT) if linear else layer.qkv(x).flatten(2).mT
        if getattr(layer, "head_first", False):
            q, k, v = per_head(qkv, layer.num_heads).chunk(3, dim=-1)
        else:
            q, k, v = split(qkv, layer.num_heads)
        own = getattr(layer, "rel_pos", None)
        bias = shared_rel_pos if own is None else own.get_bias()
        return Heads(q, k, v, bias=attn_mask if bias is None else bias, grid=size, rest=size)

    def write(self, layer: Any, y: Tensor, heads: Heads) -> Tensor:
        """Return (B, channels, h, w)."""
        x = merged(y)
        if isinstance(layer.proj, torch.nn.Linear):
            return layer.proj_drop(layer.proj(x)).mT.unflatten(2, heads.rest)
        return layer.proj_drop(layer.proj(x.mT.unflatten(2, heads.rest)))


class Bottleneck(_Map):
    """``BottleneckAttn`` (arXiv 2101.11605): a map (B, channels, h, w), positions that depend on the queries."""

    layers = ("timm.layers.bottleneck_attn:BottleneckAttn",)

    def size(self, layer: Any) -> tuple[int, int]:
        """Return H and C."""
        return layer.num_heads, layer.dim_head_v

    def tokens(self, layer: Any) -> int | None:
        """Return N of the embedding."""
        return layer.pos_embed.height * layer.pos_embed.width

    def read(self, layer: Any, x: Tensor) -> Heads:
        """Return the heads."""
        parts = layer.qkv(x).flatten(2).mT.split([layer.dim_out_qk, layer.dim_out_qk, layer.dim_out_v], dim=-1)
        q, k, v = (per_head(part, layer.num_heads) for part in parts)
        bias = layer.pos_embed(q.flatten(0, 1)).unflatten(0, q.shape[:2])
        bias = bias * layer.scale if layer.scale_pos_embed else bias
        return Heads(q, k, v, bias=bias, grid=(x.shape[2], x.shape[3]), rest=x.shape[2:])

    def write(self, layer: Any, y: Tensor, heads: Heads) -> Tensor:
        """Return (B, channels, h, w), pooled if the layer strides."""
        return layer.pool(merged(y).mT.unflatten(2, heads.rest))


class Partition(_Map):
    """MaxViT's ``AttentionCl``: windows or grids (B * parts, h, w, channels)."""

    layers = ("timm.models.maxxvit:AttentionCl",)

    def tokens(self, layer: Any) -> int | None:
        """Return N of the table."""
        return None if layer.rel_pos is None else math.prod(layer.rel_pos.window_size)

    def read(self, layer: Any, x: Tensor, shared_rel_pos: Tensor | None = None) -> Heads:
        """Return the heads."""
        shape = x.shape
        qkv = layer.qkv(x).flatten(1, -2)
        if layer.head_first:
            q, k, v = per_head(qkv, layer.num_heads).chunk(3, dim=-1)
        else:
            q, k, v = split(qkv, layer.num_heads)
        bias = shared_rel_pos if layer.rel_pos is None else layer.rel_pos.get_bias()
        grid = (shape[1], shape[2]) if len(shape) == 4 else None
        return Heads(q, k, v, bias=bias, grid=grid, rest=shape[1:-1])

    def write(self, layer: Any, y: Tensor, heads: Heads) -> Tensor:
        """Return the input's shape."""
        return super().write(layer, y, heads).unflatten(1, heads.rest)


class Grouped(_Map):
    """NesT's blocks (B, blocks, N, channels) and torchvision's MaxViT (B, parts, N, channels)."""

    layers = ("timm.models.nest:Attention", "torchvision.models.maxvit:RelativePositionalMultiHeadAttention")

    def size(self, layer: Any) -> tuple[int, int]:
        """Return H and C."""
        return (layer.n_heads, layer.head_dim) if hasattr(layer, "n_heads") else super().size(layer)

    def tokens(self, layer: Any) -> int | None:
        """Return N of torchvision's table."""
        return getattr(layer, "max_seq_len", None)

    def read(self, layer: Any, x: Tensor) -> Heads:
        """Return the heads of all groups: (B * groups, H, N, D)."""
        size, x = x.shape[:2], x.flatten(0, 1)
        side = math.isqrt(x.shape[1])
        grid = (side, side) if side * side == x.shape[1] else None
        if not hasattr(layer, "n_heads"):
            return Heads(*split(layer.qkv(x), layer.num_heads), grid=grid, rest=size)
        q, k, v = split(layer.to_qkv(x), layer.n_heads)
        bias = layer.get_relative_positional_bias()
        return Heads(scaled(q, layer.scale_factor), k, v, bias=bias, grid=grid, rest=size)

    def write(self, layer: Any, y: Tensor, heads: Heads) -> Tensor:
        """Return (B, groups, N, channels)."""
        if hasattr(layer, "n_heads"):
            x = layer.merge(merged(y))
        else:  # heads are the inner index of NesT's channels
            x = layer.proj_drop(layer.proj(y.permute(0, 2, 3, 1).flatten(2)))
        return x.unflatten(0, heads.rest)


class MaskUnit(_Map):
    """Hiera's ``MaskUnitAttention``: global, or inside mask units (the inner index); its queries may be pooled."""

    layers = ("timm.models.hiera:MaskUnitAttention",)

    def size(self, layer: Any) -> tuple[int, int]:
        """Return H and C."""
        return layer.heads, layer.head_dim

    def tokens(self, layer: Any) -> int | None:
        """Return those of a mask unit."""
        return layer.q_stride * layer.window_size if layer.use_mask_unit_attn else None

    def read(self, layer: Any, x: Tensor) -> Heads:
        """Return the heads of (B, N, channels), of each mask unit by itself. Tokens are in Hiera's order, no raster."""
        units = x.shape[1] // (layer.q_stride * layer.window_size) if layer.use_mask_unit_attn else 1
        x = x.unflatten(1, (-1, units)).transpose(1, 2).flatten(0, 1)
        q, k, v = split(layer.qkv(x), layer.heads)
        q = q.unflatten(2, (layer.q_stride, -1)).amax(2) if layer.q_stride > 1 else q
        return Heads(q, k, v, rest=units)

    def write(self, layer: Any, y: Tensor, heads: Heads) -> Tensor:
        """Return (B, N, channels)."""
        x = merged(y).unflatten(0, (-1, heads.rest)).transpose(1, 2).flatten(1, 2)
        return layer.proj(x)


class Sequence(Adapter):
    """Sequences (B, N, channels) with plain attention of another class: MetaFormer, TNT."""

    layers = ("timm.models.metaformer:Attention", "timm.models.tnt:Attention")
    grid_from_model = False

    def prefix(self, layer: Any) -> int | None:
        """Return 0: where the tokens are is not known."""
        return 0

    def read(self, layer: Any, x: Tensor) -> Heads:
        """Return the heads."""
        heads = layer.num_heads
        if hasattr(layer, "qkv"):
            return Heads(*split(layer.qkv(x), heads))
        q, k = halves(layer.qk(x), heads)
        return Heads(q, k, per_head(layer.v(x), heads))


class LocalGroups(_Map):
    """Twins' ``LocallyGroupedAttn``: windows of a map, zero-padded to whole ones."""

    layers = ("timm.models.twins:LocallyGroupedAttn",)

    def tokens(self, layer: Any) -> int | None:
        """Return the window's."""
        return layer.ws**2

    def read(self, layer: Any, x: Tensor, size: tuple[int, int]) -> Heads:
        """Return the heads of the windows of (B, h * w, channels)."""
        height, width = size
        x = F.pad(x.unflatten(1, (height, width)), (0, 0, 0, -width % layer.ws, 0, -height % layer.ws))
        rest = (height, width, *x.shape[1:3])
        windows = in_windows(x, layer.ws, layer.ws)
        return Heads(*split(layer.qkv(windows), layer.num_heads), grid=(layer.ws, layer.ws), rest=rest)

    def write(self, layer: Any, y: Tensor, heads: Heads) -> Tensor:
        """Return (B, h * w, channels)."""
        height, width, rows, columns = heads.rest
        x = of_windows(merged(y), rows, columns, layer.ws, layer.ws)[:, :height, :width].flatten(1, 2)
        return layer.proj_drop(layer.proj(x))


ADAPTERS = (
    ChannelsLast(),
    Pooled(),
    ChannelsFirst(),
    Bottleneck(),
    Partition(),
    Grouped(),
    MaskUnit(),
    Sequence(),
    LocalGroups(),
)
