"""The layer that takes the place of attention of any kind, as its adapter reads it."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from convnn.config.schema import OperatorConfig
from convnn.errors import ConfigError
from convnn.nn.adapters.base import Adapter
from convnn.nn.adapters.registry import adapter_of
from convnn.nn.base import Site, first_tensor, layer_settings
from convnn.nn.neighbor_attention import Heads, NeighborAttention
from convnn.ops.geometry import Geometry, Pair
from convnn.ops.neighborhood import Neighborhood, joined, same_draws


class AdaptedAttention(NeighborAttention):
    """Attention over the k nearest tokens with the parameters of a layer of another kind.

    ``plain`` is that layer (a copy), whose parameters keep their names behind ``plain.``; what the modules around it
    read from it, such as ``window_size``, is found here too. Where a bias of its own, a window mask or another rule
    bears on the scores, plain torch computes: no compiled kernel does.

    Args:
        plain: the layer.
        adapter: reads it.
        config: how neighbours are chosen and mixed.
        site: where it stands.

    Shape:
        As the layer's.

    Raises:
        ValueError: for a mask that is no part of the layer's kind, and as ``ConvNNAttention``.
    """

    def __init__(self, plain: nn.Module, adapter: Adapter, config: OperatorConfig, site: Site) -> None:
        super().__init__()
        heads, channels = adapter.size(plain)
        settings = layer_settings(config) | {"k": config.k, "blend": config.blend}
        self._init_attention(heads, settings)
        self.num_prefix_tokens, self.grid_size, self.fast = site.num_prefix_tokens, site.grid_size, True
        self.token_grid = site.token_grid
        self.adapter, self.plain = adapter, plain
        self.seen: tuple[int, Geometry] | None = None
        """B and where the tokens were, in the last call: with windows B is their number too."""
        self._init_slots(channels, adapter.dropout(plain))
        for name, value in adapter.stands_for(plain).items():
            setattr(self, name, value)
        self.reset_slots()

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of ``plain`` that modules around it read (``rel_pos``, ``set_window_size``, ...)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            plain = self.__dict__.get("_modules", {}).get("plain")
            if plain is None or name.startswith("_"):
                raise
            return getattr(plain, name)

    def last_call(self, x: Tensor) -> tuple[int, Geometry]:
        """Return B and the geometry of the last call: the input alone may not tell."""
        if self.seen is None:
            raise ValueError("this layer has not been called yet")
        return self.seen

    def _grid(self, num_tokens: int, grid: Pair | None) -> Pair:
        if grid is None and self.grid_size is None and not self.adapter.grid_from_model:
            kind = type(self.plain).__name__
            raise ValueError(
                f"where the {num_tokens} tokens of {kind} lie is not known; set its grid_size, or use settings without "
                "positions (blend=1 with candidates=all or random)"
            )
        return super()._grid(num_tokens, grid)

    def neighborhood(self, *args: Any, blend: float | None = None, **given: Any) -> Neighborhood:
        """Return what the layer chooses when it is called so, at its own blend or another."""
        if not self.adapter.in_turn:
            return self._choose(self.adapter.read(self.plain, *args, **given), blend)
        found: list[Neighborhood] = []

        def look(heads: Heads) -> Tensor:
            with same_draws(heads.q.device):
                found.append(self._choose(heads, blend))
            return self._aggregate(heads, self.layout_for(heads))

        self.adapter.attend(self.plain, look, *args, **given)
        return joined(found)

    def forward(self, *args: Any, return_neighbors: bool = False, **given: Any) -> Any:
        """Take what the layer takes and return what it returns, with ``return_neighbors`` a Neighborhood too."""
        if return_neighbors:
            with same_draws(first_tensor(args, given).device):
                found = self.neighborhood(*args, **given)
            return self.forward(*args, **given), found
        return self.adapter.attend(self.plain, self._mix, *args, **given)

    def _mix(self, heads: Heads) -> Tensor:
        geometry = self.layout_for(heads)
        if not torch.compiler.is_compiling():
            self.seen = len(heads.q), geometry
        return self._aggregate(heads, geometry)

    def extra_repr(self) -> str:
        """State the configuration in one line."""
        return f"{type(self.plain).__name__}, num_heads={self.num_heads}, {self._spectrum_repr()}"

    @torch.no_grad()
    def to_layer(self) -> nn.Module:
        """Return the plain layer, which this one equals on as many tokens as it has neighbours.

        Raises:
            ValueError: if it equals none: fewer neighbours than tokens, or weights that attention has not.
        """
        tokens = self.adapter.tokens(self.plain)
        if tokens is None and self.grid_size is not None:
            tokens = self.num_prefix_tokens + math.prod(self.grid_size)
        reason = self._lacks_plain(tokens)
        if reason is None and self.temperature != 1:
            reason = f"it is no self-attention: {self._spectrum_repr()}"
        if reason:
            raise ValueError(reason)
        plain = copy.deepcopy(self.plain)
        plain.train(self.training)  # which some return from, and some do not
        return plain

    @classmethod
    def from_layer(cls, layer: nn.Module, config: OperatorConfig, init: str, site: Site) -> AdaptedAttention:
        """Build the replacement of an attention layer of a kind that has an adapter.

        ``transfer`` copies the layer whole and lets the aggregation start as the sum: with k = N the function stays.

        Raises:
            ConfigError: for settings that the layer's own parts decide.
        """
        adapter = adapter_of(layer)
        if adapter is None:
            raise ConfigError(f"'{site.name}' is a {type(layer).__name__}, which no adapter reads")
        for key in ("bias", "head_dim"):
            if getattr(config, key) is not None:
                raise ConfigError(
                    f"operator.{key}={getattr(config, key)}: '{site.name}' is a {type(layer).__name__}, which keeps "
                    f"its own; leave operator.{key} at null"
                )
        if hasattr(layer, "attention_bias_cache"):  # of evaluation; its entries cannot be copied
            layer.attention_bias_cache = {}  # type: ignore[assignment]
        plain = copy.deepcopy(layer)
        if init == "fresh":
            reset(plain)
            adapter.start(plain)
        weight = next(plain.parameters())
        new = cls(plain, adapter, config, site)
        for name, parameter in new.named_parameters():
            if not name.startswith("plain."):  # which is as it was
                parameter.data = parameter.data.to(weight.device, weight.dtype)
        new.reset_slots(preserve=init == "transfer")
        return new


@torch.no_grad()
def reset(layer: nn.Module) -> None:
    """Draw a layer's parameters anew: projections as timm's ViT does, all else as its class does, or zeros."""
    for module in layer.modules():
        own = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        for parameter in module.parameters(recurse=False) if module is layer and own is None else ():
            nn.init.zeros_(parameter)
        if callable(own):
            own()
    for module in layer.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
