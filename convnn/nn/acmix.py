"""ACmix: convolution and window attention over shared projections, for comparison in the same harness.

Shapes: B batch, H heads, Q queries, N tokens, C channels, D channels per head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnn.config.schema import OperatorConfig
from convnn.errors import ConfigError
from convnn.nn.attention import add_ring
from convnn.nn.base import Site, options, pair, refuse_transfer
from convnn.nn.conv import check_conv
from convnn.ops.geometry import Geometry, Pair
from convnn.ops.neighborhood import Neighborhood, find_neighborhood
from convnn.ops.settings import Mixing, Selection
from convnn.ops.shortcuts import attend


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
            k=self.window**2,
            k_policy="clamp",
            similarity="dot",
            candidates="window",
            num_candidates=self.window // 2,
            pad_candidates=False,
            self_first=False,
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
        softmax = Mixing(weighting="softmax", aggregation="sum")
        return find_neighborhood(q, k, geometry, self._window(), softmax, blend=1.0, window=self.kernel_size)

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
