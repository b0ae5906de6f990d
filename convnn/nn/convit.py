"""ConViT's gated positional self-attention, for comparison in the same harness.

Shapes: B batch, H heads, Q queries, N tokens, C channels, D channels per head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from torch import Tensor, nn

from convnn.config.schema import OperatorConfig
from convnn.errors import ConfigError
from convnn.nn.attention import check_attention, refuse_mask
from convnn.nn.base import Site, TokenGrid, grid_of, options, refuse_transfer
from convnn.ops.geometry import Geometry, Pair
from convnn.ops.neighborhood import Neighborhood


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
        self.token_grid: TokenGrid | None = None
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
        height, width = grid_of(n, p, self.grid_size, self.token_grid)
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
        grid = grid_of(x.shape[1], self.num_prefix_tokens, self.grid_size, self.token_grid)
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
        new.token_grid = site.token_grid
        return new.to(layer.qkv.weight.device, layer.qkv.weight.dtype)
