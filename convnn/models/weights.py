"""Weights of a file in a network: read without running code, renamed and resized to fit, and checked."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models import clean_state_dict
from timm.models import load_state_dict as load_safetensors
from torch import Tensor, nn

from convnn.config.schema import BackboneConfig
from convnn.errors import ConfigError, WeightsError, first_line, load_failure
from convnn.models.weight_names import State, timm_names
from convnn.runtime.files import sha256_of

_WRAPPERS = ("state_dict_ema", "model_ema", "ema", "state_dict", "model")
"""Where files of training programs have the weights, averaged ones first."""
_PREFIXES = ("timm_model.", "model.", "backbone.", "net.")
"""What training programs put before all names; timm removes those of torch's own wrappers."""
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")
_FILTERS = ("checkpoint_filter_fn", "_filter_fn", "_filter_torchvision_pretrained")
"""What timm calls the function that makes a model's older files fit, in the model's module."""


def load_checkpoint_file(model: nn.Module, config: BackboneConfig, in_chans: int) -> None:
    """Load ``config.checkpoint`` into a timm model that was just built.

    Position and patch embeddings are resized as timm does it, and a first convolution is adapted to ``in_chans``. A
    classifier for other classes stays as it is; ``model.pretrained_cfg["num_classes"]`` then is None.

    Raises:
        WeightsError: if the file is gone, or is another one than ``config.checkpoint_sha256`` says.
        ConfigError: if it cannot be read safely, or has other weights than the model.
    """
    put_weights(model, read_weights(Path(config.checkpoint or ""), config.checkpoint_sha256), config, in_chans)


def put_weights(model: nn.Module, state: State, config: BackboneConfig, in_chans: int, from_chans: int = 3) -> None:
    """Load what ``read_weights`` returned into a model, as ``load_checkpoint_file`` says.

    Args:
        model: whose first layer may be replaced already.
        state: changed in place.
        config: of the backbone, for messages.
        in_chans: channels of the model's images.
        from_chans: of the images that the weights were trained on.

    Raises:
        ConfigError: if they are other weights than the model's.
    """
    said = f"backbone.checkpoint={config.checkpoint}"
    settings: dict[str, Any] = dict(getattr(model, "pretrained_cfg", None) or {})
    heads = _heads(model)
    named = settings.get("first_conv") or ()
    first = tuple(f"{name}." for name in ((named,) if isinstance(named, str) else named))
    try:
        state, whose = timm_names(state, heads[0] if heads else "head")
        state = _as_timm_does(model, state)
        _adapt_first(state, model, first, from_chans, in_chans)
    except Exception as error:  # whatever comes of weights of another network
        raise ConfigError(f"{said} is not of {config.name}: {first_line(error)}") from error
    anew = _without_other_heads(state, model, heads)
    misfit = _misfit(state, model, heads)
    if misfit:
        names = "" if whose == "timm" else f", by the names of {whose},"
        way = _other_channels(state, model, first, from_chans, in_chans)
        raise ConfigError(f"{said} does not fit {config.name}: it{names} {misfit}{way}")
    model.load_state_dict(state, strict=False)
    settings["num_classes"] = None if anew else getattr(model, "num_classes", None)
    model.pretrained_cfg = settings  # type: ignore[assignment]


def _heads(model: nn.Module) -> tuple[str, ...]:
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return (named,) if isinstance(named, str) else tuple(named)


def head_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Return what the names of the classifiers' weights begin with."""
    return tuple(f"{head}." for head in _heads(model))


def read_weights(path: Path, sha256: str | None = None) -> State:
    """Read the weights in a file, without what training programs wrap them in. Nothing in it is executed.

    Raises:
        WeightsError: if the file is gone, or has another SHA-256.
        ConfigError: if it is damaged, hostile or holds no weights.
    """
    said = f"backbone.checkpoint={path}"
    if not path.is_file():
        raise WeightsError(f"{said}: no such file")
    if path.suffix.lower() not in _SUFFIXES:
        raise ConfigError(f"{said}: a file of weights ends in {', '.join(_SUFFIXES)}")
    try:
        found = sha256_of(path)
        if sha256 not in (None, found):
            raise WeightsError(
                f"{said} is another file than the configuration says (SHA-256 {found[:12]}..., not {str(sha256)[:12]}"
                "...); put that back, or leave out backbone.checkpoint_sha256"
            )
        if path.suffix.lower() == ".safetensors":
            content: Any = load_safetensors(str(path))
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # plain values, in many files beside weights
                content = torch.load(path, map_location="cpu", weights_only=True)
    except ConfigError:
        raise
    except Exception as error:  # whatever torch and safetensors make of a damaged or hostile file
        raise ConfigError(f"{said} cannot be read: {load_failure(error)}") from error
    state = _unwrapped(content)
    if not state:
        raise ConfigError(f"{said} holds no weights: neither tensors by name, nor {', '.join(_WRAPPERS)} with such")
    return state


