"""Which kinds of attention are known, and what stands for a layer of one of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from convnn.errors import ConfigError
from convnn.nn.adapters import (
    blocks,
    coarser,
    convit,
    convolved,
    eva,
    maps,
    refused,
    relative,
    talking,
    timm_attention,
    torch_attention,
    windows,
)
from convnn.nn.adapters.base import Adapter, classes_of
from convnn.nn.base import Site

_FAMILIES = (
    timm_attention,
    eva,
    relative,
    windows,
    torch_attention,
    maps,
    coarser,
    convolved,
    blocks,
    talking,
    convit,
    refused,
)
_ADAPTERS: list[Adapter] = [adapter for family in _FAMILIES for adapter in family.ADAPTERS]
"""Those that were registered last come first."""
_known: WeakKeyDictionary[type[nn.Module], Adapter | None] = WeakKeyDictionary()
"""What was found for a class of layers, until the adapters change."""


def register_adapter(adapter: Adapter) -> None:
    """Make layers of an adapter's classes replaceable; for classes that are known, it comes before what is known.

    Raises:
        ConfigError: if a class is not named as ``package.module:Class``.
    """
    for name in adapter.layers:
        if name.count(":") != 1:
            raise ConfigError(
                f"adapter {type(adapter).__name__}: layers={name} is not of the form package.module:Class"
            )
    _ADAPTERS.insert(0, adapter)
    _known.clear()


def unregister_adapter(adapter: Adapter) -> None:
    """Forget an adapter."""
    _ADAPTERS.remove(adapter)
    _known.clear()


def adapter_of(layer: nn.Module) -> Adapter | None:
    """Return what reads a layer, or None. A subclass that computes otherwise is another kind of layer."""
    kind = type(layer)
    if kind not in _known:
        _known[kind] = _search(kind)
    return _known[kind]


def _search(kind: type[nn.Module]) -> Adapter | None:
    forward = getattr(kind, "forward", None)
    for adapter in _ADAPTERS:
        if any(issubclass(kind, known) and forward is getattr(known, "forward", None) for known in classes_of(adapter)):
            return adapter
    return None


def is_attention(layer: nn.Module) -> bool:
    """Return whether a layer is attention that can be replaced, as far as its kind goes."""
    adapter = adapter_of(layer)
    return adapter is not None and adapter.refusal(layer) is None


def refusal_of(layer: nn.Module) -> str | None:
    """Return why a layer that is called attention cannot be replaced, or None."""
    adapter = adapter_of(layer)
    return None if adapter is None else adapter.refusal(layer)


def stand_in(layer: nn.Module, init: str, site: Site, adapts: bool) -> tuple[nn.Module, Site]:
    """Return the layer that a replacement is built from, and what surrounds it as that sees it.

    Args:
        layer: of any kind.
        init: ``fresh`` or ``transfer``.
        site: where it is.
        adapts: the operator reads layers through adapters; others take timm's ``Attention`` alone.

    Raises:
        ConfigError: if the layer's kind, or a transfer of its function, is refused.
    """
    adapter, kind = adapter_of(layer), type(layer).__name__
    if adapter is None:
        return layer, site
    reason = adapter.refusal(layer)
    if reason:
        raise ConfigError(f"'{site.name}' is a {kind}, which {reason}; exclude it (swap.exclude)")
    loss = adapter.loss(layer)
    if init == "transfer" and loss:
        raise ConfigError(
            f"swap.init=transfer: '{site.name}' is a {kind}, whose {loss} have no place in its replacement; use fresh, "
            "or exclude it (swap.exclude)"
        )
    site = _seen(adapter, layer, site)
    plain = adapter.attention(layer)
    if plain is None and not adapts:
        raise ConfigError(
            f"'{site.name}' is a {kind}, which only operators of ConvNNAttention can replace (convnn_attention, mhsa, "
            "kvt, neighborhood, ...); choose one, or exclude it (swap.exclude)"
        )
    return layer if plain is None else plain, site


def _seen(adapter: Adapter, layer: Any, site: Site) -> Site:
    prefix = adapter.prefix(layer)
    site = site if prefix is None else replace(site, num_prefix_tokens=prefix)
    return site if adapter.grid_from_model else replace(site, grid_size=None, token_grid=None)
