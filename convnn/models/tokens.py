"""Where a model's tokens lie: what its patch embedding tells at each call, or what the user says."""

from __future__ import annotations

from typing import Any

from torch import nn

from convnn.config.schema import BackboneConfig
from convnn.errors import ConfigError
from convnn.nn.base import Site, TokenGrid
from convnn.ops.geometry import Pair

_PATCHES = ("patch_embed", "conv_proj")
"""What timm and torchvision call the module that makes tokens of an image."""


def site_of(model: nn.Module, name: str, grids: dict[nn.Module, TokenGrid]) -> Site:
    """Return what surrounds a layer: the nearest module around it that has a patch embedding tells of the tokens.

    Where there is none, the layer gets a grid that nobody notes: it refuses settings with positions until
    ``set_token_grid`` says where its tokens lie.

    Args:
        model: that the layer is in, however wrapped.
        name: of the layer.
        grids: those of this swap by patch embedding, to be hooked in once everything is built; is added to.
    """
    parents = [name.rpartition(".")[0]]
    while parents[-1]:
        parents.append(parents[-1].rpartition(".")[0])
    for parent in map(model.get_submodule, parents):
        for attribute in _PATCHES:
            patches = getattr(parent, attribute, None)
            if isinstance(patches, nn.Module):
                grid = getattr(patches, "grid_size", None)
                size = (int(grid[0]), int(grid[1])) if grid else None
                noted = _noted(patches) or grids.setdefault(patches, TokenGrid())
                return Site(name, _prefix_tokens(parent), size, noted)
    return Site(name, _prefix_tokens(model), None, TokenGrid())


def _prefix_tokens(parent: nn.Module) -> int:
    """Return how many tokens a network puts before its patches."""
    torchvision = isinstance(getattr(parent, "conv_proj", None), nn.Module) and hasattr(parent, "class_token")
    return int(getattr(parent, "num_prefix_tokens", 1 if torchvision else 0))


def _noted(patches: nn.Module) -> TokenGrid | None:
    """Return what a swap before this one has hooked into a patch embedding."""
    hooks = (getattr(hook, "__self__", None) for hook in patches._forward_hooks.values())
    return next((grid for grid in hooks if isinstance(grid, TokenGrid)), None)


def forget_token_grids(model: nn.Module) -> None:
    """Take away what notes the grids of a model's images, once nobody asks for them."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(getattr(hook, "__self__", None), TokenGrid):
                del module._forward_hooks[key]


def set_token_grid(model: nn.Module, grid: Pair | str | None, num_prefix_tokens: int | None = None) -> list[str]:
    """Say where the tokens of a swapped model lie, for networks that have no patch embedding to tell it.

    Args:
        model: with swapped attention, or one such layer, or a part of a model.
        grid: rows and columns, which every sequence then must have; ``"square"``: the tokens after the prefix are a
            square, whatever their number; None: as it was.
        num_prefix_tokens: tokens before the grid (CLS, registers); None: as it was.

    Returns:
        The names of the layers that were told.

    Raises:
        ConfigError: if no layer asks for a grid, or the arguments cannot be.
    """
    size = tuple(map(int, grid)) if isinstance(grid, (tuple, list)) else None
    if (size is None and grid not in (None, "square")) or (size is not None and (len(size) != 2 or min(size) < 1)):
        raise ConfigError(f"set_token_grid: grid={grid} must be (rows, columns), 'square' or None")
    if num_prefix_tokens is not None and num_prefix_tokens < 0:
        raise ConfigError(f"set_token_grid: num_prefix_tokens={num_prefix_tokens} must not be negative")
    layers: dict[str, Any] = {name: m for name, m in model.named_modules() if hasattr(m, "token_grid")}
    if not layers:
        raise ConfigError("set_token_grid: no layer of this model asks for a grid; swap its attention first")
    for layer in layers.values():
        if grid is not None:
            layer.grid_size = size
            layer.token_grid = None
        if num_prefix_tokens is not None:
            layer.num_prefix_tokens = num_prefix_tokens
    return list(layers)


def set_configured_grid(model: nn.Module, backbone: BackboneConfig) -> None:
    """Say where the tokens of a swapped model lie, if its configuration does."""
    if backbone.token_grid is not None:
        rows, columns = backbone.token_grid
        set_token_grid(model, (rows, columns), backbone.prefix_tokens)
