"""Layers of other papers between convolution and attention, for comparison in the same harness.

The vision-graph layer is ``ConvNN2d`` with ``aggregation="max_relative"``; these two have parameters of their own.
Shapes: B batch, H heads, Q queries, N tokens, C channels, D channels per head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnn.attention import Attention, add_ring, check_attention, grid_of, refuse_mask
from convnn.base import Site, pair
from convnn.config import ConfigError, OperatorConfig
from convnn.functional import attend
from convnn.geometry import Geometry, Pair
from convnn.layers import check_conv
from convnn.neighborhood import Neighborhood, find_neighborhood
from convnn.selection import Selection


def options(config: OperatorConfig, **defaults: Any) -> dict[str, Any]:
    """Return ``operator.options`` over the defaults, whose types they must have.

    Raises:
        ConfigError: for an option that the operator lacks, or that is no positive number.
    """
    unknown = sorted(set(config.options) - set(defaults))
    if unknown:
        raise ConfigError(f"operator.options.{unknown[0]}: {config.name} has the options {', '.join(defaults)}")
    values = defaults | config.options
    for name, value in values.items():
        kind = type(defaults[name])
        number = isinstance(value, (kind, int)) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            need = "integer" if kind is int else "number"
            raise ConfigError(f"operator.options.{name}={value} must be a positive {need}")
    return values


def refuse_transfer(init: str, site: Site, config: OperatorConfig) -> None:
    """Raise ConfigError for ``swap.init=transfer``, which a peer does not define."""
    if init == "transfer":
        raise ConfigError(f"swap.init=transfer: '{site.name}' has no counterpart in operator={config.name}; use fresh")


class GatedPositionalAttention(nn.Module):
    """ConViT's gated positional self-attention (arXiv 2103.10697, equation 7), a drop-in for timm's ``Attention``.

    Each head mixes a softmax over content with a softmax over relative positions by a learned gate. At the start every
    head attends to one offset of a window, as a convolution. Prefix tokens have no position: they attend, and are
    attended to, by content alone, so that a query on the grid gives them ``1 - gate`` of their content weight.

    Args:
        dim: C.
        num_heads: H; must divide C. Convolutional starts want a square number.
        qkv_bias: bias of queries, keys and values.
        proj_bias: bias of the output projection.
        attn_drop: dropout of the attention weights.
        proj_drop: dropout of the output.
        locality_strength: how sharply the positional softmax starts.
        num_prefix_tokens: tokens before the grid.
        grid_size: rows and columns of the grid; default: square.

    Shape:
        (B, N, C) -> (B, N, C).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        locality_strength: float = 1.0,
        num_prefix_tokens: int = 0,
        grid_size: Pair | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide dim={dim}")
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.num_prefix_tokens, self.grid_size = num_prefix_tokens, grid_size
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.pos_proj = nn.Linear(3, num_heads)
        self.gating = nn.Parameter(torch.ones(num_heads))
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)
        self.local_init(locality_strength)

    @torch.no_grad()
    def local_init(self, strength: float) -> None:
        """Make the positional softmax of head h peak at the h-th offset of a window; values pass unchanged."""
        nn.init.eye_(self.qkv.weight[2 * self.dim :])
        side = math.isqrt(self.num_heads)
        for head in range(self.num_heads):
            row, col = head // side - (side - 1) / 2, head % side - (side - 1) / 2
            self.pos_proj.weight[head] = strength * torch.tensor([2 * col, 2 * row, -1.0])
        self.pos_proj.bias.zero_()

    def relative_positions(self, height: int, width: int) -> Tensor:
        """Return (column offset, row offset, squared distance) of every pair of grid tokens: (h * w, h * w, 3)."""
        device = self.qkv.weight.device
        rows = torch.arange(height, device=device).repeat_interleave(width)
        cols = torch.arange(width, device=device).repeat(height)
        dy, dx = (t[None, :] - t[:, None] for t in (rows, cols))
        return torch.stack([dx, dy, dx**2 + dy**2], dim=-1).to(self.pos_proj.weight.dtype)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, N, C) -> (B, N, C). A mask is refused rather than ignored."""
        refuse_mask(attn_mask, is_causal)
        weights, v = self._weights(x)
        y = self.attn_drop(weights) @ v
        return self.proj_drop(self.proj(y.transpose(1, 2).reshape(x.shape)))

    def _weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return attention weights (B, H, N, N) and values (B, H, N, D)."""
        b, n, _ = x.shape
        p = self.num_prefix_tokens
        height, width = grid_of(n, p, self.grid_size)
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)  # (B, H, N, D)
        content = (q @ k.mT / math.sqrt(self.head_dim)).softmax(dim=-1)
        position = self.pos_proj(self.relative_positions(height, width)).permute(2, 0, 1).softmax(dim=-1)  # (H, ...)
        position = F.pad(position, (p, 0, p, 0))
        gate = self.gating.sigmoid()[:, None, None] * (torch.arange(n, device=x.device) >= p)[:, None]  # (H, N, 1)
        return (1 - gate) * content + gate * position, v

    @torch.no_grad()
    def neighborhood(self, x: Tensor) -> Neighborhood:
        """Return all tokens as neighbours, largest weight first; the window is that of the convolutional start."""
        weights, index = self._weights(x)[0].sort(dim=-1, descending=True, stable=True)
        grid = grid_of(x.shape[1], self.num_prefix_tokens, self.grid_size)
        geometry = Geometry(*grid, prefix=self.num_prefix_tokens)
        side = math.isqrt(self.num_heads)
        return Neighborhood(index, torch.ones_like(index, dtype=torch.bool), weights, geometry, (side, side))

    @classmethod
    def from_layer(cls, layer: Attention, config: OperatorConfig, init: str, site: Site) -> GatedPositionalAttention:
        """Build the replacement of timm's attention; ``operator.options.locality_strength`` defaults to 1."""
        check_attention(layer, site)
        refuse_transfer(init, site, config)
        if not isinstance(layer.q_norm, nn.Identity) or layer.proj.out_features != layer.attn_dim:
            raise ConfigError(
                f"'{site.name}' normalises its queries or changes its width, which operator={config.name} lacks; "
                "exclude it (swap.exclude)"
            )
        new = cls(
            layer.attn_dim,
            layer.num_heads,
            qkv_bias=layer.qkv.bias is not None,
            proj_bias=layer.proj.bias is not None if config.bias is None else config.bias,
            attn_drop=layer.attn_drop.p,
            proj_drop=layer.proj_drop.p,
            locality_strength=options(config, locality_strength=1.0)["locality_strength"],
            num_prefix_tokens=site.num_prefix_tokens,
            grid_size=site.grid_size,
        )
        return new.to(layer.qkv.weight.device, layer.qkv.weight.dtype)


