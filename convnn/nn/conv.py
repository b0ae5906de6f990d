"""The drop-ins for ``nn.Conv2d`` and ``nn.Conv1d``: parameters and signature around ``functional``.

Shapes: B batch, N tokens, K neighbours, C input and O output channels.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnn.config.schema import CONV, KERNEL, OperatorConfig
from convnn.errors import ConfigError
from convnn.nn.base import NeighborLayer, Site, layer_settings, pair
from convnn.nn.convolution import SAME, Padding, check_conv, check_transfer, make_conv
from convnn.ops.functional import neighbor_aggregate
from convnn.ops.geometry import Geometry, Pair, same_padding
from convnn.ops.neighborhood import Neighborhood, find_neighborhood
from convnn.ops.shortcuts import convolve, is_convolution
from convnn.ops.slots import kernel_to_slots, slots_to_kernel

_OPERATION = {"edge": "max_relative", "sage": "max_relative", "gin": "sum"}
"""What the operator does for the aggregations that the layer completes."""


class ConvNN2d(NeighborLayer):
    """Convolutional nearest neighbours on a feature map, a drop-in for ``nn.Conv2d`` (arXiv 2511.14137).

    Each output pixel gathers k tokens of the zero-padded map, chosen by position (``blend`` 0), by features (1)
    or by both, and mixes them with one weight matrix per slot. At blend 0 with k = kernel area it is exactly
    ``nn.Conv2d``; ``from_layer(..., init="transfer")`` and ``to_layer`` move the weights across.

    Args:
        in_channels: C.
        out_channels: O.
        k: neighbours per output pixel; ``"kernel"``: as many as the window has taps.
        stride: step between output pixels, in input pixels.
        padding: width of the zero ring, whose pixels are tokens too; ``"same"``: what makes h' = h / stride, rounded
            up, with an odd zero at the bottom or right (TensorFlow's).
        blend: 0 (position) to 1 (features).
        kernel_size: window that places the output pixels and that blend 0 stands for. An output pixel lies on its
            centre tap; of an even number of taps m that is tap m / 2 - 1 from 0. Default: 2 padding + 1.
        dilation: of that window.
        groups: of the mixing weights (``aggregation="conv"``).
        bias: add one.
        fast: let ``F.conv2d`` compute the position end.
        **settings: fields of ``convnn.OperatorConfig``: how neighbours are chosen (``similarity``, ``mix``,
            ``candidates``, ``self_first``, ``slots``, ...) and mixed (``weighting``, ``aggregation``, ...), and
            ``projection``, ``coordinates``, ``shuffle``, ``learn_blend``. ``aggregation="depthwise"`` needs O to be a
            multiple of C, ``"sum"`` O = C unless projected; with softmax depthwise weights start at one.

    Shape:
        (B, C, h, w) -> (B, O, h', w') with h', w' as for ``nn.Conv2d`` with this kernel, stride and padding.

    Raises:
        ValueError: for settings that contradict each other, and in the forward pass if k exceeds the candidates.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        k: int | str = 9,
        stride: int | Pair = 1,
        padding: int | Padding = 1,
        blend: float = 1.0,
        *,
        kernel_size: int | Pair | None = None,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = True,
        fast: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.stride, self.dilation = pair(stride), pair(dilation)
        self.padding: Padding = padding if isinstance(padding, str) else pair(padding)
        if isinstance(self.padding, str) and (kernel_size is None or self.padding != SAME):
            raise ValueError(f"padding={padding} must be a number, a pair, or {SAME} with a kernel_size")
        self.kernel_size = pair(kernel_size or (2 * self.padding[0] + 1, 2 * self.padding[1] + 1))  # type: ignore[operator]
        k = math.prod(self.kernel_size) if k == KERNEL else k
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"groups={groups} must divide in_channels={in_channels}, out_channels={out_channels}")
        self.in_channels, self.out_channels, self.groups, self.fast = in_channels, out_channels, groups, fast
        self._init_spectrum(CONV, 1, {"k": k, "blend": blend} | settings)
        self.aggregation, self.shuffle = self.settings.aggregation, self.settings.shuffle
        self.coordinates = self.settings.coordinates
        self._check_channels()
        self._add_weights(bias)
        self.reset_parameters()

    def _check_channels(self) -> None:
        """Raise ValueError where channels and settings do not go together."""
        c, o, aggregation = self.in_channels, self.out_channels, self.aggregation
        if self.shuffle > 1 and (self.stride != (1, 1) or self.groups > 1):
            raise ValueError(f"shuffle={self.shuffle} needs stride=1 and groups=1")
        if self.groups > 1 and (aggregation != "conv" or self.coordinates):
            raise ValueError(f"groups={self.groups} needs aggregation=conv without coordinates, not {aggregation}")
        if aggregation == "depthwise" and o % c:
            raise ValueError(f"aggregation=depthwise: out_channels={o} must be a multiple of {c}")
        if aggregation == "sum" and self.settings.projection == "identity" and c != o:
            raise ValueError(f"aggregation=sum without projection keeps {c} channels, not {o}")

    def _add_weights(self, bias: bool) -> None:
        wide, out = self.in_channels * self.shuffle**2, self.out_channels * self.shuffle**2
        mixed = wide + 2 * self.coordinates
        self.mix_groups = {"depthwise": wide, "separable": mixed}.get(self.aggregation, self.groups)
        rows = {"conv": out, "depthwise": out, "separable": mixed}.get(self.aggregation)
        self.weight = nn.Parameter(torch.empty(rows, mixed // self.mix_groups, self.k)) if rows else None
        inner = {"separable": mixed, "max_relative": 2 * wide, "edge": wide, "sage": 2 * wide, "gin": wide}
        inner_width = inner.get(self.aggregation)
        projected, biased = self.settings.projection == "linear", self.settings.inner_bias
        self.slot_bias = nn.Parameter(torch.empty(mixed)) if biased else None
        self.pointwise = nn.Linear(inner_width, out, bias=biased and projected) if inner_width else None
        before = {"edge": out, "sage": wide}.get(self.aggregation)
        self.neighbor_map = nn.Linear(wide, before, bias=False) if before else None
        self.eps = nn.Parameter(torch.empty(())) if self.aggregation == "gin" else None
        self.qkv = nn.Linear(wide, 3 * wide, bias=False) if projected else None
        self.proj = nn.Linear(wide if self.aggregation == "sum" else out, out, bias=False) if self.qkv else None
        self.bias = nn.Parameter(torch.empty(out)) if bias else None

    def reset_parameters(self) -> None:
        """Draw new weights as ``nn.Conv1d`` would with a kernel of k."""
        fan = 1
        if self.weight is not None:
            fan = self.weight[0].numel()
            if self.mixing.weighting.startswith("softmax") and self.aggregation in ("depthwise", "separable"):
                nn.init.ones_(self.weight)
            else:
                nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
            if self.slot_bias is not None:
                nn.init.uniform_(self.slot_bias, -1 / math.sqrt(fan), 1 / math.sqrt(fan))
        if self.eps is not None:
            nn.init.zeros_(self.eps)
        for linear in (self.neighbor_map, self.pointwise, self.qkv, self.proj):
            if linear is not None:
                linear.reset_parameters()
                fan = linear.in_features
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1 / math.sqrt(fan), 1 / math.sqrt(fan))

    def geometry(self, height: int, width: int) -> Geometry:
        """Return where tokens and queries lie on a map of this size (after the unshuffle)."""
        window = self.kernel_size, self.stride
        if isinstance(self.padding, str):
            padding, extra = same_padding(height, width, *window, self.dilation)
            return Geometry(height, width, *window, padding, self.dilation, extra=extra)
        return Geometry(height, width, *window, self.padding, self.dilation)

    def forward(self, x: Tensor, return_neighbors: bool = False) -> Any:
        """(B, C, h, w) -> (B, O, h', w'); with ``return_neighbors`` a Neighborhood too."""
        if return_neighbors:
            return self.with_neighbors(x)
        x, geometry = self._unshuffled(x)
        y = self._convolve(x, geometry)
        if y is None:
            y = self._aggregate(x, geometry)
        return F.pixel_shuffle(y, self.shuffle) if self.shuffle > 1 else y

    def _unshuffled(self, x: Tensor) -> tuple[Tensor, Geometry]:
        """Check the input; return it as the operator sees it, and where its tokens lie."""
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"expected (batch, {self.in_channels}, height, width), got {tuple(x.shape)}")
        if self.shuffle > 1:
            if x.shape[2] % self.shuffle or x.shape[3] % self.shuffle:
                raise ValueError(f"shuffle={self.shuffle} does not divide a {x.shape[2]}x{x.shape[3]} map")
            x = F.pixel_unshuffle(x, self.shuffle)
        geometry = self.geometry(x.shape[2], x.shape[3])
        if min(geometry.out_shape) < 1:
            raise ValueError(f"a {x.shape[2]}x{x.shape[3]} map is smaller than the window {self.kernel_size}")
        return x, geometry

    def _qkv(self, x: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of every token: (B, C, h, w) -> three (B, 1, N, C)."""
        tokens = F.pad(x, geometry.pads).flatten(2).transpose(1, 2).unsqueeze(1).contiguous()
        return (tokens,) * 3 if self.qkv is None else self.qkv(tokens).chunk(3, dim=-1)

    def neighborhood(self, x: Tensor, *, blend: float | None = None) -> Neighborhood:
        """Return what the layer chooses on a map (B, C, h, w), at its own blend or another."""
        x, geometry = self._unshuffled(x)
        q, k, _ = self._qkv(x, geometry)
        return find_neighborhood(
            q[:, :, geometry.query_index(x.device)],
            k,
            geometry,
            self.selection,
            self.mixing,
            blend=self.blend_value() if blend is None else float(blend),
            training=self.training,
            window=self.kernel_size,
        )

    def _convolve(self, x: Tensor, geometry: Geometry) -> Tensor | None:
        """Return what ``F.conv2d`` gives if it is the same."""
        if self.weight is None or not self.fast or not self.is_convolution(geometry, self.k):
            return None
        return convolve(x, geometry, self.selection, self.weight, self.bias, self.mix_groups)

    def is_convolution(self, geometry: Geometry, num: int) -> bool:
        """Return whether the layer with ``num`` neighbours would be a convolution on such a map."""
        plain = self.aggregation in ("conv", "depthwise") and self.qkv is None and not self.coordinates
        selection = replace(self.selection, k=num)
        return plain and is_convolution(geometry, selection, self.mixing, self.blend_value())

    def _aggregate(self, x: Tensor, geometry: Geometry) -> Tensor:
        q, k, v = self._qkv(x, geometry)
        if self.coordinates:
            positions = geometry.positions(v.device).to(v.dtype)
            v = torch.cat([v, positions.expand(*v.shape[:-1], 2)], dim=-1)
        queries = geometry.query_index(x.device)
        if self.aggregation in ("max_relative", "sage", "edge") or self.eps is not None:
            own = v[:, :, queries]
        if self.neighbor_map is not None:
            v = self.neighbor_map(v)
        y = neighbor_aggregate(
            q[:, :, queries],
            k,
            v,
            geometry,
            self.selection,
            replace(self.mixing_value(), aggregation=_OPERATION.get(self.aggregation, self.aggregation)),
            blend=self.blend_value(),
            weight=self.weight,
            groups=self.mix_groups,
            training=self.training,
        )
        if self.aggregation == "sage":
            y = y + v[:, :, queries]
        if self.aggregation in ("max_relative", "sage"):
            y = torch.cat([own, y], dim=-1)
        if self.aggregation == "edge":  # the largest of W x_i + V (x_j - x_i) is W x_i + the largest V x_j - V x_i
            assert self.pointwise is not None
            y = self.pointwise(own) + y
        if self.eps is not None:
            y = y + (1 + self.eps) * own
        if self.slot_bias is not None:
            y = y + self.slot_bias
        for linear in (self.pointwise if self.aggregation != "edge" else None, self.proj):
            if linear is not None:
                y = linear(y)
        if self.bias is not None:
            y = y + self.bias
        y = y.squeeze(1).transpose(1, 2).unflatten(2, geometry.out_shape)
        # As convolutions do, in the memory format of the input; the aggregation's is channels-last.
        return y.contiguous() if x.is_contiguous() else y

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
        """Take over a convolution kernel (O, C / groups, kh, kw).

        Slots beyond the window and coordinate channels become zero.
        """
        assert self.weight is not None
        slots = kernel_to_slots(kernel, self.selection.slots)
        self.weight.zero_()
        self.weight[:, : slots.shape[1], : slots.shape[2]] = slots
        if self.bias is not None:
            self.bias.copy_(bias if bias is not None else torch.zeros_like(self.bias))

    @torch.no_grad()
    def to_layer(self) -> nn.Conv2d | nn.Conv1d:
        """Return the convolution that this layer equals.

        Raises:
            ValueError: if it equals none: off blend 0, or k not the kernel's area, or weights no convolution has.
        """
        area = math.prod(self.kernel_size)
        geometry = self.geometry(*self.kernel_size)
        if self.weight is None or self.shuffle > 1 or not self.is_convolution(geometry, area):
            raise ValueError(f"it is no convolution: {self._spectrum_repr()}")
        spare = self.k > area and self.selection.slots != "raster" and not self.weight[..., area : self.k].any()
        if self.k != area and not spare:
            raise ValueError(f"k={self.k} is not the area of the window {self.kernel_size}")
        args = (self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation)
        conv = make_conv(*args, self.mix_groups, self.bias is not None)
        conv.to(self.weight.device, self.weight.dtype)
        conv.weight.copy_(slots_to_kernel(self.weight[..., :area], self.kernel_size, self.selection.slots))
        if self.bias is not None and conv.bias is not None:
            conv.bias.copy_(self.bias)
        return conv.train(self.training)

    @classmethod
    def from_layer(
        cls, layer: nn.Module, config: OperatorConfig, init: str, site: Site, out_channels: int | None = None
    ) -> ConvNN2d:
        """Build the replacement of a convolution; ``out_channels`` takes only its first ones.

        Raises:
            ConfigError: for a padding other than zeros or numbers, channels that the aggregation cannot serve, or a
                transfer that is not defined.
        """
        padding = check_conv(layer, site, (nn.Conv2d, nn.Conv1d))
        assert isinstance(layer, (nn.Conv2d, nn.Conv1d))
        out = layer.out_channels if out_channels is None else out_channels
        has_bias = layer.bias is not None if config.bias is None else config.bias
        window: dict[str, Any] = {n: getattr(layer, n) for n in ("kernel_size", "stride", "dilation")}
        kind, window = cls, window | {"padding": padding}
        if isinstance(layer, nn.Conv1d):
            kind, window = ConvNN1d, {n: v if isinstance(v, str) else v[-1] for n, v in window.items()}
        groups = layer.groups if config.aggregation == "conv" else 1
        options = layer_settings(config) | {"k": config.k, "blend": config.blend, "groups": groups, "bias": has_bias}
        try:
            new: ConvNN2d = kind(layer.in_channels, out, **window, **options)
        except ValueError as error:
            raise ConfigError(f"'{site.name}': {error}; exclude it (swap.exclude)") from error
        new.to(layer.weight.device, layer.weight.dtype)  # before anything is copied, which would be rounded
        if init == "transfer":
            check_transfer(layer, config, site, new.mix_groups)
            new.load_conv(layer.weight[:out], None if layer.bias is None else layer.bias[:out])
        return new


class ConvNN1d(ConvNN2d):
    """``ConvNN2d`` on a line, a drop-in for ``nn.Conv1d``: the map has one row.

    Arguments are those of ``ConvNN2d``, numbers where that has pairs; ``shuffle`` is not for lines.

    Shape:
        (B, C, n) -> (B, O, n') with n' as for ``nn.Conv1d`` with this kernel, stride and padding.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        k: int | str = 3,
        stride: int = 1,
        padding: int | str = 1,
        blend: float = 1.0,
        *,
        kernel_size: int | None = None,
        dilation: int = 1,
        **settings: Any,
    ) -> None:
        if settings.get("shuffle", 1) != 1:
            raise ValueError(f"shuffle={settings['shuffle']} is for maps, not lines")
        ring = padding if isinstance(padding, str) else (0, padding)
        window = None if kernel_size is None else (1, kernel_size)
        args = (in_channels, out_channels, k, (1, stride), ring, blend)
        super().__init__(*args, kernel_size=window, dilation=(1, dilation), **settings)

    def forward(self, x: Tensor, return_neighbors: bool = False) -> Any:
        """(B, C, n) -> (B, O, n'); with ``return_neighbors`` a Neighborhood on the one row too."""
        if return_neighbors:
            return self.with_neighbors(x)
        return super().forward(self._row(x)).squeeze(2)

    def neighborhood(self, x: Tensor, *, blend: float | None = None) -> Neighborhood:
        """Return what the layer chooses on a line (B, C, n), at its own blend or another."""
        return super().neighborhood(self._row(x), blend=blend)

    def _row(self, x: Tensor) -> Tensor:
        if x.ndim != 3:
            raise ValueError(f"expected (batch, {self.in_channels}, length), got {tuple(x.shape)}")
        return x.unsqueeze(2)

    @torch.no_grad()
    def load_conv(self, kernel: Tensor, bias: Tensor | None) -> None:
        """Take over a convolution kernel (O, C / groups, m)."""
        super().load_conv(kernel.unsqueeze(2), bias)

    @torch.no_grad()
    def to_layer(self) -> nn.Conv1d:
        """Return the convolution that this layer equals; see ``ConvNN2d.to_layer``."""
        flat = super().to_layer()
        padding = self.padding if isinstance(self.padding, str) else self.padding[1]
        window: Any = (
            self.kernel_size[1],
            self.stride[1],
            padding,
            self.dilation[1],
            flat.groups,
            self.bias is not None,
        )
        conv = nn.Conv1d(self.in_channels, self.out_channels, *window)
        conv.to(flat.weight.device, flat.weight.dtype)
        conv.weight.copy_(flat.weight.squeeze(2))
        if conv.bias is not None and flat.bias is not None:
            conv.bias.copy_(flat.bias)
        return conv.train(self.training)
