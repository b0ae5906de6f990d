"""The drop-in for timm's ``Attention``: parameters and signature around ``functional``.

Shapes: B batch, H heads, N tokens, K neighbours, C channels, D channels per head.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from torch import Tensor, nn

from convnn.config.schema import ATTENTION, OperatorConfig
from convnn.errors import ConfigError
from convnn.nn.base import NeighborLayer, Site, TokenGrid, grid_of, layer_settings
from convnn.ops.candidates import is_relative
from convnn.ops.functional import neighbor_aggregate
from convnn.ops.geometry import Geometry, Pair
from convnn.ops.neighborhood import Neighborhood, find_neighborhood
from convnn.ops.shortcuts import attend, attends_to_all

__all__ = ["Attention", "ConvNNAttention"]


def refuse_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    """Raise ValueError for the masks that timm's blocks may pass."""
    if attn_mask is not None or is_causal:
        raise ValueError("attn_mask and is_causal are not supported: neighbours are chosen among all tokens")


DEFAULTS = {"similarity": "dot", "self_first": False, "weighting": "softmax", "aggregation": "depthwise"}
"""What makes the settings those of the paper's attention layer."""


class ConvNNAttention(NeighborLayer):
    """Self-attention over the k nearest tokens, a drop-in for timm's ``Attention`` (arXiv 2511.14137).

    Keeps timm's parameter names. With ``aggregation="depthwise"`` each neighbour rank has a weight per channel,
    shared by the heads and initialised to ones; with ``sum`` and k = N it is exactly self-attention. Blends below 1
    select by position on ``grid_size``; prefix tokens (CLS) have no position, see ``select_neighbors``.

    Args:
        dim: C.
        num_heads: H; must divide C.
        k: neighbours per token.
        blend: 0 (position) to 1 (features).
        dim_out: channels of the output, default C.
        qkv_bias: bias of queries, keys and values.
        qk_norm: normalise queries and keys per head.
        proj_bias: bias of the output projection.
        attn_drop: dropout of the neighbours' weights, or see ``dropout_on``.
        proj_drop: dropout of the output.
        norm_layer: for ``qk_norm``.
        num_prefix_tokens: tokens before the grid.
        grid_size: rows and columns of the grid; default: square.
        fast: let fused attention compute the cases in which all candidates are neighbours.
        **settings: fields of ``convnn.OperatorConfig``: how neighbours are chosen (``similarity``, ``candidates``,
            ``slots``, ``border``, ``layout``, ...) and mixed (``weighting``, ``aggregation``, ...), and ``head_dim``,
            ``learn_blend``. Defaults that differ from that class are in ``DEFAULTS``.

    Shape:
        (B, N, C) -> (B, N, dim_out).

    Raises:
        ValueError: for a mask, for settings that contradict each other, and if k exceeds the candidates or the tokens
            form no grid.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        k: int = 9,
        blend: float = 1.0,
        *,
        dim_out: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        num_prefix_tokens: int = 0,
        grid_size: Pair | None = None,
        fast: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__()
        self._init_spectrum(ATTENTION, num_heads, DEFAULTS | {"k": k, "blend": blend} | settings)
        head_dim = self.settings.head_dim
        if head_dim is None and dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide dim={dim}")
        self.dim, self.num_heads, self.head_dim = dim, num_heads, head_dim or dim // num_heads
        self.num_prefix_tokens, self.grid_size, self.fast = num_prefix_tokens, grid_size, fast
        self.token_grid: TokenGrid | None = None
        """Where a swap has put the layer behind a patch embedding: what that saw last."""
        self.border, self.layout = self.settings.border, self.settings.layout
        self.aggregation = aggregation = self.settings.aggregation

        d = self.head_dim
        self.qkv = nn.Linear(dim, 3 * num_heads * d, bias=qkv_bias)
        self.q_norm = norm_layer(d) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(d) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        shape = {"depthwise": (d, k), "separable": (d, k), "conv": (d, d, k)}.get(aggregation)
        self.slot_weight = nn.Parameter(torch.empty(shape)) if shape else None
        self.pointwise = nn.Linear(d, d, bias=False) if aggregation == "separable" else None
        self.proj = nn.Linear(num_heads * d, dim_out or dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_slots()

    @torch.no_grad()
    def reset_slots(self, preserve: bool = False) -> None:
        """Draw the slot weights anew: depthwise ones, others as ``nn.Conv1d``.

        ``preserve`` makes every kind of aggregation the sum.
        """
        weight = self.slot_weight
        if weight is None:
            return
        if self.aggregation == "depthwise" or (preserve and self.aggregation == "separable"):
            weight.fill_(1)
        elif preserve:
            weight.copy_(torch.eye(self.head_dim)[..., None].expand_as(weight))
        else:
            nn.init.kaiming_uniform_(weight if weight.ndim == 3 else weight[:, None], a=math.sqrt(5))
        if self.pointwise is not None:
            nn.init.eye_(self.pointwise.weight) if preserve else self.pointwise.reset_parameters()

    def geometry(self, num_tokens: int) -> Geometry:
        """Return the grid of a sequence of this length.

        Raises:
            ValueError: if the tokens after the prefix are neither ``grid_size`` nor a square.
        """
        if self.layout == "sequence":
            return Geometry(1, num_tokens, dilation=(1, self.settings.token_dilation))
        height, width = grid_of(num_tokens, self.num_prefix_tokens, self.grid_size, self.token_grid)
        radius, step = math.isqrt(self.k_max) // 2, self.settings.token_dilation
        prefix, dilation = self.num_prefix_tokens, (step,) * 2
        if self.border == "zeros":
            side, ring = (2 * radius + 1,) * 2, (step * radius,) * 2
            return Geometry(height, width, kernel=side, padding=ring, dilation=dilation, prefix=prefix)
        if self.border == "shift" and step > 1 and (2 * radius + 1) * step > min(height, width):
            raise ValueError(
                f"a {2 * radius + 1} wide window with token_dilation={step} does not fit into a {height}x{width} grid; "
                "lower k or token_dilation"
            )
        margin = (radius,) * 2 if self.border == "shift" else (0, 0)
        return Geometry(height, width, dilation=dilation, prefix=prefix, margin=margin)

    def layout_of(self, num_tokens: int) -> Geometry:
        """Return where the tokens of a sequence of this length lie, as far as this layer cares."""
        # Without positions or a grid of candidates a plain sequence of any length will do.
        relative = is_relative(self.selection)
        whole = self.selection.candidates in ("all", "random") and self.border != "zeros" and not relative
        if self.layout == "grid" and self.blend_logit is None and self.blend == 1 and whole:
            return Geometry(1, num_tokens - self.num_prefix_tokens, prefix=self.num_prefix_tokens)
        return self.geometry(num_tokens)

    def _pads(self) -> bool:
        blend = self.blend_value()
        return self.selection.pad_candidates or not (isinstance(blend, float) and blend == 1)

    def is_fused(self, geometry: Geometry) -> bool:
        """Return whether fused attention computes this layer: if all candidates are neighbours and order is lost."""
        return self.fast and attends_to_all(geometry, self.selection, self.mixing, pads=self._pads())

    def _heads(self, x: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values per head: (B, N, C) -> three (B, H, N, D), the latter two with the ring."""
        b, n, _ = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if any(geometry.padding):
            k, v = (add_ring(t, geometry) for t in (k, v))
        return q, k, v

    def neighborhood(self, x: Tensor, *, blend: float | None = None) -> Neighborhood:
        """Return what the layer chooses in a sequence (B, N, C), at its own blend or another."""
        geometry = self.layout_of(x.shape[1]) if blend is None else self.geometry(x.shape[1])
        q, k, _ = self._heads(x, geometry)
        seen = geometry
        if not any(geometry.padding) and geometry.height == 1:  # laid out on a line, as far as the selection cares
            try:
                size = grid_of(x.shape[1], self.num_prefix_tokens, self.grid_size, self.token_grid)
                step = self.settings.token_dilation if self.layout == "grid" else 1
                seen = Geometry(*size, prefix=self.num_prefix_tokens, dilation=(step, step))
            except ValueError:
                pass
        found = find_neighborhood(
            q,
            k,
            geometry,
            self.selection,
            self.mixing,
            blend=self.blend_value() if blend is None else float(blend),
            training=self.training,
            seen=seen,
        )
        limit = self.k_max
        if found.index.shape[-1] < self.k:  # clamped: a window of the neighbours there are
            limit = min(limit, int(found.on_grid.sum(-1).amax()))
        side = 2 * (math.isqrt(limit) // 2) + 1
        return replace(found, window=(side, side))

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, return_neighbors: bool = False
    ) -> Any:
        """(B, N, C) -> (B, N, dim_out), with ``return_neighbors`` a Neighborhood too. A mask is refused."""
        refuse_mask(attn_mask, is_causal)
        if return_neighbors:
            return self.with_neighbors(x)
        b, n, _ = x.shape
        geometry = self.layout_of(n)
        q, k, v = self._heads(x, geometry)
        weights = self.settings.dropout_on == "weights"
        drop = self.attn_drop.p if self.training and weights else 0.0
        if self.is_fused(geometry):
            pads, temperature = self._pads(), self.temperature
            y = attend(q, k, v, geometry, self.selection, pads=pads, temperature=temperature, dropout=drop)
        else:
            y = neighbor_aggregate(
                q,
                k,
                v,
                geometry,
                self.selection,
                self.mixing,
                blend=self.blend_value(),
                weight=self.slot_weight,
                dropout=drop,
                training=self.training,
            )
        if self.pointwise is not None:
            y = self.pointwise(y)
        if not weights:
            y = self.attn_drop(y)
        y = y.transpose(1, 2).reshape(b, n, self.num_heads * self.head_dim)
        return self.proj_drop(self.proj(y))

    def extra_repr(self) -> str:
        """State the configuration in one line."""
        parts = [f"{self.dim}, num_heads={self.num_heads}", self._spectrum_repr()]
        if self.num_prefix_tokens:
            parts.append(f"num_prefix_tokens={self.num_prefix_tokens}")
        if self.grid_size:
            parts.append(f"grid_size={self.grid_size}")
        return ", ".join(parts)

    @torch.no_grad()
    def to_layer(self) -> Attention:
        """Return timm's attention that this layer equals on sequences of its ``grid_size``.

        Raises:
            ValueError: if it equals none: fewer neighbours than tokens, or weights that attention has not.
        """
        s = self.selection
        plain = self.mixing.weighting == "softmax" and s.similarity == "dot" and self.border == "nearest"
        plain = plain and self.mixing.self_score is None and s.self_again is None
        plain = plain and not s.causal and s.rank_step == 1
        scaled = self.temperature == 1 or isinstance(self.q_norm, nn.Identity)
        if not plain or s.candidates != "all" or self.aggregation in ("conv", "separable") or not scaled:
            raise ValueError(f"it is no self-attention: {self._spectrum_repr()}")
        if self.num_heads * self.head_dim != self.dim:
            raise ValueError(f"its heads have {self.head_dim} channels each, not {self.dim} / {self.num_heads}")
        tokens = self.num_prefix_tokens + math.prod(self.grid_size or (0, 0))
        if self.grid_size is None:
            raise ValueError("without grid_size it is not known how many tokens there are")
        if self.k < tokens:
            raise ValueError(f"k={self.k} is less than the {tokens} tokens")
        used = None if self.slot_weight is None else self.slot_weight[:, : min(self.k, tokens)]
        if used is not None and bool((used != 1).any()):
            raise ValueError("its slot weights are no longer ones")
        layer = Attention(
            self.dim,
            self.num_heads,
            dim_out=self.proj.out_features,
            qkv_bias=self.qkv.bias is not None,
            proj_bias=self.proj.bias is not None,
            attn_drop=self.attn_drop.p,
            proj_drop=self.proj_drop.p,
        )
        layer.q_norm, layer.k_norm = copy.deepcopy(self.q_norm), copy.deepcopy(self.k_norm)
        layer.to(self.qkv.weight.device, self.qkv.weight.dtype)
        for own, new in ((self.qkv, layer.qkv), (self.proj, layer.proj)):
            new.load_state_dict(own.state_dict())
        layer.qkv.weight[: self.dim] /= self.temperature
        if layer.qkv.bias is not None:
            layer.qkv.bias[: self.dim] /= self.temperature
        return layer.train(self.training)

    @classmethod
    def from_layer(
        cls, layer: Attention, config: OperatorConfig, init: str, site: Site, dim_out: int | None = None
    ) -> ConvNNAttention:
        """Build the replacement of timm's attention; ``dim_out`` takes only its first output channels.

        ``transfer`` copies the projections and lets the aggregation start as the sum: with k = N the function stays.

        Raises:
            ConfigError: for an attention module with parts that this one lacks.
        """
        check_attention(layer, site)
        proj_bias = layer.proj.bias is not None if config.bias is None else config.bias
        if init == "transfer" and layer.proj.bias is not None and not proj_bias:
            raise ConfigError(f"swap.init=transfer: '{site.name}' has a bias; leave operator.bias at null")
        own = layer.attn_dim // layer.num_heads
        if init == "transfer" and config.head_dim not in (None, own):
            raise ConfigError(f"swap.init=transfer: '{site.name}' has {own} channels per head; leave operator.head_dim")
        new = cls(
            layer.attn_dim,
            layer.num_heads,
            config.k,  # type: ignore[arg-type]  # "kernel" is refused for attention
            config.blend,
            dim_out=dim_out or layer.proj.out_features,
            qkv_bias=layer.qkv.bias is not None,
            proj_bias=proj_bias,
            attn_drop=layer.attn_drop.p,
            proj_drop=layer.proj_drop.p,
            num_prefix_tokens=site.num_prefix_tokens,
            grid_size=site.grid_size,
            **layer_settings(config),
        )
        new.q_norm, new.k_norm = copy_norm(layer.q_norm, init), copy_norm(layer.k_norm, init)
        new.token_grid = site.token_grid
        new.to(layer.qkv.weight.device, layer.qkv.weight.dtype)  # before anything is copied, which would be rounded
        new.reset_slots(preserve=init == "transfer")
        init_linear(new.qkv, layer.qkv, init)
        init_linear(new.proj, layer.proj, init)
        return new


