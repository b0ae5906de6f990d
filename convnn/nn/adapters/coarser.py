"""Attention whose keys are those of a coarser map than its queries, or whose queries are of a coarser one.

Every query is taken to stand in the middle of the patch that it is of, and every key in the middle of its own.

Shapes: B batch, H heads, Q queries, N keys, D channels per head, h x w a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from convnn.nn.adapters.base import Adapter, halves, merged, per_head, refuse, scaled, split
from convnn.nn.neighbor_attention import Heads
from convnn.ops.geometry import Pair, QueryMap


class _Coarser(Adapter):
    """The input tells both maps."""

    grid_from_model = False

    def prefix(self, layer: Any) -> int | None:
        """Return 0."""
        return 0


def over(tokens: Sequence[int], queries: Sequence[int]) -> dict[str, Any]:
    """Return what ``Heads`` are told of keys and queries on two maps of one image."""
    tokens, queries = (tokens[0], tokens[1]), (queries[0], queries[1])
    return {"grid": tokens, "queries": None if tokens == queries else QueryMap.over(tokens, queries)}


class Reduced(_Coarser):
    """Twins' ``GlobalSubSampleAttn`` and PVT v2's ``Attention``: keys of a strided convolution, or of a 7 x 7 mean."""

    layers = ("timm.models.twins:GlobalSubSampleAttn", "timm.models.pvt_v2:Attention")

    def read(self, layer: Any, x: Tensor, size: Pair | None = None, feat_size: Pair | None = None) -> Heads:
        """Return the heads of (B, h * w, channels); the one class calls h and w ``size``, the other ``feat_size``."""
        own = size if feat_size is None else feat_size
        assert own is not None
        q = per_head(layer.q(x), layer.num_heads)
        grid: Sequence[int] = own
        if layer.sr is not None:
            pool, act = (getattr(layer, name, None) for name in ("pool", "act"))
            x = x.mT.unflatten(2, (own[0], own[1]))
            x = layer.sr(x if pool is None else pool(x))
            grid = x.shape[-2:]
            x = layer.norm(x.flatten(2).mT)
            x = x if act is None else act(x)
        return Heads(q, *halves(layer.kv(x), layer.num_heads), **over(grid, own))


class Runs(_Coarser):
    """Next-ViT's ``EfficientAttention``: keys are means of runs of tokens, which are no patches of the map."""

    layers = ("timm.models.nextvit:EfficientAttention",)

    def read(self, layer: Any, x: Tensor) -> Heads:
        """Return the heads of (B, h * w, channels)."""
        q = per_head(layer.q(x), layer.num_heads)
        x = x if layer.sr is None else layer.norm(layer.sr(x.mT)).mT
        return Heads(q, per_head(layer.k(x), layer.num_heads), per_head(layer.v(x), layer.num_heads))


class MultiQuery(_Coarser):
    """``MultiQueryAttention2d`` of maps (B, channels, h, w): one head of keys and values for all of the queries'."""

    layers = ("timm.layers.attention2d:MultiQueryAttention2d",)

    def size(self, layer: Any) -> tuple[int, int]:
        """Return H and C."""
        return layer.num_heads, layer.value_dim

    def read(self, layer: Any, x: Tensor, attn_mask: Tensor | None = None) -> Heads:
        """Return the heads."""
        refuse(attn_mask=attn_mask)
        q, k, v = layer.query(x), layer.key(x), layer.value(x)
        places, own = over(k.shape[-2:], q.shape[-2:]), q.shape[-2:]
        q = per_head(q.flatten(2).mT, layer.num_heads)
        k, v = (shared(t.flatten(2).mT, layer.num_heads) for t in (k, v))
        return Heads(q, k, v, **places, rest=own)

    def write(self, layer: Any, y: Tensor, heads: Heads) -> Tensor:
        """Return (B, channels, h, w)."""
        return layer.output(merged(y).mT.unflatten(2, heads.rest))


class MultiQueryV2(_Coarser):
    """``MultiQueryAttentionV2``, with keys of the same map or of another, (B, channels, h, w) both."""

    layers = ("timm.layers.attention2d:MultiQueryAttentionV2",)

    def size(self, layer: Any) -> tuple[int, int]:
        """Return H and C."""
        return layer.num_heads, layer.value_dim

    def read(self, layer: Any, x: Tensor, m: Tensor | None = None) -> Heads:
        """Return the heads."""
        m = x if m is None else m
        seen = m.flatten(2).mT
        q = torch.einsum("bnd,hkd->bhnk", x.flatten(2).mT, layer.query_proj)
        k, v = (shared(seen @ weight, layer.num_heads) for weight in (layer.key_proj, layer.value_proj))
        return Heads(q, k, v, **over(m.shape[-2:], x.shape[-2:]), rest=x.shape[-2:])

    def write(self, layer: Any, y: Tensor, heads: Heads) -> Tensor:
        """Return (B, channels, h, w)."""
        x = torch.einsum("bhnv,dhv->bdn", y, layer.out_proj)
        return layer.proj_drop(x).unflatten(2, heads.rest)


def shared(x: Tensor, heads: int) -> Tensor:
    """Return one head as all: (B, N, D) -> (B, H, N, D)."""
    return x[:, None].expand(-1, heads, -1, -1)


