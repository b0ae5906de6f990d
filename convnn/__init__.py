"""convnn: explore what lies between convolution and attention.

Public names load on first use, so that ``import convnn`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convnn.attention import ConvNNAttention
    from convnn.backbones import create_backbone
    from convnn.config import Config, ConfigError, OperatorConfig, SwapRule
    from convnn.functional import neighbor_aggregate
    from convnn.hybrid import HybridConvNN2d, HybridConvNNAttention
    from convnn.layers import ConvNN2d
    from convnn.neighborhood import Neighborhood, neighbors_of
    from convnn.schedule import apply_schedule
    from convnn.swap import export_layers, neighbor_layers, swap_layers

__version__ = "0.1.0"

_HOME = {
    "Config": "config",
    "ConfigError": "config",
    "ConvNN2d": "layers",
    "ConvNNAttention": "attention",
    "HybridConvNN2d": "hybrid",
    "HybridConvNNAttention": "hybrid",
    "Neighborhood": "neighborhood",
    "OperatorConfig": "config",
    "SwapRule": "config",
    "apply_schedule": "schedule",
    "create_backbone": "backbones",
    "export_layers": "swap",
    "neighbor_aggregate": "functional",
    "neighbor_layers": "swap",
    "neighbors_of": "neighborhood",
    "swap_layers": "swap",
}

__all__ = [
    "Config",
    "ConfigError",
    "ConvNN2d",
    "ConvNNAttention",
    "HybridConvNN2d",
    "HybridConvNNAttention",
    "Neighborhood",
    "OperatorConfig",
    "SwapRule",
    "apply_schedule",
    "create_backbone",
    "export_layers",
    "neighbor_aggregate",
    "neighbor_layers",
    "neighbors_of",
    "swap_layers",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"convnn.{_HOME[name]}"), name)
    raise AttributeError(f"module 'convnn' has no attribute {name!r}")