def add_ring(x: Tensor, geometry: Geometry) -> Tensor:
    """Surround the grid with zero tokens: (B, H, prefix + h * w, D) -> (B, H, N, D)."""
    (ph, pw), prefix = geometry.padding, geometry.prefix
    grid = x[:, :, prefix:].unflatten(2, (geometry.height, geometry.width))
    return torch.cat([x[:, :, :prefix], F.pad(grid, (0, 0, pw, pw, ph, ph)).flatten(2, 3)], dim=2)


def check_attention(layer: nn.Module, site: Site) -> None:
    """Raise ConfigError for a module that ConvNNAttention cannot stand in for, with the reason."""
    if not isinstance(layer, Attention):
        raise ConfigError(
            f"'{site.name}' is a {type(layer).__name__}, not timm's Attention; choose operator.kind to fit"
        )
    if layer.attn_dim != layer.qkv.in_features:
        raise ConfigError(f"'{site.name}' has a width of its own ({layer.attn_dim}); it cannot be replaced")
    if layer.gate is not None or not isinstance(layer.norm, nn.Identity):
        raise ConfigError(
            f"'{site.name}' has a gate or output norm, which ConvNNAttention lacks; exclude it (swap.exclude)"
        )


def copy_norm(norm: nn.Module, init: str) -> nn.Module:
    """Return a copy of a normalisation layer, reset for ``fresh``."""
    norm = copy.deepcopy(norm)
    reset = getattr(norm, "reset_parameters", None)
    if init == "fresh" and callable(reset):
        reset()
    return norm


@torch.no_grad()
def init_linear(new: nn.Linear, old: nn.Linear, init: str, first: int = 0) -> None:
    """Copy a projection's rows from ``first`` on, or draw them as timm's ViT does."""
    if init == "transfer":
        rows = slice(first, first + new.out_features)
        new.weight.copy_(old.weight[rows])
        if new.bias is not None:
            new.bias.copy_(old.bias[rows])
        return
    nn.init.trunc_normal_(new.weight, std=0.02)
    if new.bias is not None:
        nn.init.zeros_(new.bias)
