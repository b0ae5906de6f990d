"""What the k neighbours of each query hold of all that attention would look at.

Shapes: B batch, H heads, Q queries, N tokens, K neighbours.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from convnn.models.inspect import choosing_layers, evaluating
from convnn.nn.adapters.layer import AdaptedAttention
from convnn.nn.base import NeighborLayer, first_tensor
from convnn.ops.neighborhood import Neighborhood, same_draws

_ALL = 1 << 30
"""Neighbours to ask for so that every token is one: a k above the tokens is lowered to them."""


@dataclass(frozen=True)
class Held:
    """Of one layer, over all queries, heads and images."""

    mass: float | None
    """Mean over queries of the softmax over all tokens, summed at the neighbours; None: no softmax weighs them."""
    window: float | None
    """Share of the neighbours, of queries on the grid, that lie inside the convolution window; None: no such query."""


def neighbor_mass(layer: Any, ask: Callable[[], Neighborhood], found: Neighborhood) -> Tensor | None:
    """Return what each query's neighbours hold of the layer's softmax over all tokens, (B, H, Q) float64, at most 1.

    All tokens are those that plain attention has: zero padding is none of them, and no candidates are left out but
    those after a query of ``causal`` attention and those beyond a window's border. The scores are those that the layer
    weighs by.

    Args:
        layer: that chose.
        ask: asks the layer for its neighbours on the same input, such as ``partial(layer.neighborhood, x)``.
        found: what it chose there.

    Returns:
        None where no softmax weighs the neighbours, and where the heads come one after another: with all tokens, the
        later ones would see other features.
    """
    if isinstance(layer, AdaptedAttention) and layer.adapter.in_turn:
        return None
    softmax = isinstance(layer, NeighborLayer) and layer.mixing.weighting.startswith("softmax")
    if found.weights is None or not softmax:
        return None
    own = layer.selection
    try:
        layer.selection = replace(own, k=_ALL, candidates="all", rank_step=1)
        whole = ask()
    finally:
        layer.selection = own
    assert whole.weights is not None
    size = max(whole.geometry.num_tokens, found.geometry.num_tokens)
    weights = whole.weights.double().masked_fill(whole.is_padding, 0)
    dense = weights.new_zeros(*whole.index.shape[:3], size).scatter_add_(-1, whole.index, weights)
    chosen = torch.zeros_like(dense).scatter_add_(-1, found.index, found.valid.to(dense.dtype)).clamp(max=1)
    return (dense * chosen).sum(-1) / dense.sum(-1)


@torch.no_grad()
def held_by_neighbors(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Held]:
    """Return what the neighbours of every layer that chooses some hold, by the layer's name, in forward order.

    Args:
        model: with swapped layers or without; it stays as it is.
        batches: of images as the model takes them, such as ``[images]``, (B, C, h, w) each.
    """
    sums: dict[str, Tensor] = {}

    def look(name: str, layer: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        ask = _question(layer, args, given)
        with same_draws(first_tensor(args, given).device):
            found = ask()
            mass = neighbor_mass(layer, ask, found)
        asked = (found.valid & (found.queries >= found.geometry.prefix)[:, None]).sum()
        parts = [found.in_window().sum(), asked]
        parts += [mass.sum(), mass.new_tensor(mass.numel())] if mass is not None else [asked * 0, asked * 0]
        counted = torch.stack([part.to("cpu", torch.float64) for part in parts])
        sums[name] = sums[name] + counted if name in sums else counted

    hooks = [
        layer.register_forward_pre_hook(partial(look, name), with_kwargs=True)
        for name, layer in choosing_layers(model).items()
    ]
    try:
        with evaluating(model):
            for images in batches if hooks else ():
                model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: _held(*values.tolist()) for name, values in sums.items()}


def _question(layer: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Callable[[], Neighborhood]:
    """Return what asks a layer for its neighbours in a call: most take the input alone, some all that comes with it."""
    takes = inspect.signature(layer.neighborhood).parameters.values()
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in takes):
        return partial(layer.neighborhood, *args, **given)
    return partial(layer.neighborhood, first_tensor(args, given))


def _held(inside: float, asked: float, mass: float, queries: float) -> Held:
    return Held(mass / queries if queries else None, inside / asked if asked else None)
