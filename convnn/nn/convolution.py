"""Convolutions that a layer takes the place of: their windows and paddings, and the plain one behind a subclass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from timm.layers.conv2d_same import Conv2dSameExport
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from convnn.config.schema import KERNEL, OperatorConfig
from convnn.errors import ConfigError
from convnn.nn.base import Site, pair
from convnn.ops.geometry import Pair

SAME = "same"
"""A padding: as much as makes an output as large as the map over the stride, the odd zero at the bottom and right."""
Padding = Pair | str
_TORCH = (nn.Conv2d, nn.Conv1d)
_ALWAYS_SAME = (Conv2dSame, Conv2dSameExport)
_STANDARDISED: Any = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)


def make_conv(
    in_channels: int,
    out_channels: int,
    kernel: Pair,
    stride: Pair,
    padding: Padding,
    dilation: Pair = (1, 1),
    groups: int = 1,
    bias: bool = True,
) -> nn.Conv2d:
    """Return a plain convolution; with a stride and ``padding="same"``, which torch lacks, timm's."""
    if padding == SAME and max(stride) > 1:
        return Conv2dSame(in_channels, out_channels, kernel, stride, dilation=dilation, groups=groups, bias=bias)
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding, dilation, groups, bias)


def with_taps(config: OperatorConfig, layer: nn.Module) -> OperatorConfig:
    """Return an operator whose ``k=kernel`` is the number of taps in the window of a convolution."""
    if config.k != KERNEL:
        return config
    return replace(config, k=math.prod(layer.kernel_size))  # type: ignore[arg-type]


def check_conv(layer: nn.Module, site: Site, kinds: tuple[type, ...] = (nn.Conv2d,)) -> Padding:
    """Return the padding of a convolution that an operator can stand in for: (rows, columns), or ``same``.

    Args:
        layer: as ``plain_convolution`` returns it.
        site: where it is.
        kinds: what the operator can stand in for: ``nn.Conv2d``, or ``nn.Conv1d`` as well.

    Raises:
        ConfigError: with the reason if it can not.
    """
    kind = type(layer).__name__
    if not isinstance(layer, _TORCH):
        raise ConfigError(f"'{site.name}' is a {kind}, not a convolution; choose operator.kind to fit")
    if not isinstance(layer, kinds):
        raise ConfigError(f"'{site.name}' is a {kind}, which only operator.target=convnn.ConvNN2d can replace")
    if layer.padding_mode != "zeros":
        raise ConfigError(f"'{site.name}' pads with padding_mode={layer.padding_mode}; only zeros can be replaced")
    if not _computes_as(layer, *_TORCH, *_ALWAYS_SAME):
        raise ConfigError(f"'{site.name}' is a {kind} with a forward pass of its own; exclude it (swap.exclude)")
    if _computes_as(layer, *_ALWAYS_SAME):
        return SAME
    sides, spread = map(_two, (layer.kernel_size, layer.dilation))
    if not isinstance(layer.padding, str):
        return _two(layer.padding, 0)
    totals = [d * (m - 1) for m, d in zip(sides, spread, strict=True)]
    if layer.padding == "valid":
        return (0, 0)
    return SAME if any(total % 2 for total in totals) else (totals[0] // 2, totals[1] // 2)


def _two(value: int | tuple[int, ...], first: int = 1) -> Pair:
    """Return (rows, columns) of what a convolution has for each axis; a line is one row, which has ``first``."""
    return (first, value[0]) if isinstance(value, tuple) and len(value) == 1 else pair(value)


def _computes_as(layer: nn.Module, *kinds: Any) -> bool:
    """Return whether a layer's function is that of one of some classes, whatever subclass it is."""
    own = type(layer)
    if "forward" in vars(layer) or own.forward not in [kind.forward for kind in kinds]:
        return False
    return own.forward not in [kind.forward for kind in _TORCH] or own._conv_forward in [  # type: ignore[attr-defined]
        kind._conv_forward for kind in _TORCH
    ]


# ------------------------------------------------------------------------------------- what computes a weight


@torch.no_grad()
def plain_convolution(layer: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the plain convolution that a layer is in evaluation, and what of it that lacks; empty: nothing.

    A weight that something computes (timm's weight standardisation, a parametrization of torch such as weight_norm, or
    a hook of the old weight_norm and spectral_norm) becomes a parameter as it is now. Other layers come back unchanged.

    Raises:
        ConfigError: if the weight is not the same each time it is computed.
    """
    if not isinstance(layer, _TORCH):
        return layer, ""
    dropped = [f"{text} of {which}" for which in ("weight", "bias") for text in _computed(layer, which)]
    standardised = _computes_as(layer, *_STANDARDISED)
    if standardised:
        dropped.append(f"weight standardisation ({type(layer).__name__})")
    if not dropped or not (standardised or _computes_as(layer, *_TORCH, *_ALWAYS_SAME)):
        return layer, ""
    with _evaluated(layer):
        (weight, bias), again = ([_value(layer, which) for which in ("weight", "bias")] for _ in range(2))
    for first, second in zip((weight, bias), again, strict=True):
        if first is None or second is None or first.is_meta:  # what has no data is taken to be the same
            continue
        if not torch.equal(first, second):
            raise ConfigError(f"'{name}' has another {' and '.join(dropped)} each time; exclude it (swap.exclude)")
    assert weight is not None
    if standardised:
        weight = _standardised(layer, weight)
    one_sided = isinstance(layer, nn.Conv1d)
    same = _computes_as(layer, *_ALWAYS_SAME) or (standardised and getattr(layer, "same_pad", False))
    build: Any = nn.Conv1d if one_sided else make_conv
    padding = SAME if same else layer.padding
    args = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, padding, layer.dilation)
    plain = build(*args, layer.groups, bias is not None).to(weight.device, weight.dtype)
    plain.padding_mode = layer.padding_mode
    plain.weight.copy_(weight)
    if bias is not None:
        plain.bias.copy_(bias)
    return plain.train(layer.training), ", ".join(dropped)


def computes_weight(hook: Any) -> bool:
    """Return whether a hook is torch's own, for a weight that is computed: what it does is in the weight."""
    module = str(getattr(hook, "__module__", ""))
    return module.startswith("torch.nn.utils") and not module.endswith("prune")


def _computed(layer: nn.Module, which: str) -> Iterator[str]:
    """Yield what computes a parameter."""
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, (WeightNorm, SpectralNorm)) and hook.name == which:
            yield f"torch.nn.utils.{type(hook).__name__}"
    if parametrize.is_parametrized(layer, which):
        for step in layer.parametrizations[which]:  # type: ignore[index]
            yield f"parametrization {type(step).__name__.strip('_')}"


def _value(layer: nn.Module, which: str) -> Tensor | None:
    """Return a parameter as the forward pass would see it."""
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, (WeightNorm, SpectralNorm)) and hook.name == which:
            own = {"do_power_iteration": False} if isinstance(hook, SpectralNorm) else {}
            return hook.compute_weight(layer, **own)
    return getattr(layer, which)


