"""convnn: explore what lies between convolution and attention.

Public names load on first use, so that ``import convnn`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from convnn.version import __version__

if TYPE_CHECKING:
    from convnn.config.presets import preset, presets
    from convnn.config.schema import Config, DataConfig, OperatorConfig, SwapRule
    from convnn.data.splits import Dataset, Split
    from convnn.errors import CheckpointError, ConfigError
    from convnn.figures.neighbors import draw_neighbors
    from convnn.models.backbones import create_backbone
    from convnn.models.inspect import neighbors_of
    from convnn.models.measuring import measure_choices
    from convnn.models.schedule import apply_schedule
    from convnn.models.swap import export_layers, neighbor_layers, swap_layers
    from convnn.models.tokens import set_token_grid
    from convnn.nn.acmix import ACmix2d
    from convnn.nn.adapters.base import Adapter
    from convnn.nn.adapters.registry import register_adapter
    from convnn.nn.attention import ConvNNAttention
    from convnn.nn.conv import ConvNN1d, ConvNN2d
    from convnn.nn.convit import GatedPositionalAttention
    from convnn.nn.hybrid import HybridConvNN2d, HybridConvNNAttention
    from convnn.nn.neighbor_attention import Heads
    from convnn.ops.functional import neighbor_aggregate
    from convnn.ops.geometry import Geometry
    from convnn.ops.neighborhood import Neighborhood
    from convnn.ops.settings import Mixing, Selection
    from convnn.train.exported import load_exported
    from convnn.train.finished import FinishedRun, LoadedModel, load_run

_HOME = {
    "ACmix2d": "nn.acmix",
    "Adapter": "nn.adapters.base",
    "CheckpointError": "errors",
    "Config": "config.schema",
    "ConfigError": "errors",
    "ConvNN1d": "nn.conv",
    "ConvNN2d": "nn.conv",
    "ConvNNAttention": "nn.attention",
    "DataConfig": "config.schema",
    "Dataset": "data.splits",
    "FinishedRun": "train.finished",
    "GatedPositionalAttention": "nn.convit",
    "Geometry": "ops.geometry",
    "Heads": "nn.neighbor_attention",
    "HybridConvNN2d": "nn.hybrid",
    "HybridConvNNAttention": "nn.hybrid",
    "LoadedModel": "train.finished",
    "Mixing": "ops.settings",
    "Neighborhood": "ops.neighborhood",
    "OperatorConfig": "config.schema",
    "Selection": "ops.settings",
    "Split": "data.splits",
    "SwapRule": "config.schema",
    "apply_schedule": "models.schedule",
    "create_backbone": "models.backbones",
    "draw_neighbors": "figures.neighbors",
    "export_layers": "models.swap",
    "load_exported": "train.exported",
    "load_run": "train.finished",
    "measure_choices": "models.measuring",
    "neighbor_aggregate": "ops.functional",
    "neighbor_layers": "models.swap",
    "neighbors_of": "models.inspect",
    "preset": "config.presets",
    "presets": "config.presets",
    "register_adapter": "nn.adapters.registry",
    "set_token_grid": "models.tokens",
    "swap_layers": "models.swap",
}

__all__ = [
    "ACmix2d",
    "Adapter",
    "CheckpointError",
    "Config",
    "ConfigError",
    "ConvNN1d",
    "ConvNN2d",
    "ConvNNAttention",
    "DataConfig",
    "Dataset",
    "FinishedRun",
    "GatedPositionalAttention",
    "Geometry",
    "Heads",
    "HybridConvNN2d",
    "HybridConvNNAttention",
    "LoadedModel",
    "Mixing",
    "Neighborhood",
    "OperatorConfig",
    "Selection",
    "Split",
    "SwapRule",
    "__version__",
    "apply_schedule",
    "create_backbone",
    "draw_neighbors",
    "export_layers",
    "load_exported",
    "load_run",
    "measure_choices",
    "neighbor_aggregate",
    "neighbor_layers",
    "neighbors_of",
    "preset",
    "presets",
    "register_adapter",
    "set_token_grid",
    "swap_layers",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"convnn.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'convnn' has no attribute {name!r}")


def __dir__() -> list[str]:
    # Not what this file imports for itself: completion shows the public names, and the packages that are loaded.
    loaded = (name for name, value in globals().items() if getattr(value, "__name__", "") == f"{__name__}.{name}")
    return sorted({*__all__, *loaded, *(name for name in globals() if name.startswith("__"))})