class MultiScale(_Coarser):
    """MViT v2's ``MultiScaleAttention`` (arXiv 2112.01526): queries, keys and values are pooled after they were made.

    Its relative positions are products of the queries with embeddings of row and column offsets: a bias.
    """

    layers = ("timm.models.mvitv2:MultiScaleAttention",)

    def prefix(self, layer: Any) -> int | None:
        """Return 1 with a class token, which is not pooled."""
        return int(layer.has_cls_token)

    def dropout(self, layer: Any) -> float:
        """Return 0."""
        return 0.0

    def read(self, layer: Any, x: Tensor, feat_size: Pair) -> Heads:
        """Return the heads of (B, h * w, channels), with the class token first if there is one."""
        from timm.models.mvitv2 import cal_rel_pos_type

        q, k, v = split(layer.qkv(x), layer.num_heads)
        q, own = pooled(layer, q, feat_size, layer.pool_q, layer.norm_q)
        k, grid = pooled(layer, k, feat_size, layer.pool_k, layer.norm_k)
        v, _ = pooled(layer, v, feat_size, layer.pool_v, layer.norm_v)
        bias = None
        if layer.rel_pos_type == "spatial":
            none = q.new_zeros(*q.shape[:3], k.shape[2])
            bias = cal_rel_pos_type(none, q, layer.has_cls_token, own, grid, layer.rel_pos_h, layer.rel_pos_w)
        return Heads(q, k, v, bias=bias, **over(grid, own), rest=own)

    def write(self, layer: Any, y: Tensor, heads: Heads) -> tuple[Tensor, Pair]:
        """Return (B, Q, channels), with the queries added to it if the layer does that, and their rows and columns."""
        y = y + heads.q if layer.residual_pooling else y
        return layer.proj(merged(y)), heads.rest


def pooled(layer: Any, x: Tensor, size: Pair, pool: Any, norm: Any) -> tuple[Tensor, Any]:
    """Return heads (B, H, N, D) pooled, all but the class token, and normalised; with the new rows and columns."""
    from timm.models.mvitv2 import reshape_post_pool, reshape_pre_pool

    if pool is not None:
        x, token = reshape_pre_pool(x, size, layer.has_cls_token)
        x, size = reshape_post_pool(pool(x), layer.num_heads, token)
    return (x if norm is None else norm(x)), size


class Downsampling(_Coarser):
    """LeViT's ``AttentionDownsample``: queries at every second token along each axis, a bias for each offset."""

    layers = ("timm.models.levit:AttentionDownsample",)

    def tokens(self, layer: Any) -> int | None:
        """Return N of the table."""
        return layer.attention_bias_idxs.shape[1]

    def size(self, layer: Any) -> tuple[int, int]:
        """Return H and C."""
        return layer.num_heads, layer.val_dim

    def read(self, layer: Any, x: Tensor) -> Heads:
        """Return the heads of (B, h * w, channels), or of a map (B, channels, h, w)."""
        kv, q = layer.kv(x), layer.q(x)
        kv = kv.flatten(2).mT if x.ndim == 4 else kv
        grid = tuple(x.shape[-2:]) if x.ndim == 4 else tuple(layer.resolution)
        own = tuple(-(-side // layer.stride) for side in grid)
        q = per_head(q.flatten(2).mT if x.ndim == 4 else q, layer.num_heads)
        k, v = per_head(kv, layer.num_heads).split([layer.key_dim, layer.val_dim], dim=-1)
        bias = layer.attention_biases[:, layer.attention_bias_idxs][None]
        places: dict[str, Any] = {"grid": grid, "queries": every(layer.stride, own)}
        return Heads(scaled(q, layer.scale), k, v, bias=bias, **places, rest=own if x.ndim == 4 else None)

    def write(self, layer: Any, y: Tensor, heads: Heads) -> Tensor:
        """Return what came in, of the coarser map."""
        y = merged(y)
        return layer.proj(y if heads.rest is None else y.mT.unflatten(2, heads.rest))


class DownsamplingLocal(_Coarser):
    """EfficientFormer V2's ``Attention2dDownsample``: the same on maps, with a convolution of the values besides."""

    layers = ("timm.models.efficientformer_v2:Attention2dDownsample",)

    def tokens(self, layer: Any) -> int | None:
        """Return N of the table."""
        return layer.N

    def size(self, layer: Any) -> tuple[int, int]:
        """Return H and C."""
        return layer.num_heads, layer.d

    def read(self, layer: Any, x: Tensor) -> Heads:
        """Return the heads of a map (B, channels, h, w)."""
        v, grid, own = layer.v(x), tuple(layer.resolution), tuple(layer.resolution2)
        q, k, values = (per_head(t.flatten(2).mT, layer.num_heads) for t in (layer.q(x), layer.k(x), v))
        bias = layer.attention_biases[:, layer.attention_bias_idxs][None]
        places: dict[str, Any] = {"grid": grid, "queries": every(2, own)}
        return Heads(scaled(q, layer.scale), k, values, bias=bias, **places, rest=layer.v_local(v))

    def write(self, layer: Any, y: Tensor, heads: Heads) -> Tensor:
        """Return (B, channels, h / 2, w / 2)."""
        local = heads.rest
        return layer.proj(layer.act(merged(y).mT.reshape(local.shape) + local))


def every(stride: int, size: Any) -> QueryMap:
    """Return queries on every so many-th token along each axis, from the first on."""
    return QueryMap(size, (0.0, 0.0), (float(stride), float(stride)))


ADAPTERS = (
    Reduced(),
    Runs(),
    MultiQuery(),
    MultiQueryV2(),
    MultiScale(),
    Downsampling(),
    DownsamplingLocal(),
)
