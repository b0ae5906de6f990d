"""What plain timm makes of a model without operators: the call that builds it, and in what it differs all the same."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn

from convnn.config.schema import BackboneConfig
from convnn.models.backbones import timm_kwargs
from convnn.models.inspect import evaluating


def timm_description(
    model: nn.Module, config: BackboneConfig, num_classes: int, in_chans: int, image_size: int
) -> dict[str, Any]:
    """Return how plain timm builds a model that ``export_layers`` has made plain.

    Returns:
        ``model`` and ``kwargs`` of ``timm.create_model``; ``differs``: what its model has otherwise, each with the
        ``module``'s name, what ``timm`` has there and what it should be (``here``); empty: the state loads strictly,
        and the logits are the same. ``module``: what to import first, for models from outside timm.
    """
    kwargs = timm_kwargs(config, num_classes, in_chans, image_size)
    plain = timm.create_model(config.name, pretrained=False, **kwargs)
    differs = _differences(plain, model)
    if not differs:
        plain.load_state_dict(model.state_dict())
        if not _same_logits(plain, model, torch.randn(2, in_chans, image_size, image_size)):
            differs = [{"module": "", "timm": "other logits with the same weights", "here": type(model).__name__}]
    found = {"model": config.name, "kwargs": kwargs, "differs": differs}
    return found | ({"module": config.module} if config.module else {})


def _differences(plain: nn.Module, model: nn.Module) -> list[dict[str, str]]:
    """Return the outermost modules that are not alike in the two."""
    theirs, ours = dict(plain.named_modules()), dict(model.named_modules())
    names: list[str] = []
    for name in {**theirs, **ours}:
        inside = any(name.startswith(f"{outer}.") for outer in names)
        if not inside and _settings(theirs.get(name)) != _settings(ours.get(name)):
            names.append(name)
    return [{"module": n, "timm": _line(theirs.get(n)), "here": _line(ours.get(n))} for n in names]


def _settings(module: nn.Module | None) -> Any:
    """Return what a module is, apart from its weights and the modules in it: kind, attributes, shapes of tensors."""
    if module is None:
        return None
    plain = {n: v for n, v in vars(module).items() if n != "training" and n[0] != "_" and _is_plain(v)}
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return type(module), plain, {name: tensor.shape for name, tensor in tensors}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _line(module: nn.Module | None) -> str:
    return "nothing" if module is None else " ".join(repr(module).split())


def _same_logits(a: nn.Module, b: nn.Module, images: torch.Tensor) -> bool:
    with evaluating(a), evaluating(b):
        return torch.allclose(a(images), b(images), rtol=1e-4, atol=1e-5)
