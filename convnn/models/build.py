"""From a configuration to a model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from convnn.config.schema import Config
from convnn.data.splits import Dataset
from convnn.errors import ConfigError
from convnn.models.backbones import create_backbone, draw_as_torch
from convnn.models.swap import SwapReport, swap_layers
from convnn.nn.attention import ConvNNAttention
from convnn.nn.hybrid import HybridConvNNAttention
from convnn.runtime.device import seed_everything


def build_model(config: Config, dataset: Dataset) -> tuple[nn.Module, SwapReport, int]:
    """Build the backbone from ``config.seed`` and swap its layers; return model, report and image side in pixels.

    Raises:
        ConfigError: if the parts do not fit together.
    """
    return build_network(config, len(dataset.classes), dataset.train.shape)


def build_network(config: Config, classes: int, shape: Sequence[int]) -> tuple[nn.Module, SwapReport, int]:
    """Do what ``build_model`` does, for a number of classes and images of a shape: channels, rows and columns."""
    channels, height, width = shape
    image_size = config.data.image_size or config.backbone.image_size
    if image_size is None and height != width:
        raise ConfigError(f"data={config.data.name} has {height}x{width} images; set data.image_size")
    image_size = image_size or height
    seed_everything(config.seed)
    model = create_backbone(config.backbone, classes, channels, image_size)
    report = swap_layers(model, config.swap, config.operator)
    if config.backbone.init == "torch" and config.swap.init == "fresh":
        for layer in model.modules():  # others have a start of their own
            if isinstance(layer, (ConvNNAttention, HybridConvNNAttention)):
                draw_as_torch(layer)
    return model, report, image_size
