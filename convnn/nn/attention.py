"""The drop-in for timm's ``Attention``: parameters and signature around ``functional``.

Shapes: B batch, H heads, N tokens, K neighbours, C channels, D channels per head.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from timm.layers.attention import Attention
from torch import Tensor, nn

from convnn.config.schema import OperatorConfig
from convnn.errors import ConfigError
from convnn.nn.adapters.layer import AdaptedAttention
from convnn.nn.adapters.registry import adapter_of
from convnn.nn.adapters.timm_attention import beyond_plain
from convnn.nn.base import Site, layer_settings
from convnn.nn.neighbor_attention import Heads, NeighborAttention
from convnn.ops.geometry import Pair
from convnn.ops.neighborhood import Neighborhood

__all__ = ["Attention", "ConvNNAttention"]


def refuse_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    """Raise ValueError for the masks that timm's blocks may pass."""
    if attn_mask is not None or is_causal:
        raise ValueError("attn_mask and is_causal are not supported: neighbours are chosen among all tokens")


DEFAULTS = {"similarity": "dot", "self_first": False, "weighting": "softmax", "aggregation": "depthwise"}
"""What makes the settings those of the paper's attention layer."""


class ConvNNAttention(NeighborAttention):
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
        self._init_attention(num_heads, DEFAULTS | {"k": k, "blend": blend} | settings)
        head_dim = self.settings.head_dim
        if head_dim is None and dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide dim={dim}")
        self.dim = dim
        self.num_prefix_tokens, self.grid_size, self.fast = num_prefix_tokens, grid_size, fast

        d = head_dim or dim // num_heads
        self.qkv = nn.Linear(dim, 3 * num_heads * d, bias=qkv_bias)
        self.q_norm = norm_layer(d) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(d) if qk_norm else nn.Identity()
        self._init_slots(d, attn_drop)
        self.proj = nn.Linear(num_heads * d, dim_out or dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_slots()

    def _heads(self, x: Tensor) -> Heads:
        b, n, _ = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return Heads(self.q_norm(q), self.k_norm(k), v)

    def neighborhood(self, x: Tensor, *, blend: float | None = None) -> Neighborhood:
        """Return what the layer chooses in a sequence (B, N, C), at its own blend or another."""
        return self._choose(self._heads(x), blend)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, return_neighbors: bool = False
    ) -> Any:
        """(B, N, C) -> (B, N, dim_out), with ``return_neighbors`` a Neighborhood too. A mask is refused."""
        refuse_mask(attn_mask, is_causal)
        if return_neighbors:
            return self.with_neighbors(x)
        b, n, _ = x.shape
        y = self._aggregate(self._heads(x), self.layout_of(n))
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
        if self.temperature != 1 and not isinstance(self.q_norm, nn.Identity):
            raise ValueError(f"it is no self-attention: {self._spectrum_repr()}")
        if self.num_heads * self.head_dim != self.dim:
            raise ValueError(f"its heads have {self.head_dim} channels each, not {self.dim} / {self.num_heads}")
        size = self.grid_size
        reason = self._lacks_plain(None if size is None else self.num_prefix_tokens + math.prod(size))
        if reason:
            raise ValueError(reason)
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
        cls, layer: nn.Module, config: OperatorConfig, init: str, site: Site, dim_out: int | None = None
    ) -> Any:
        """Build the replacement of an attention layer; ``dim_out`` takes only its first output channels.

        ``transfer`` copies the projections and lets the aggregation start as the sum: with k = N the function stays.
        What is not timm's plain ``Attention`` is read through an adapter (``convnn.nn.adapters``).

        Raises:
            ConfigError: for an attention module with parts that this one lacks.
        """
        adapter = adapter_of(layer)
        if cls is ConvNNAttention and dim_out is None and adapter is not None and adapter.attention(layer) is None:
            return AdaptedAttention.from_layer(layer, config, init, site)
        check_attention(layer, site)
        assert isinstance(layer, Attention)
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


def check_attention(layer: nn.Module, site: Site) -> None:
    """Raise ConfigError for a module that is not timm's plain ``Attention``, with the reason."""
    if not isinstance(layer, Attention):
        raise ConfigError(
            f"'{site.name}' is a {type(layer).__name__}, not timm's Attention; choose operator.kind to fit"
        )
    reason = beyond_plain(layer)
    if reason:
        raise ConfigError(f"'{site.name}' {reason}, which this operator lacks; exclude it (swap.exclude)")


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