class ACmix2d(nn.Module):
    """ACmix (arXiv 2111.14556): convolution and window attention over shared 1x1 projections, a drop-in for Conv2d.

    Stage 1 projects to queries, keys and values. Stage 2 turns them into a k x k convolution (each tap a learned mix
    of the 3 H projected maps, shifted and added up) and into attention over a window, and adds both with learned
    weights that start at one half: ``alpha * attention + beta * convolution``. Both see the map zero-padded; padding
    is no candidate of the attention.

    Args:
        in_channels: C.
        out_channels: O; a multiple of ``heads``.
        kernel_size: side of the convolution, odd.
        stride: of both paths.
        padding: of the convolution.
        bias: add one to the convolution.
        heads: H.
        window: side of the attention window, odd.

    Shape:
        (B, C, h, w) -> (B, O, h', w') as ``nn.Conv2d``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair = 3,
        stride: int | Pair = 1,
        padding: int | Pair = 1,
        *,
        bias: bool = True,
        heads: int = 4,
        window: int = 7,
    ) -> None:
        super().__init__()
        if out_channels % heads:
            raise ValueError(f"heads={heads} must divide out_channels={out_channels}")
        if window % 2 == 0:
            raise ValueError(f"window={window} must be odd")
        self.in_channels, self.out_channels, self.heads, self.window = in_channels, out_channels, heads, window
        self.kernel_size, self.stride, self.padding = pair(kernel_size), pair(stride), pair(padding)
        taps, self.head_dim = math.prod(self.kernel_size), out_channels // heads
        self.qkv = nn.Conv2d(in_channels, 3 * out_channels, 1)
        self.mix = nn.Linear(3 * heads, taps, bias=False)
        self.shift = nn.Parameter(torch.empty(out_channels, taps, *self.kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.alpha, self.beta = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.5))
        self.reset_shift()

    @torch.no_grad()
    def reset_shift(self) -> None:
        """Make tap t of every channel look at offset t alone, so that the convolution shifts and adds up."""
        taps = math.prod(self.kernel_size)
        self.shift.copy_(torch.eye(taps).view(1, taps, *self.kernel_size).expand_as(self.shift))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, O, h', w')."""
        b, _, h, w = x.shape
        maps, q, k, v, geometry = self._project(x)
        attended = attend(q, k, v, geometry, self._window(), pads=False, temperature=1.0, dropout=0.0)
        attended = attended.mT.reshape(b, self.out_channels, *geometry.out_shape)
        tap_maps = self.mix(maps.movedim(1, -1)).movedim(-1, 2)  # (B, D, h * w, taps) -> (B, D, taps, h * w)
        tap_maps = tap_maps.reshape(b, -1, h, w)
        # Channel d * H + i of the convolution reads the taps of head channel d.
        convolved = F.conv2d(tap_maps, self.shift, self.bias, self.stride, self.padding, groups=self.head_dim)
        return self.alpha * attended + self.beta * convolved

    def _window(self) -> Selection:
        return Selection(
            "dot",
            candidates="window",
            num_candidates=self.window // 2,
            pad_candidates=False,
            self_first=False,
            k_policy="clamp",
        )

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Geometry]:
        """Return the projected maps (B, 3 H, D, h * w), queries (B, H, Q, D), keys and values (B, H, N, D)."""
        b, _, h, w = x.shape
        maps = self.qkv(x).view(b, 3 * self.heads, self.head_dim, h * w)
        q, k, v = maps.view(b, 3, self.heads, self.head_dim, h * w).mT.unbind(1)  # (B, H, h * w, D)
        geometry = Geometry(h, w, self.kernel_size, self.stride, self.padding)
        q, k, v = (add_ring(t, geometry) for t in (q, k, v))
        return maps, q[:, :, geometry.query_index(x.device)], k, v, geometry

    @torch.no_grad()
    def neighborhood(self, x: Tensor) -> Neighborhood:
        """Return what the attention path attends to, largest weight first; padding is never valid."""
        _, q, k, _, geometry = self._project(x)
        num = self.window**2
        return find_neighborhood(
            q, k, geometry, self._window(), num=num, blend=1.0, weighting="softmax", window=self.kernel_size
        )

    def extra_repr(self) -> str:
        """State the configuration in one line."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, heads={self.heads}, window={self.window}"
        )

    @classmethod
    def from_layer(cls, layer: nn.Conv2d, config: OperatorConfig, init: str, site: Site) -> ACmix2d:
        """Build the replacement of a convolution; ``operator.options`` has ``heads`` (4) and ``window`` (7)."""
        padding = check_conv(layer, site)
        refuse_transfer(init, site, config)
        if layer.groups != 1 or pair(layer.dilation) != (1, 1):
            raise ConfigError(f"'{site.name}' has groups or dilation, which ACmix lacks; exclude it (swap.exclude)")
        o = options(config, heads=4, window=7)
        args = (layer.in_channels, layer.out_channels, pair(layer.kernel_size), pair(layer.stride), padding)
        try:
            new = cls(*args, bias=layer.bias is not None if config.bias is None else config.bias, **o)
        except ValueError as error:
            raise ConfigError(f"'{site.name}': {error}; set operator.options or exclude it (swap.exclude)") from error
        return new.to(layer.weight.device, layer.weight.dtype)
