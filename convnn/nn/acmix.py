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
from convnn.nn.base import Site, options, pair, refuse_transfer
from convnn.nn.convolution import check_conv
from convnn.nn.neighbor_attention import add_ring
from convnn.ops.geometry import Geometry, Pair
from convnn.ops.neighborhood import Neighborhood


class ACmix2d(nn.Module):
    """ACmix (arXiv 2111.14556): convolution and window attention over shared 1x1 projections, a drop-in for Conv2d.

    Stage 1 projects to queries, keys and values. Stage 2 turns them into a k x k convolution (each tap a learned mix
    of the 3 H projected maps, shifted and added up) and into attention over a window, and adds both with learned
    weights that start at one half: ``alpha * attention + beta * convolution``. The convolution sees the map
    zero-padded; the window of the attention is reflected at the border, so that a token may stand in it several times.
    The keys are moved by an embedding of their position, a 1x1 convolution of coordinates.

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
        self.position = nn.Conv2d(2, self.head_dim, 1)
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
        attended = F.scaled_dot_product_attention(q, k, v, self._times_in_window(geometry, q).log())
        attended = attended.mT.reshape(b, self.out_channels, *geometry.out_shape)
        tap_maps = self.mix(maps.movedim(1, -1)).movedim(-1, 2)  # (B, D, h * w, taps) -> (B, D, taps, h * w)
        tap_maps = tap_maps.reshape(b, tap_maps.shape[1] * tap_maps.shape[2], h, w)
        # Channel d * H + i of the convolution reads the taps of head channel d.
        convolved = F.conv2d(tap_maps, self.shift, self.bias, self.stride, self.padding, groups=self.head_dim)
        return self.alpha * attended + self.beta * convolved

    def _times_in_window(self, geometry: Geometry, like: Tensor) -> Tensor:
        """Return how often each token stands in each query's window, reflected at the border: (Q, h * w)."""
        queries = geometry.query_index(like.device)
        shape, offsets = (geometry.height, geometry.width), torch.arange(self.window, device=like.device)
        per_axis = []
        for own, side, padding in zip(geometry.coordinates(queries), shape, self.padding, strict=True):
            at = own[:, None] - padding + offsets - self.window // 2  # (Q, window)
            period = max(2 * side - 2, 1)  # there and back, without the border pixels twice
            at = at % period
            per_axis.append(F.one_hot(torch.minimum(at, period - at) if side > 1 else at, side).sum(1))
        rows, cols = per_axis
        return (rows[:, :, None] * cols[:, None]).flatten(1).to(like.dtype)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Geometry]:
        """Return the projected maps (B, 3 H, D, h * w), queries (B, H, Q, D), keys and values (B, H, h * w, D).

        The published score is q_i (k_j + p_i - p_j), p the positions' embedding; p_i is the same for all j, so that the
        softmax is that of q_i (k_j - p_j).
        """
        b, _, h, w = x.shape
        maps = self.qkv(x).view(b, 3 * self.heads, self.head_dim, h * w)
        q, k, v = maps.view(b, 3, self.heads, self.head_dim, h * w).mT.unbind(1)  # (B, H, h * w, D)
        places = Geometry(h, w).positions(x.device).to(x.dtype)  # column and row, (h * w, 2)
        k = k - self.position(places.t().view(2, h, w)).flatten(1).t()
        geometry = Geometry(h, w, self.kernel_size, self.stride, self.padding)
        return maps, add_ring(q, geometry)[:, :, geometry.query_index(x.device)], k, v, geometry

    @torch.no_grad()
    def neighborhood(self, x: Tensor) -> Neighborhood:
        """Return what the attention path attends to, largest weight first: each token of the window once."""
        _, q, k, _, geometry = self._project(x)
        times = self._times_in_window(geometry, q)
        score = q @ k.mT / math.sqrt(self.head_dim) + times.log()
        weights, index = score.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        most = int((times > 0).sum(1).max())
        weights, index = weights[..., :most], index[..., :most]
        valid = times.expand_as(score).gather(-1, index) > 0
        return Neighborhood(geometry.inner_tokens(x.device)[index], valid, weights, geometry, self.kernel_size)

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
        if isinstance(padding, str) or any(m % 2 == 0 for m in layer.kernel_size):
            what = "pads as TensorFlow does" if isinstance(padding, str) else "has an even kernel"
            raise ConfigError(f"'{site.name}' {what}, which ACmix lacks; exclude it (swap.exclude)")
        if layer.groups != 1 or pair(layer.dilation) != (1, 1):
            raise ConfigError(f"'{site.name}' has groups or dilation, which ACmix lacks; exclude it (swap.exclude)")
        o = options(config, heads=4, window=7)
        args = (layer.in_channels, layer.out_channels, pair(layer.kernel_size), pair(layer.stride), padding)
        try:
            new = cls(*args, bias=layer.bias is not None if config.bias is None else config.bias, **o)
        except ValueError as error:
            raise ConfigError(f"'{site.name}': {error}; set operator.options or exclude it (swap.exclude)") from error
        return new.to(layer.weight.device, layer.weight.dtype)
