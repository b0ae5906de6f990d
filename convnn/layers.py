"""Drop-in modules: parameters and signatures of ``nn.Conv2d`` and timm's ``Attention`` around ``functional``.

Shapes: B batch, H heads, N tokens, K neighbours, C input and O output channels, D channels per head.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from torch import Tensor, nn

from convnn.config import ConfigError, OperatorConfig
from convnn.functional import (
    attend,
    convolve,
    is_attention,
    is_convolution,
    kernel_to_slots,
    neighbor_aggregate,
    slots_to_kernel,
)
from convnn.geometry import Geometry, Pair
from convnn.selection import Selection

__all__ = ["Attention", "ConvNN2d", "ConvNNAttention", "NeighborLayer", "Site"]


@dataclass(frozen=True)
class Site:
    """What a layer's surroundings tell about it: its name, and for attention the tokens' layout."""

    name: str = ""
    num_prefix_tokens: int = 0
    grid_size: Pair | None = None


class NeighborLayer(nn.Module):
    """A layer on the spectrum. Blend, k and temperature are plain attributes and may change at any time."""

    k_max: int
    """Neighbours that the layer has weights for."""
    k: int
    """Neighbours in use, at most ``k_max``."""
    blend: float
    temperature: float
    selection: Selection
    weighting: str

    def set_spectrum(
        self, *, blend: float | None = None, k: int | None = None, temperature: float | None = None
    ) -> None:
        """Move the layer along the spectrum. No parameter or buffer changes.

        Raises:
            ValueError: when a value is out of range.
        """
        if blend is not None:
            if not 0 <= blend <= 1:
                raise ValueError(f"blend={blend} must lie in [0, 1]")
            self.blend = float(blend)
        if k is not None:
            if not 1 <= k <= self.k_max:
                raise ValueError(f"k={k} must lie in [1, {self.k_max}]: the layer was built with k={self.k_max}")
            if k != self.k_max and self.selection.slots == "raster":
                raise ValueError(f"k={k}: a layer with slots=raster keeps its k={self.k_max}")
            self.k = int(k)
        if temperature is not None:
            if not temperature > 0:
                raise ValueError(f"temperature={temperature} must be positive")
            self.temperature = float(temperature)

    def spectrum(self) -> dict[str, float]:
        """Return where the layer is: blend, k and temperature."""
        return {"blend": self.blend, "k": self.k, "temperature": self.temperature}

    def _init_spectrum(self, k: int, blend: float, temperature: float, weighting: str, selection: dict) -> None:
        self.selection = Selection(**selection)
        for key, value, known in (
            ("similarity", self.selection.similarity, ("cosine", "euclidean", "dot")),
            ("distance", self.selection.distance, ("chebyshev", "euclidean")),
            ("candidates", self.selection.candidates, ("all", "random", "grid")),
            ("eval_candidates", self.selection.eval_candidates, ("same", "all", "resample")),
            ("slots", self.selection.slots, ("rank", "raster", "window")),
            ("k_policy", self.selection.k_policy, ("error", "clamp")),
            ("weighting", weighting, ("ones", "softmax")),
        ):
            if value not in known:
                raise ValueError(f"{key}={value!r} is not one of {', '.join(known)}")
        if k < 1:
            raise ValueError(f"k={k} must be at least 1")
        self.k_max = k
        self.weighting = weighting
        self.set_spectrum(k=k, blend=blend, temperature=temperature)

    def _spectrum_repr(self) -> str:
        parts = [f"k={self.k}" if self.k == self.k_max else f"k={self.k} of {self.k_max}", f"blend={self.blend:g}"]
        for f in fields(Selection):
            value = getattr(self.selection, f.name)
            if value != f.default:
                parts.append(f"{f.name}={value}")
        if self.weighting != "ones":
            parts.append(f"weighting={self.weighting}, temperature={self.temperature:g}")
        return ", ".join(parts)


def selection_settings(config: OperatorConfig) -> dict[str, Any]:
    """Return the operator settings that concern selection, as keyword arguments of the layers."""
    values = asdict(config)
    return {f.name: values[f.name] for f in fields(Selection)}


def pair(value: int | tuple[int, ...]) -> Pair:
    """Return (rows, columns) of a number or pair."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


