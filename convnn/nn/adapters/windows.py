"""Attention inside windows: Swin, its second version, and others. Neighbours are chosen inside the query's window.

Where windows are shifted, those at the border hold patches from both ends of the map, which must not see each other.
The layers write that as a mask of -100 (a weight of e^-100); here such tokens are no neighbours at all.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnn.nn.adapters.base import Adapter, biased, merged, split
from convnn.nn.neighbor_attention import Heads


class _Window(Adapter):
    grid_from_model = False

    def prefix(self, layer: Any) -> int | None:
        """Return 0."""
        return 0

    def tokens(self, layer: Any) -> int | None:
        """Return the window's."""
        return math.prod(layer.window_size)


def foreign(mask: Tensor | None, windows: int) -> Tensor | None:
    """Return which tokens of its window a query must not see, (windows, 1, N, N): ``mask`` is of one image."""
    if mask is None:
        return None
    return (mask < 0).repeat(windows // mask.shape[0], 1, 1)[:, None]


def cosine(q: Tensor, k: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries and keys whose product over sqrt(D) is their cosine times the heads' scales (H, 1, 1)."""
    scale = logit_scale.clamp(max=math.log(100)).exp() * math.sqrt(q.shape[-1])
    return F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1)


class Swin(_Window):
    """Swin's ``WindowAttention`` (arXiv 2103.14030)."""

    layers = ("timm.models.swin_transformer:WindowAttention",)

    def read(self, layer: Any, x: Tensor, mask: Tensor | None = None) -> Heads:
        """Return the heads of windows (B * windows, N, channels)."""
        parts, bias = split(layer.qkv(x), layer.num_heads), layer._get_rel_pos_bias()
        return Heads(*parts, bias=bias, blocked=foreign(mask, x.shape[0]), grid=tuple(layer.window_size))


class SwinV2(_Window):
    """``WindowAttention`` of Swin V2 (arXiv 2111.09883): cosines times a scale, and a bias from a small network."""

    layers = ("timm.models.swin_transformer_v2:WindowAttention",)

    def read(self, layer: Any, x: Tensor, mask: Tensor | None = None) -> Heads:
        """Return the heads of windows (B * windows, N, channels)."""
        q, k, v = split(biased(layer, x), layer.num_heads)
        q, k = cosine(q, k, layer.logit_scale)
        table = layer.cpb_mlp(layer.relative_coords_table).view(-1, layer.num_heads)
        bias = 16 * table[layer.relative_position_index].permute(2, 0, 1).sigmoid()
        return Heads(q, k, v, bias=bias[None], blocked=foreign(mask, x.shape[0]), grid=tuple(layer.window_size))


class SwinV2Cr(_Window):
    """``WindowMultiHeadAttention``, timm's other Swin V2."""

    layers = ("timm.models.swin_transformer_v2_cr:WindowMultiHeadAttention",)

    def read(self, layer: Any, x: Tensor, mask: Tensor | None = None) -> Heads:
        """Return the heads of windows (B * windows, N, channels)."""
        q, k, v = split(layer.qkv(x), layer.num_heads)
        q, k = cosine(q, k, layer.logit_scale[:, None, None])
        bias = layer._relative_positional_encodings()
        return Heads(q, k, v, bias=bias, blocked=foreign(mask, x.shape[0]), grid=tuple(layer.window_size))


class DaVit(_Window):
    """DaViT's ``WindowAttention``: plain attention inside windows."""

    layers = ("timm.models.davit:WindowAttention",)

    def read(self, layer: Any, x: Tensor) -> Heads:
        """Return the heads of windows (B * windows, N, channels)."""
        return Heads(*split(layer.qkv(x), layer.num_heads), grid=tuple(layer.window_size))

    def write(self, layer: Any, y: Tensor, heads: Heads) -> Tensor:
        """Return (B * windows, N, channels)."""
        return layer.proj(merged(y))


class TorchvisionSwin(_Window):
    """torchvision's ``ShiftedWindowAttention`` and ``V2``, which cut the windows themselves."""

    layers = (
        "torchvision.models.swin_transformer:ShiftedWindowAttention",
        "torchvision.models.swin_transformer:ShiftedWindowAttentionV2",
    )

    def dropout(self, layer: Any) -> float:
        """Return the layer's."""
        return layer.attention_dropout

    @torch.no_grad()
    def start(self, layer: Any) -> None:
        """Fill table and scale as the constructor does."""
        if hasattr(layer, "logit_scale"):
            layer.logit_scale.fill_(math.log(10))
        else:
            nn.init.trunc_normal_(layer.relative_position_bias_table, std=0.02)

    def read(self, layer: Any, x: Tensor) -> Heads:
        """Return the heads of the windows of a map (B, h, w, channels)."""
        (rows, columns), size = layer.window_size, x.shape
        x = F.pad(x, (0, 0, 0, -size[2] % columns, 0, -size[1] % rows))
        padded = x.shape
        shift = [
            0 if w >= side else s for w, side, s in zip(layer.window_size, padded[1:3], layer.shift_size, strict=True)
        ]
        blocked = None
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), (1, 2))
            places = regions(padded[1], padded[2], layer.window_size, shift, x.device)
            places = in_windows(places[None, :, :, None], rows, columns).squeeze(-1)
            blocked = (places[:, None] != places[:, :, None]).repeat(x.shape[0], 1, 1)[:, None]
        windows = in_windows(x, rows, columns)
        qkv_bias = layer.qkv.bias
        if hasattr(layer, "logit_scale") and qkv_bias is not None:  # keys have none
            zero = torch.zeros_like(qkv_bias)
            third = len(qkv_bias) // 3
            qkv_bias = torch.cat([qkv_bias[:third], zero[third : 2 * third], qkv_bias[2 * third :]])
        q, k, v = split(F.linear(windows, layer.qkv.weight, qkv_bias), layer.num_heads)
        if hasattr(layer, "logit_scale"):
            q, k = cosine(q, k, layer.logit_scale)
        bias, rest = layer.get_relative_position_bias(), (size, padded, shift)
        return Heads(q, k, v, bias=bias, blocked=blocked, grid=(rows, columns), rest=rest)

    def write(self, layer: Any, y: Tensor, heads: Heads) -> Tensor:
        """Return (B, h, w, channels)."""
        size, padded, shift = heads.rest
        x = F.dropout(layer.proj(merged(y)), layer.dropout, training=layer.training)
        x = of_windows(x, padded[1], padded[2], *layer.window_size)
        if any(shift):
            x = x.roll((shift[0], shift[1]), (1, 2))
        return x[:, : size[1], : size[2]].contiguous()


def regions(height: int, width: int, window: Any, shift: Any, device: torch.device) -> Tensor:
    """Return a number for each part of a shifted map that was one before: (h, w)."""
    marks = []
    for side, own, step in zip((height, width), window, shift, strict=True):
        place = torch.arange(side, device=device)
        # Without a shift along this axis the last part is empty, as slices from -0 are the whole axis and then it.
        cut = side - step if step else 0
        marks.append((place >= side - own).long() + (place >= cut).long())
    return marks[0][:, None] * 3 + marks[1]


def in_windows(x: Tensor, rows: int, columns: int) -> Tensor:
    """Return the windows of a map: (B, h, w, C) -> (B * windows, rows * columns, C)."""
    x = x.unflatten(2, (-1, columns)).unflatten(1, (-1, rows))
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def of_windows(x: Tensor, height: int, width: int, rows: int, columns: int) -> Tensor:
    """Return the map of windows: (B * windows, rows * columns, C) -> (B, h, w, C)."""
    x = x.unflatten(1, (rows, columns)).unflatten(0, (-1, height // rows, width // columns))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


ADAPTERS = (Swin(), SwinV2(), SwinV2Cr(), DaVit(), TorchvisionSwin())