@contextmanager
def _evaluated(layer: nn.Module) -> Iterator[None]:
    """Let parametrizations compute as in evaluation: spectral_norm moves its vectors on in training."""
    modes = [(module, module.training) for module in layer.modules()]
    layer.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _standardised(layer: Any, weight: Tensor) -> Tensor:
    """Return the weight that timm's weight-standardised convolutions convolve with (arXiv 1903.10520, 2101.08692)."""
    gain = (layer.gain * layer.scale).flatten() if hasattr(layer, "gain") else None
    rows = weight.reshape(1, len(weight), -1)
    return F.batch_norm(rows, None, None, gain, training=True, momentum=0.0, eps=layer.eps).reshape_as(weight)


def check_transfer(layer: nn.Conv1d | nn.Conv2d, config: OperatorConfig, site: Site, groups: int) -> None:
    """Raise ConfigError if a convolution's weights have no place in the operator."""
    where = f"swap.init=transfer: '{site.name}'"
    neutral = {"projection": "identity", "shuffle": 1, "weighting": "ones", "distance": "chebyshev"}
    off = next((key for key, value in neutral.items() if getattr(config, key) != value), None)
    if config.aggregation not in ("conv", "depthwise"):
        off = "aggregation"
    if off:
        raise ConfigError(f"{where}: a convolution's weights have no place with operator.{off}={getattr(config, off)}")
    if groups != layer.groups:
        raise ConfigError(f"{where} has groups={layer.groups} and operator.aggregation={config.aggregation} {groups}")
    area, k = math.prod(layer.kernel_size), with_taps(config, layer).k
    if k < area or (config.slots == "raster" and k != area):  # type: ignore[operator]
        need = f"= {area}" if config.slots == "raster" else f">= {area}"
        size = "x".join(map(str, layer.kernel_size))
        raise ConfigError(f"{where} has a {size} kernel and needs operator.k {need}, not {k}, or operator.k=kernel")
    if config.bias is False and layer.bias is not None:
        raise ConfigError(f"{where} has a bias; leave operator.bias at null")
