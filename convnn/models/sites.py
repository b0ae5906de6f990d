"""Which layers of a model a rule claims.

A rule narrows step by step: the kind of layer, its name, its kernel, its stage, and then its place among what is left.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Any

from timm.layers.attention import Attention
from torch import nn

from convnn.config.schema import ATTENTION, CONV, SwapRule
from convnn.errors import ConfigError
from convnn.nn.sources import attention_classes

FOR_ATTENTION = "set operator=convnn_attention swap=all_attention to replace its attention"
_HEADS = ("pre_logits", "head", "head_dist", "fc", "classifier")


def find_sites(model: nn.Module, kind: str) -> dict[str, nn.Module]:
    """Return the layers of a kind that may be replaced, in forward order: all but the classifier head's."""
    wanted: Any = (nn.Conv2d, nn.Conv1d) if kind == CONV else (Attention, *attention_classes())
    inside = tuple(f"{name}." for name, m in model.named_modules() if name and is_operator(m))
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, wanted) and name.split(".")[0] not in _HEADS and not name.startswith(inside)
    }


def network_layers(model: nn.Module) -> list[str]:
    """Return the names of all layers that may be replaced, or were, in forward order: a network's depth."""
    found: list[str] = []
    sites = {name for kind in (CONV, ATTENTION) for name in find_sites(model, kind)}
    for name, module in model.named_modules():
        inside = bool(found) and name.startswith(f"{found[-1]}.")  # modules come before what lies in them
        if not inside and (name in sites or (is_operator(module) and name)):
            found.append(name)
    return found


def is_operator(module: nn.Module) -> bool:
    """Return whether a module took the place of a layer, or can."""
    return hasattr(type(module), "from_layer")


def site_stages(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """Return the stage of each named module: how many entries of timm's ``feature_info`` end before it."""
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    info = getattr(model, "feature_info", None) or []
    ends = []
    for entry in info:
        end = str(entry["module"])
        inside = [i for name, i in order.items() if name == end or name.startswith(end + ".")]
        if inside:
            ends.append(max(inside))
    return {name: sum(end < order[name] for end in ends) for name in names}


def select_sites(model: nn.Module, rule: SwapRule, kind: str, label: str) -> dict[str, nn.Module]:
    """Return the layers that a rule claims.

    Raises:
        ConfigError: if it claims none, or a depth lies outside the model.
    """
    sites = find_sites(model, kind)
    if not sites:
        way = f"; {FOR_ATTENTION}" if kind == CONV and find_sites(model, ATTENTION) else ""
        raise ConfigError(f"{label}: {type(model).__name__} has no {kind} layer that could be replaced{way}")
    names = [n for n in sites if fnmatch.fnmatch(n, rule.match or "")]
    if not names:
        raise ConfigError(f"{label}.match={rule.match} matches none of the {kind} layers: {some(sites)}")
    names = [n for n in names if not any(fnmatch.fnmatch(n, glob) for glob in rule.exclude)]
    if kind == CONV:
        names = [n for n in names if min(_kernel(sites[n])) >= rule.min_kernel]
    if rule.stages is not None:
        stages = site_stages(model, sites)
        absent = sorted(set(rule.stages) - set(stages.values()))
        if absent:
            known = ", ".join(map(str, sorted(set(stages.values()))))
            raise ConfigError(f"{label}.stages={rule.stages}: no {kind} layer in stage {absent[0]}; stages: {known}")
        names = [n for n in names if stages[n] in rule.stages]
    total = len(names)
    if rule.depths is not None:
        for depth in rule.depths:
            if not -total <= depth < total:
                raise ConfigError(f"{label}.depths={rule.depths}: {depth} is out of range, {total} layers match")
        wanted = {depth % total for depth in rule.depths}
        names = [n for i, n in enumerate(names) if i in wanted]
    for key in ("first", "last"):
        count = getattr(rule, key)
        if count is not None:
            if count > total:
                raise ConfigError(f"{label}.{key}={count} is out of range, {total} layers match")
            names = names[:count] if key == "first" else names[-count:]
    if rule.every is not None:
        names = names[:: rule.every]
    if rule.fraction is not None:
        low, high = (round(f * total) for f in rule.fraction)
        names = names[low:high]
    if not names:
        raise ConfigError(f"{label}: nothing is left of the {len(sites)} {kind} layers: {some(sites)}")
    return {n: sites[n] for n in names}


def patches_alone(model: nn.Module, names: Iterable[str]) -> str | None:
    """Say so if the only layer that was replaced is the patch embedding of a model that has attention."""
    names = list(names)
    inside = bool(names) and all("patch_embed" in name.split(".") for name in names)
    return f"only the patch embedding is replaced; {FOR_ATTENTION}" if inside and find_sites(model, ATTENTION) else None


def some(names: Iterable[str]) -> str:
    """Return names as text, of many the first."""
    names = list(names)
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def _kernel(module: nn.Module) -> tuple[int, ...]:
    assert isinstance(module, (nn.Conv2d, nn.Conv1d))
    return module.kernel_size