class ConvNN2d(NeighborLayer):
    """Convolutional nearest neighbours on a feature map, a drop-in for ``nn.Conv2d`` (arXiv 2511.14137).

    Each output pixel gathers k tokens of the zero-padded map, chosen by position (``blend`` 0), by features (1)
    or by both, and mixes them with one weight matrix per slot. At blend 0 with k = kernel area it is exactly
    ``nn.Conv2d``; ``from_layer(..., init="transfer")`` and ``to_conv`` move the weights across.

    Args:
        in_channels: C.
        out_channels: O.
        k: neighbours per output pixel.
        stride: step between output pixels, in input pixels.
        padding: width of the zero ring, whose pixels are tokens too.
        blend: 0 (position) to 1 (features).
        kernel_size: window that places the output pixels and that blend 0 stands for; odd. Default: 2 padding + 1.
        dilation: of that window.
        groups: of the mixing weights.
        bias: add one.
        weighting: ``ones`` or ``softmax`` of the feature similarity.
        temperature: of the softmax.
        fast: let ``F.conv2d`` compute the position end.
        **selection: fields of ``convnn.selection.Selection``.

    Shape:
        (B, C, h, w) -> (B, O, h', w') with h', w' as for ``nn.Conv2d`` with this kernel, stride and padding.

    Raises:
        ValueError: for an even kernel, and in the forward pass if k exceeds the candidates.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        k: int = 9,
        stride: int | Pair = 1,
        padding: int | Pair = 1,
        blend: float = 1.0,
        *,
        kernel_size: int | Pair | None = None,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = True,
        weighting: str = "ones",
        temperature: float = 1.0,
        fast: bool = True,
        **selection: Any,
    ) -> None:
        super().__init__()
        self.stride, self.padding, self.dilation = pair(stride), pair(padding), pair(dilation)
        if kernel_size is None:
            kernel_size = (2 * self.padding[0] + 1, 2 * self.padding[1] + 1)
        self.kernel_size = pair(kernel_size)
        if any(m % 2 == 0 for m in self.kernel_size):
            raise ValueError(f"kernel_size={self.kernel_size} must be odd: an even window has no centre token")
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"groups={groups} must divide in_channels={in_channels}, out_channels={out_channels}")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.fast = fast
        self._init_spectrum(k, blend, temperature, weighting, selection)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, k))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights as ``nn.Conv1d`` would with a kernel of k."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def geometry(self, height: int, width: int) -> Geometry:
        """Return where tokens and queries lie on a map of this size."""
        return Geometry(height, width, self.kernel_size, self.stride, self.padding, self.dilation)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, O, h', w')."""
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"expected (batch, {self.in_channels}, height, width), got {tuple(x.shape)}")
        geometry = self.geometry(x.shape[2], x.shape[3])
        if min(geometry.out_shape) < 1:
            raise ValueError(f"a {x.shape[2]}x{x.shape[3]} map is smaller than the window {self.kernel_size}")
        if self.fast and is_convolution(
            geometry, self.selection, num=self.k, blend=self.blend, weighting=self.weighting
        ):
            return convolve(x, geometry, self.selection, self.weight, self.bias, self.groups)
        (ph, pw), out = self.padding, geometry.out_shape
        tokens = F.pad(x, (pw, pw, ph, ph)).flatten(2).transpose(1, 2).unsqueeze(1).contiguous()  # (B, 1, N, C)
        y = neighbor_aggregate(
            tokens[:, :, geometry.query_index(x.device)],
            tokens,
            tokens,
            geometry,
            self.selection,
            num=self.k,
            blend=self.blend,
            weighting=self.weighting,
            temperature=self.temperature,
            aggregation="conv",
            weight=self.weight,
            bias=self.bias,
            groups=self.groups,
            training=self.training,
        )
        return y.squeeze(1).transpose(1, 2).unflatten(2, out)

    def extra_repr(self) -> str:
        """State the configuration in one line."""
        parts = [f"{self.in_channels}, {self.out_channels}", self._spectrum_repr()]
        parts.append(f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}")
        if self.dilation != (1, 1):
            parts.append(f"dilation={self.dilation}")
        if self.groups != 1:
            parts.append(f"groups={self.groups}")
        if self.bias is None:
            parts.append("bias=False")
        return ", ".join(parts)

    @torch.no_grad()
    def load_conv(self, kernel: Tensor, bias: Tensor | None) -> None:
        """Take over a convolution kernel (O, C / groups, kh, kw); slots beyond the window become zero."""
        slots = kernel_to_slots(kernel, self.selection.slots)
        self.weight.zero_()
        self.weight[..., : slots.shape[-1]] = slots
        if self.bias is not None:
            self.bias.copy_(bias if bias is not None else torch.zeros_like(self.bias))

    @torch.no_grad()
    def to_conv(self) -> nn.Conv2d:
        """Return the convolution that this layer equals at blend 0.

        Raises:
            ValueError: if k is not the kernel's area.
        """
        if self.k_max != math.prod(self.kernel_size):
            raise ValueError(f"k={self.k_max} is not the area of the window {self.kernel_size}")
        args = (self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation)
        conv = nn.Conv2d(*args, self.groups, self.bias is not None)
        conv.to(self.weight.device, self.weight.dtype)
        conv.weight.copy_(slots_to_kernel(self.weight, self.kernel_size, self.selection.slots))
        if self.bias is not None and conv.bias is not None:
            conv.bias.copy_(self.bias)
        return conv

    @classmethod
    def from_layer(
        cls, layer: nn.Conv2d, config: OperatorConfig, init: str, site: Site, out_channels: int | None = None
    ) -> ConvNN2d:
        """Build the replacement of a convolution; ``out_channels`` takes only its first ones.

        Raises:
            ConfigError: for an even kernel, a padding other than zeros or numbers, or a k too small to transfer.
        """
        padding = check_conv(layer, site)
        out = layer.out_channels if out_channels is None else out_channels
        new = cls(
            layer.in_channels,
            out,
            config.k,
            pair(layer.stride),
            padding,
            config.blend,
            kernel_size=pair(layer.kernel_size),
            dilation=pair(layer.dilation),
            groups=layer.groups,
            bias=layer.bias is not None,
            weighting=config.weighting,
            temperature=config.temperature,
            **selection_settings(config),
        )
        if init == "transfer":
            area = math.prod(layer.kernel_size)
            if config.k < area or (config.slots == "raster" and config.k != area):
                need = f"= {area}" if config.slots == "raster" else f">= {area}"
                raise ConfigError(
                    f"swap.init=transfer: '{site.name}' has a {layer.kernel_size[0]}x{layer.kernel_size[1]} kernel "
                    f"and needs operator.k {need}, not {config.k}"
                )
            new.load_conv(layer.weight[:out], None if layer.bias is None else layer.bias[:out])
        return new.to(layer.weight.device, layer.weight.dtype)