def _unwrapped(content: Any) -> State:
    """Return the tensors by name in what a file holds; empty if there are none."""
    for name in _WRAPPERS:
        inner = content.get(name) if isinstance(content, Mapping) else None
        if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values()):
            content = inner
            break
    if not isinstance(content, Mapping):
        return {}
    state = clean_state_dict({str(name): value for name, value in content.items() if isinstance(value, Tensor)})
    state = {name: value for name, value in state.items() if not name.endswith("_extra_state")}
    prefix = next((p for p in _PREFIXES if state and all(name.startswith(p) for name in state)), "")
    return {name[len(prefix) :]: value for name, value in state.items()}


def _as_timm_does(model: nn.Module, state: State) -> State:
    """Return weights as timm makes files of this model fit: older names, embeddings of another size."""
    module = sys.modules[type(model).__module__]
    fit = next((getattr(module, name) for name in _FILTERS if hasattr(module, name)), None)
    if fit is None:
        return state
    try:
        found: State = fit(state, model)
    except TypeError:  # some take the weights alone
        found = fit(state)
    return found


def _adapt_first(state: State, model: nn.Module, first: tuple[str, ...], base: int, in_chans: int) -> None:
    """Adapt the first convolutions, replaced ones too, to images of other channels.

    Only weights whose axis 1 is that of the images' channels, and which differ in nothing else.
    """
    for name, own in model.state_dict().items():
        weight = state.get(name)
        if weight is None or not name.startswith(first) or weight.ndim < 2 or weight.ndim != own.ndim:
            continue
        if (weight.shape[1], own.shape[1]) == (base, in_chans) and base != in_chans:
            state[name] = adapt_channels(weight, in_chans)


def adapt_channels(weight: Tensor, in_chans: int) -> Tensor:
    """Adapt a weight to images of other channels by timm's rule (``adapt_input_conv``), whatever axes follow.

    To one channel the sum; else the channels over and over, as many as are needed, times ``C / in_chans``. From one to
    several, to one, and to a multiple of C, images of equal channels give what they gave.

    Args:
        weight: (O, C, ...).
        in_chans: channels of the images.

    Returns:
        (O, in_chans, ...) of the same type, summed in float32 at least.
    """
    base, wide = weight.shape[1], weight.to(torch.promote_types(weight.dtype, torch.float32))
    if in_chans == 1:
        return wide.sum(1, keepdim=True).to(weight.dtype)
    repeated = torch.cat([wide] * math.ceil(in_chans / base), dim=1)[:, :in_chans]
    return (repeated * (base / in_chans)).to(weight.dtype)


def _other_channels(state: State, model: nn.Module, first: tuple[str, ...], base: int, in_chans: int) -> str:
    """Return the way out where a first layer does not fit because the images have other channels, else nothing."""
    own = model.state_dict()
    shapes = [name for name in own if name.startswith(first) and name in state and state[name].shape != own[name].shape]
    if base == in_chans or not shapes:
        return ""
    kinds = [f"{count} channel{'s' if count > 1 else ''}" for count in (base, in_chans)]
    return (
        f"; {shapes[0]} stems from images of {kinds[0]} and cannot be adapted to {kinds[1]}: choose data of "
        f"{kinds[0]}, or leave out backbone.checkpoint"
    )


def _without_other_heads(state: State, model: nn.Module, heads: tuple[str, ...]) -> list[str]:
    """Take classifiers that do not fit out of a state; return their names."""
    own, anew = model.state_dict(), []
    for head in heads:
        names = [name for name in own if name.startswith(f"{head}.")]
        if any(name not in state or state[name].shape != own[name].shape for name in names):
            anew.append(head)
            for name in [name for name in state if name.startswith(f"{head}.")]:
                del state[name]
    return anew


def _misfit(state: State, model: nn.Module, heads: tuple[str, ...]) -> str | None:
    """Return in what weights differ from a model's, its classifiers apart; None: they fit."""
    own = {name: value for name, value in model.state_dict().items() if not name.endswith("_extra_state")}
    counted = tuple(f"{head}." for head in heads)
    apart = [name for name in {**own, **state} if name.startswith(counted) or name.endswith("num_batches_tracked")]
    missing = [name for name in own if name not in state and name not in apart]
    unknown = [name for name in state if name not in own and name not in apart]
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
    parts = []
    for label, names in (("lacks", missing), ("has unknown", unknown), ("has another shape of", shapes)):
        if names:
            parts.append(f"{label} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}")
    if 2 * len(missing) > len(own):
        parts.append("set backbone.name to the network that it is of")
    return "; ".join(parts) or None
