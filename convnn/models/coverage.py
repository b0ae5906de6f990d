"""What of a backbone can be replaced, and whether the replacements compute what the layers did (docs/backbones.md)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import nn

from convnn.config.presets import operator_of
from convnn.config.schema import ATTENTION, CONV
from convnn.errors import ConfigError, first_line
from convnn.models.sites import find_sites, refused_sites
from convnn.models.swap import refusals, swap_layers

EVERYTHING = 100_000
"""More neighbours than any sequence has tokens."""
EXACT = {
    CONV: {"name": "convnn", "k": "kernel", "blend": 0.0},
    ATTENTION: {"name": "convnn_attention", "k": EVERYTHING, "k_policy": "clamp", "aggregation": "sum"},
}
"""The operator that is the layer it replaces, by kind."""
FEWER = {
    CONV: {"name": "convnn", "k": 3, "k_policy": "clamp", "blend": 0.5},
    ATTENTION: {"name": "convnn_attention", "k": 4, "k_policy": "clamp", "aggregation": "sum"},
}
"""An operator that mixes fewer neighbours than there are, by kind."""

_PROJECTIONS = {"qkv", "q", "kv", "qk", "to_qkv", "proj", "q_proj", "in_proj"}


@dataclass(frozen=True)
class Coverage:
    """Of one kind of layer in one model."""

    kind: str
    taken: tuple[str, ...]
    """Names of the layers that can be replaced."""
    refused: dict[str, str] = field(default_factory=dict)
    """Reasons for all others of the kind, by name."""

    @property
    def found(self) -> int:
        """How many layers of the kind there are."""
        return len(self.taken) + len(self.refused)


def coverage(model: nn.Module, kind: str) -> Coverage:
    """Return which convolutions, or which attention layers, of a model can be replaced with their weights.

    Attention that is not known is found by the names of classes; a model on torch's meta device will do.
    """
    operator = operator_of(EXACT[kind])
    with next(model.parameters()).device:  # replacements of what has no data need none
        reasons = {name: _reason(error, name) for name, error in refusals(model, operator, "transfer").items()}
    taken = tuple(name for name in find_sites(model, kind) if name not in reasons)
    if kind == ATTENTION:
        reasons |= refused_sites(model, kind)
        reasons |= _unknown_attention(model, (*taken, *reasons))
    return Coverage(kind, taken, reasons)


def _reason(error: ConfigError, name: str) -> str:
    text = first_line(error).removeprefix("swap.init=transfer: ").removeprefix(f"'{name}' ")
    return text.removesuffix("; exclude it (swap.exclude)")


def _unknown_attention(model: nn.Module, known: Sequence[str]) -> dict[str, str]:
    """Return why layers that are attention by name, and lie in no known one, cannot be replaced."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        outer = (*known, *found)
        inside = any(name == other or name.startswith(f"{other}.") for other in outer)
        if name and not inside and _named_attention(module):
            found[name] = f"{type(module).__name__}, which is not known"
    return found


def _named_attention(module: nn.Module) -> bool:
    """Return whether a class is named as attention over tokens, which gates of channels (SE, ECA, CBAM) are not."""
    name = type(module).__name__.lower()
    parts = {child for child, _ in module.named_children()}
    return ("attn" in name or "attention" in name) and bool(parts & _PROJECTIONS)


@torch.no_grad()
def stir(model: nn.Module) -> nn.Module:
    """Give weights that would hide a difference, such as scales that begin at zero, others; return the model."""
    for parameter in model.parameters():
        flat = parameter.detach().flatten()
        if flat.numel() and bool((flat - flat[0]).abs().max() < 1e-12):
            parameter.uniform_(0.5, 1.5).mul_(0.1 if bool(flat[0].abs() < 0.1) else 1.0)
    return model


@torch.no_grad()
def transfer_error(model: nn.Module, kind: str, names: Sequence[str], image: torch.Tensor) -> float:
    """Return the largest difference of logits after a swap at the exact end, as a share of the largest logit.

    Args:
        model: in evaluation mode; it is not changed.
        kind: of the layers.
        names: of the layers to replace.
        image: (B, C, h, w), of the model's precision.
    """
    wanted = model(image)
    swapped = _swapped(model, kind, names, EXACT[kind])
    return float((swapped(image) - wanted).abs().max() / wanted.abs().max())


@torch.no_grad()
def rounding(model: nn.Module, image: torch.Tensor) -> float:
    """Return how far the logits move, as a share of the largest, when an image changes by a 10^15th part of itself.

    Where that is much, a network with these weights magnifies rounding errors, those of a transfer as well.
    """
    wanted = model(image)
    noise = 1e-15 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0), dtype=image.dtype)
    return float((model(image * (1 + noise)) - wanted).abs().max() / wanted.abs().max())


def runs_with_fewer(model: nn.Module, kind: str, names: Sequence[str], image: torch.Tensor) -> bool:
    """Return whether a model with few neighbours per token gives finite logits, other ones, and gradients."""
    wanted = model(image).detach()
    swapped = _swapped(model, kind, names, FEWER[kind], init="fresh" if kind == CONV else "transfer")
    found = swapped(image)
    found.square().mean().backward()
    grads = [p.grad for p in swapped.parameters() if p.grad is not None]
    finite = bool(found.isfinite().all()) and all(bool(grad.isfinite().all()) for grad in grads)
    return finite and bool(grads) and not torch.equal(found, wanted)


def _swapped(
    model: nn.Module, kind: str, names: Sequence[str], operator: Mapping[str, Any], init: str = "transfer"
) -> nn.Module:
    swapped = copy.deepcopy(model)
    rest = [name for name in find_sites(swapped, kind) if name not in names]
    swap_layers(swapped, {"match": "*", "exclude": rest}, operator, init)
    return swapped


def families() -> dict[str, list[str]]:
    """Return timm's models by the module that defines them."""
    found = {module: timm.list_models(module=module) for module in timm.list_modules()}
    return {module: names for module, names in found.items() if names}