def check_conv(layer: nn.Conv2d, site: Site) -> Pair:
    """Return the padding of a convolution that ConvNN2d can stand in for, else raise ConfigError with the reason."""
    if not isinstance(layer, nn.Conv2d):
        raise ConfigError(f"'{site.name}' is a {type(layer).__name__}, not a convolution; choose operator.kind to fit")
    size = "x".join(map(str, layer.kernel_size))
    if any(m % 2 == 0 for m in layer.kernel_size):
        raise ConfigError(
            f"'{site.name}' has an even {size} kernel, which has no centre token; exclude it (swap.exclude)"
        )
    if layer.padding_mode != "zeros":
        raise ConfigError(f"'{site.name}' pads with padding_mode={layer.padding_mode}; only zeros can be replaced")
    if type(layer).forward is not nn.Conv2d.forward:
        raise ConfigError(
            f"'{site.name}' is a {type(layer).__name__} with a forward pass of its own; exclude it (swap.exclude)"
        )
    if isinstance(layer.padding, str):
        if layer.padding == "valid":
            return (0, 0)
        dilation, kernel = pair(layer.dilation), pair(layer.kernel_size)
        return (dilation[0] * (kernel[0] // 2), dilation[1] * (kernel[1] // 2))
    return pair(layer.padding)


def refuse_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    """Raise ValueError for the masks that timm's blocks may pass."""
    if attn_mask is not None or is_causal:
        raise ValueError("attn_mask and is_causal are not supported: neighbours are chosen among all tokens")


class ConvNNAttention(NeighborLayer):
    """Self-attention over the k nearest tokens, a drop-in for timm's ``Attention`` (arXiv 2511.14137).

    Keeps timm's parameter names. With ``aggregation="depthwise"`` each neighbour rank has a weight per channel,
    shared by the heads and initialised to ones; with ``sum`` and k = N it is exactly self-attention. Blends below 1
    select by position on ``grid_size``; prefix tokens (CLS) have no position, see ``select_neighbors``.

    Args:
        dim: C.
        num_heads: H; must divide dim.
        k: neighbours per token.
        blend: 0 (position) to 1 (features).
        dim_out: output channels; default dim.
        qkv_bias: bias of the query, key and value projections.
        qk_norm: apply ``norm_layer`` to queries and keys per head.
        proj_bias: bias of the output projection.
        attn_drop: dropout of the softmax weights.
        proj_drop: dropout of the output.
        norm_layer: for ``qk_norm``.
        aggregation: ``depthwise`` or ``sum``.
        weighting: ``softmax`` or ``ones``.
        temperature: of the softmax, on top of the 1/sqrt(D) of ``similarity="dot"``.
        num_prefix_tokens: tokens before the grid.
        grid_size: rows and columns of the grid; default: square.
        fast: let fused attention compute k = N.
        **selection: fields of ``convnn.selection.Selection``.

    Shape:
        (B, N, C) -> (B, N, dim_out).

    Raises:
        ValueError: for a mask, and if k exceeds the candidates or the tokens form no grid.
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
        aggregation: str = "depthwise",
        weighting: str = "softmax",
        temperature: float = 1.0,
        num_prefix_tokens: int = 0,
        grid_size: Pair | None = None,
        fast: bool = True,
        **selection: Any,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide dim={dim}")
        if aggregation not in ("depthwise", "sum"):
            raise ValueError(f"aggregation={aggregation!r} is not one of depthwise, sum")
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.aggregation, self.fast = aggregation, fast
        self.num_prefix_tokens, self.grid_size = num_prefix_tokens, grid_size
        self._init_spectrum(k, blend, temperature, weighting, {"similarity": "dot", "self_first": False} | selection)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.slot_weight = nn.Parameter(torch.ones(self.head_dim, k)) if aggregation == "depthwise" else None
        self.proj = nn.Linear(dim, dim_out or dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def geometry(self, num_tokens: int) -> Geometry:
        """Return the grid of a sequence of this length.

        Raises:
            ValueError: if the tokens after the prefix are neither ``grid_size`` nor a square.
        """
        grid = num_tokens - self.num_prefix_tokens
        height, width = self.grid_size or (0, 0)
        if height * width != grid:
            height = width = math.isqrt(max(grid, 0))
        if height * width != grid or grid < 1:
            raise ValueError(
                f"{num_tokens} tokens less {self.num_prefix_tokens} prefix tokens are neither "
                f"grid_size={self.grid_size} nor a square; pass grid_size and num_prefix_tokens"
            )
        return Geometry(height, width, prefix=self.num_prefix_tokens)

    def _layout(self, num_tokens: int) -> Geometry:
        # Without positions or a grid of candidates a plain sequence of any length will do.
        if self.blend == 1 and self.selection.candidates != "grid" and self.grid_size is None:
            return Geometry(1, num_tokens - self.num_prefix_tokens, prefix=self.num_prefix_tokens)
        return self.geometry(num_tokens)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, C) -> (B, N, dim_out). A mask is refused rather than ignored."""
        refuse_mask(attn_mask, is_causal)
        b, n, c = x.shape
        qkv = self.qkv(x).view(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # (B, H, N, D)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fast and is_attention(
            self.selection, num=self.k, num_tokens=n, weighting=self.weighting, aggregation=self.aggregation
        ):
            drop = self.attn_drop.p if self.training else 0.0
            y = attend(q, k, v, self.selection.similarity, self.temperature, drop)
        else:
            y = neighbor_aggregate(
                q,
                k,
                v,
                self._layout(n),
                self.selection,
                num=self.k,
                blend=self.blend,
                weighting=self.weighting,
                temperature=self.temperature,
                dropout=self.attn_drop.p,
                aggregation=self.aggregation,
                weight=self.slot_weight,
                training=self.training,
            )
        y = y.transpose(1, 2).reshape(b, n, c)
        return self.proj_drop(self.proj(y))

    def extra_repr(self) -> str:
        """State the configuration in one line."""
        parts = [f"{self.dim}, num_heads={self.num_heads}", self._spectrum_repr(), f"aggregation={self.aggregation}"]
        if self.num_prefix_tokens:
            parts.append(f"num_prefix_tokens={self.num_prefix_tokens}")
        if self.grid_size:
            parts.append(f"grid_size={self.grid_size}")
        return ", ".join(parts)

    @classmethod
    def from_layer(
        cls, layer: Attention, config: OperatorConfig, init: str, site: Site, dim_out: int | None = None
    ) -> ConvNNAttention:
        """Build the replacement of timm's attention; ``dim_out`` takes only its first output channels.

        Raises:
            ConfigError: for an attention module with parts that this one lacks.
        """
        check_attention(layer, site)
        has_norm = not isinstance(layer.q_norm, nn.Identity)
        new = cls(
            layer.attn_dim,
            layer.num_heads,
            config.k,
            config.blend,
            dim_out=dim_out or layer.proj.out_features,
            qkv_bias=layer.qkv.bias is not None,
            qk_norm=False,
            proj_bias=layer.proj.bias is not None,
            attn_drop=layer.attn_drop.p,
            proj_drop=layer.proj_drop.p,
            aggregation=config.aggregation,
            weighting=config.weighting,
            temperature=config.temperature,
            num_prefix_tokens=site.num_prefix_tokens,
            grid_size=site.grid_size,
            **selection_settings(config),
        )
        if has_norm:
            new.q_norm, new.k_norm = copy_norm(layer.q_norm, init), copy_norm(layer.k_norm, init)
        with torch.no_grad():
            init_linear(new.qkv, layer.qkv, init)
            init_linear(new.proj, layer.proj, init)
        return new.to(layer.qkv.weight.device, layer.qkv.weight.dtype)


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
