"""The neighbours that each layer of a model chooses for given images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from convnn.nn.adapters.layer import AdaptedAttention
from convnn.nn.base import first_tensor
from convnn.ops.neighborhood import Neighborhood, same_draws


def choosing_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of a model that choose neighbours, by name: all that have a method ``neighborhood``."""
    # A hybrid answers for its branch ``neighbors``, which is found by itself.
    asked = ((name, m) for name, m in model.named_modules() if hasattr(type(m), "neighborhood"))
    return {name: m for name, m in asked if not hasattr(m, "neighbors")}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluate without a trace: no gradient, no change of modes, statistics or random generators."""
    modes = [(module, module.training) for module in model.modules()]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    model.eval()
    try:
        with torch.no_grad(), same_draws(device):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def neighbors_of(model: nn.Module, images: Tensor, blend: float | None = None) -> dict[str, Neighborhood]:
    """Return what every layer of a model chooses on these images, in one forward pass in evaluation mode.

    Args:
        model: with swapped layers, at any depth.
        images: (B, C, h, w), as the model takes them.
        blend: select at this blend instead of each layer's own. The features stay those of the forward pass at the
            layers' own blends; layers without a blend are left out.

    Returns:
        Neighborhoods by the layer's name, in forward order. Nothing about the model has changed.

    Raises:
        ValueError: if no layer of the model chooses neighbours.
    """
    layers = choosing_layers(model)
    if not layers:
        raise ValueError("no layer of this model chooses neighbours; swap some first (convnn.swap_layers)")
    if blend is not None:
        layers = {name: layer for name, layer in layers.items() if hasattr(layer, "set_spectrum")}
    found: dict[str, Neighborhood] = {}

    def look(name: str, layer: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        own: dict[str, Any] = {} if blend is None else {"blend": blend}
        if isinstance(layer, AdaptedAttention):
            own = given | own
        else:  # which refuse what comes besides
            args = (first_tensor(args, given),)
        with same_draws(first_tensor(args, given).device):
            found[name] = layer.neighborhood(*args, **own)  # type: ignore[operator]

    hooks = [layer.register_forward_pre_hook(partial(look, name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with evaluating(model):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found
