"""Backbones: timm's models, with a stem for small images."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import timm
import torch
from timm.layers import build_sincos2d_pos_embed
from torch import nn

from convnn.config.keys import nearest
from convnn.config.schema import SMALL_IMAGE, BackboneConfig
from convnn.errors import ConfigError, WeightsError, load_failure
from convnn.models.download import answering
from convnn.models.weights import load_checkpoint_file


def create_backbone(config: BackboneConfig, num_classes: int, in_chans: int = 3, image_size: int = 32) -> nn.Module:
    """Build a timm model for square images of ``image_size`` pixels.

    Raises:
        ConfigError: for an unknown name, arguments the model does not take, a patch that does not divide the
            image, or pretrained weights that cannot be had.
    """
    if config.module:
        try:
            importlib.import_module(config.module)
        except ImportError as error:
            raise ConfigError(f"backbone.module={config.module} cannot be imported: {error}") from error
    _check_name(config.name)
    _check_kwargs(config.kwargs, num_classes, in_chans)
    loads = "pretrained" if config.pretrained else "checkpoint" if config.checkpoint else "kwargs.checkpoint_path"
    if config.init == "torch" and (loads != "kwargs.checkpoint_path" or "checkpoint_path" in config.kwargs):
        raise ConfigError(f"backbone.init=torch would draw anew what backbone.{loads} loads; set it to timm")
    model = _created(config, timm_kwargs(config, num_classes, in_chans, image_size))
    if config.checkpoint:
        load_checkpoint_file(model, config, in_chans)
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch is not None and any(image_size % side for side in _sides(patch)):
        raise ConfigError(
            f"the {_sides(patch)[0]}-pixel patches of {config.name} do not divide the image side {image_size}; "
            "set backbone.patch_size or data.image_size"
        )
    if has_small_stem(config, image_size):
        _small_stem(model, config.name, in_chans)
    if config.pos_embed != "learned":
        _fixed_positions(model, config.name, config.pos_embed)
    if config.init == "torch":
        draw_as_torch(model)
    if config.norm_eps is not None:
        norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
        if not norms:
            raise ConfigError(f"backbone.norm_eps={config.norm_eps}: {config.name} has no LayerNorm; leave it at null")
        for module in norms:
            module.eps = config.norm_eps
    return model


def _created(config: BackboneConfig, kwargs: dict[str, Any]) -> nn.Module:
    """Return what timm builds, with its pretrained weights if they are asked for.

    Raises:
        ConfigError: if it cannot be built; ``WeightsError`` if that is for want of weights.
    """
    try:
        with answering(config.name, kwargs) if config.pretrained else nullcontext():
            return timm.create_model(config.name, pretrained=config.pretrained, **kwargs)
    except Exception as error:  # whatever timm's models make of the arguments
        if config.pretrained and not isinstance(error, (TypeError, AssertionError, ZeroDivisionError)):
            kind = "" if isinstance(error, WeightsError) else f"{type(error).__name__}: "
            raise WeightsError(
                f"backbone.pretrained=true: the weights of {config.name} could not be loaded "
                f"({kind}{load_failure(error)}); give a file of them with backbone.checkpoint=FILE, or connect"
            ) from error
        kind_of = WeightsError if isinstance(error, FileNotFoundError) else ConfigError
        raise kind_of(f"backbone.name={config.name} cannot be built with {kwargs}: {load_failure(error)}") from error


def has_small_stem(config: BackboneConfig, image_size: int) -> bool:
    """Return whether the network gets the small stem."""
    return config.stem == "small" or (config.stem == "auto" and image_size < SMALL_IMAGE)


def timm_kwargs(config: BackboneConfig, num_classes: int, in_chans: int, image_size: int) -> dict[str, Any]:
    """Return the keyword arguments of ``timm.create_model`` that a configuration means."""
    kwargs = {"num_classes": num_classes, "in_chans": in_chans, "drop_rate": config.drop_rate, **config.kwargs}
    if config.drop_path_rate is not None:
        kwargs["drop_path_rate"] = config.drop_path_rate
    if config.patch_size is not None:
        kwargs["patch_size"] = config.patch_size
    if _takes_image_size(config.name):
        kwargs.setdefault("img_size", image_size)
    return kwargs


def _check_name(name: str) -> None:
    """Raise ConfigError unless timm has a model of this name, and its tag of pretrained weights if the name has one."""
    if ":" in name:
        known = name.partition(":")[2].rpartition("/")[2]
        way = f"set backbone.name={known} backbone.pretrained=true"
        if not timm.is_model(known.partition(".")[0]):
            way = "set backbone.name to the architecture and backbone.checkpoint=FILE to its weights"
        raise ConfigError(f"backbone.name={name} is a place of weights, not a name in timm's registry; {way}")
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise ConfigError(f"backbone.name={name} is not a timm model{nearest(name, timm.list_models())}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
        hint = nearest(tag, tags, f"{architecture}.") if tags else f"; set backbone.name={architecture}"
        raise ConfigError(f"backbone.name={name}: {architecture} has no pretrained weights '{tag}'{hint}") from error


def _check_kwargs(kwargs: Mapping[str, Any], num_classes: int, in_chans: int) -> None:
    """Raise ConfigError for arguments of ``timm.create_model`` that contradict what the data or another key says."""
    fixed = (
        ("num_classes", num_classes, f"the data has {num_classes} classes; leave it out"),
        ("in_chans", in_chans, f"the images have {in_chans} channels; leave it out"),
        ("features_only", False, "such models return feature maps, not logits to train on; leave it out"),
        ("pretrained", None, "set backbone.pretrained instead"),
    )
    for name, value, why in fixed:
        if kwargs.get(name, value) != value:
            raise ConfigError(f"backbone.kwargs.{name}={kwargs[name]}: {why}")


def _sides(patch: int | tuple[int, ...]) -> tuple[int, ...]:
    return (patch,) if isinstance(patch, int) else tuple(patch)


def _takes_image_size(name: str) -> bool:
    cfg = timm.get_pretrained_cfg(name)
    return bool(cfg and cfg.fixed_input_size)


def _small_stem(model: nn.Module, name: str, in_chans: int) -> None:
    """Replace the 7x7 stride-2 convolution and the max-pooling of a ResNet by one 3x3 stride-1 convolution."""
    conv = getattr(model, "conv1", None)
    if not isinstance(conv, nn.Conv2d) or not hasattr(model, "maxpool"):
        raise ConfigError(f"backbone.stem=small fits ResNets with a single first convolution, not {name}")
    stem = nn.Conv2d(in_chans, conv.out_channels, 3, 1, 1, bias=conv.bias is not None)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    model.conv1, model.maxpool = stem, nn.Identity()


def _fixed_positions(model: nn.Module, name: str, kind: str) -> None:
    """Replace learned positions by fixed sine-cosine ones, of row and column or of the place in the sequence."""
    old = getattr(model, "pos_embed", None)
    if not isinstance(old, nn.Parameter) or not hasattr(model, "patch_embed"):
        raise ConfigError(f"backbone.pos_embed={kind} fits ViTs with learned positions, not {name}")
    grid = getattr(model.patch_embed, "grid_size", None)
    if old.ndim != 3 or grid is None or old.shape[2] % 4:
        raise ConfigError(
            f"backbone.pos_embed={kind} fits (1, tokens, a multiple of 4) positions, not {tuple(old.shape)} of {name}"
        )
    _, tokens, dim = old.shape
    if kind == "sincos1d":
        table = sequence_positions(tokens, dim)
    else:
        table = build_sincos2d_pos_embed(list(grid), dim=dim)
        table = torch.cat([torch.zeros(tokens - len(table), dim), table])
    model.pos_embed = nn.Parameter(table.unsqueeze(0).to(old.dtype), requires_grad=False)


def sequence_positions(tokens: int, dim: int) -> torch.Tensor:
    """Return sine-cosine positions in a sequence, (tokens, dim): sines in even channels, cosines in odd ones.

    Channels 2i and 2i + 1 turn by 10000^(-2i / dim) radians a token (arXiv 1706.03762, section 3.5).
    """
    angle = torch.arange(tokens)[:, None] * 10000 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).float()


@torch.no_grad()
def draw_as_torch(model: nn.Module) -> None:
    """Draw linear layers and convolutions anew as torch does, and a CLS token from the standard normal distribution."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.reset_parameters()
    cls_token = getattr(model, "cls_token", None)
    if isinstance(cls_token, nn.Parameter):
        cls_token.normal_()
