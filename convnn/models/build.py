"""From a configuration to a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

from torch import nn

from convnn.config.identity import loads_weights
from convnn.config.schema import BackboneConfig, Config
from convnn.data.splits import Dataset
from convnn.errors import ConfigError
from convnn.models.backbones import create_backbone, draw_as_torch, has_small_stem
from convnn.models.run_weights import run_weights
from convnn.models.swap import SwapReport, count_parameters, swap_layers
from convnn.models.tokens import set_configured_grid
from convnn.nn.hybrid import HybridConvNNAttention
from convnn.nn.neighbor_attention import NeighborAttention
from convnn.runtime.device import seed_everything


def build_model(config: Config, dataset: Dataset, *, weights: bool = True) -> tuple[nn.Module, SwapReport, int]:
    """Build the backbone from ``config.seed`` and swap its layers; return model, report and image side in pixels.

    Args:
        config: of the run.
        dataset: tells the classes and the size of the images.
        weights: load those that the backbone begins from; without them the network is one for other weights of a run.

    Raises:
        ConfigError: if the parts do not fit together; ``WeightsError`` if that is for want of weights alone.
    """
    names = dataset.classes
    return build_network(config, len(names), dataset.train.shape, weights=weights, names=names)


def build_network(
    config: Config, classes: int, shape: Sequence[int], *, weights: bool = True, names: Sequence[str] = ()
) -> tuple[nn.Module, SwapReport, int]:
    """Do what ``build_model`` does, for a number of classes and images of a shape: channels, rows and columns.

    ``names`` of the classes tell whether they are those of a run whose weights are loaded; without, their number does.
    """
    channels, height, width = shape
    image_size = config.data.image_size or config.backbone.image_size
    if image_size is None and height != width:
        raise ConfigError(f"data={config.data.name} has {height}x{width} images; set data.image_size")
    image_size = image_size or height
    seed_everything(config.seed)
    begun = run_weights(config.backbone) if weights else None
    backbone = config.backbone if weights and begun is None else without_weights(config.backbone)
    model = create_backbone(backbone, classes, channels, image_size)
    if begun is not None and not begun.swapped:
        begun.put(model, config.backbone, channels, names)
    init = config.swap.init
    if init == "auto" and not loads_weights(asdict(config.backbone)):
        init = "fresh"
    report = swap_layers(model, config.swap, config.operator, init)
    if len(report):
        set_configured_grid(model, config.backbone)
    if config.backbone.init == "torch" and init == "fresh":
        for layer in model.modules():  # others have a start of their own
            if isinstance(layer, (NeighborAttention, HybridConvNNAttention)):
                draw_as_torch(layer)
    if begun is not None and begun.swapped:
        begun.check(model, config)
        begun.put(model, config.backbone, channels, names)
        report = replace(report, rows=tuple(replace(row, init="transfer") for row in report.rows))
    return model, report, image_size


def without_weights(backbone: BackboneConfig) -> BackboneConfig:
    """Return a backbone that loads nothing: all its weights will come from a checkpoint of the run."""
    kwargs = {key: value for key, value in backbone.kwargs.items() if key != "checkpoint_path"}
    return replace(backbone, pretrained=False, checkpoint=None, checkpoint_sha256=None, kwargs=kwargs)


def kept_weights(config: Config, model: nn.Module, report: SwapReport, image_size: int) -> tuple[str, bool] | None:
    """Say how many of the backbone's weights stem from the file that it loaded, and whether those are the most.

    None if it loaded none. The classifier stems from the file if it has as many classes there.
    """
    if not loads_weights(asdict(config.backbone)):
        return None
    total = count_parameters(model) + sum(row.params_before - row.params_after for row in report.rows)
    anew: dict[str, int] = {row.name: row.params_before for row in report.rows if row.init == "fresh"}
    replaced = {row.name: row.params_before for row in report.rows}
    own = getattr(model, "pretrained_cfg", None) or {}
    named = config.backbone.pretrained or config.backbone.checkpoint
    if named and own.get("num_classes") != getattr(model, "num_classes", None):
        head = own.get("classifier") or ()
        for name in (head,) if isinstance(head, str) else head:
            anew[name] = count_parameters(model.get_submodule(name))
    if has_small_stem(config.backbone, image_size) and not own.get("of_run"):
        anew["conv1"] = replaced.get("conv1", count_parameters(model.get_submodule("conv1")))
    kept = total - sum(anew.values())
    text = f"{kept:,} of {total:,} weights stem from the file"
    if anew:
        names = ", ".join(list(anew)[:3]) + (f" and {len(anew) - 3} more" if len(anew) > 3 else "")
        text += f"; begin anew: {names}"
    return text, 2 * kept >= total
