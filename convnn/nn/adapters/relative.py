"""Attention with a bias for each offset between two patches: BEiT, relative-position ViTs, LeViT and their kin.

The bias is added to the scores that weigh; whether it bears on those that choose is ``operator.bias_selects``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from convnn.nn.adapters.base import Adapter, biased, halves, merged, per_head, scaled, split
from convnn.nn.neighbor_attention import Heads


class Beit(Adapter):
    """BEiT's ``Attention``, with a table of its own, one that the blocks share, or none."""

    layers = ("timm.models.beit:Attention",)

    def prefix(self, layer: Any) -> int | None:
        """Return 1 where there is a table, which has one for the class token."""
        return None if layer.window_size is None else 1

    def tokens(self, layer: Any) -> int | None:
        """Return N of the table."""
        window = layer.window_size
        return None if window is None else window[0] * window[1] + 1

    def read(self, layer: Any, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Heads:
        """Return the heads of (B, N, channels); the shared bias is (H, N, N) or (1, H, N, N)."""
        bias, grid = shared_rel_pos_bias, None
        if layer.relative_position_bias_table is not None:
            own, grid = layer._get_rel_pos_bias(), tuple(layer.window_size)
            bias = own if bias is None else own + bias
        return Heads(*split(biased(layer, x), layer.num_heads), bias=bias, grid=grid)


class RelativePosition(Adapter):
    """``RelPosAttention``, with ``RelPosBias`` or ``RelPosMlp``, of its own or shared; and GC ViT's windows."""

    layers = ("timm.models.vision_transformer_relpos:RelPosAttention",)

    def read(self, layer: Any, x: Tensor, shared_rel_pos: Tensor | None = None) -> Heads:
        """Return the heads of (B, N, channels); the shared bias is (1, H, N, N)."""
        q, k, v = split(layer.qkv(x), layer.num_heads)
        bias = shared_rel_pos if layer.rel_pos is None else layer.rel_pos.get_bias()
        return Heads(layer.q_norm(q), layer.k_norm(k), v, bias=bias)


class GlobalQuery(Adapter):
    """GC ViT's windows, whose queries may be those of the whole image."""

    layers = ("timm.models.gcvit:WindowAttentionGlobal",)
    grid_from_model = False

    def prefix(self, layer: Any) -> int | None:
        """Return 0."""
        return 0

    def tokens(self, layer: Any) -> int | None:
        """Return the window's."""
        return layer.window_size[0] * layer.window_size[1]

    def read(self, layer: Any, x: Tensor, q_global: Tensor | None = None) -> Heads:
        """Return the heads of windows (B, N, channels)."""
        more = {"bias": layer.rel_pos.get_bias(), "grid": tuple(layer.window_size)}
        if not layer.use_global or q_global is None:
            return Heads(*split(layer.qkv(x), layer.num_heads), **more)
        k, v = halves(layer.qkv(x), layer.num_heads)
        q = q_global.repeat_interleave(x.shape[0] // q_global.shape[0], dim=0).reshape(x.shape)
        return Heads(per_head(q, layer.num_heads), k, v, **more)


class Levit(Adapter):
    """Attention of LeViT, TinyViT and EfficientFormer: values wider than keys, a bias for each absolute offset."""

    layers = (
        "timm.models.levit:Attention",
        "timm.models.tiny_vit:Attention",
        "timm.models.efficientformer:Attention",
    )
    grid_from_model = False

    def prefix(self, layer: Any) -> int | None:
        """Return 0."""
        return 0

    def tokens(self, layer: Any) -> int | None:
        """Return N of the table."""
        return len(layer.attention_bias_idxs)

    def size(self, layer: Any) -> tuple[int, int]:
        """Return H and C."""
        return layer.num_heads, layer.val_dim

    def read(self, layer: Any, x: Tensor) -> Heads:
        """Return the heads of (B, N, channels), or of a map (B, channels, h, w)."""
        shape = x.shape
        x = layer.norm(x) if hasattr(layer, "norm") else x
        qkv = layer.qkv(x)
        qkv = qkv.flatten(2).mT if x.ndim == 4 else qkv
        q, k, v = per_head(qkv, layer.num_heads).split([layer.key_dim, layer.key_dim, layer.val_dim], dim=-1)
        grid = getattr(layer, "resolution", None)
        grid = tuple(shape[-2:]) if x.ndim == 4 else grid
        bias = layer.attention_biases[:, layer.attention_bias_idxs][None]
        return Heads(scaled(q, layer.scale), k, v, bias=bias, grid=grid, rest=shape)

    def write(self, layer: Any, y: Tensor, heads: Heads) -> Tensor:
        """Return what came in."""
        y = merged(y)
        return layer.proj(y.mT.unflatten(2, heads.rest[-2:]) if len(heads.rest) == 4 else y)


ADAPTERS = (Beit(), RelativePosition(), GlobalQuery(), Levit())
