"""Which layers of a model a rule claims.

A rule narrows step by step: the kind of layer, its name, its kernel, its stage, and then its place among what is left.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping

from torch import nn

from convnn.config.schema import ATTENTION, CONV, SwapRule
from convnn.errors import ConfigError
from convnn.nn.adapters.registry import is_attention, refusal_of

FOR_ATTENTION = "set operator=convnn_attention swap=all_attention to replace its attention"
_HEADS = ("pre_logits", "head", "head_dist", "fc", "classifier")


def find_sites(model: nn.Module, kind: str) -> dict[str, nn.Module]:
    """Return the layers of a kind that may be replaced, in forward order: all but the classifier head's."""
    wanted = is_convolution if kind == CONV else is_attention
    inside = tuple(f"{name}." for name, m in model.named_modules() if name and is_operator(m))
    return {
        name: module
        for name, module in model.named_modules()
        if wanted(module) and name.split(".")[0] not in _HEADS and not name.startswith(inside)
    }


def refused_sites(model: nn.Module, kind: str, globs: Iterable[str] = ("*",)) -> dict[str, str]:
    """Return what is called attention but cannot be replaced, by name, each with its class and the reason."""
    if kind != ATTENTION:
        return {}
    reasons = {name: refusal_of(m) for name, m in model.named_modules() if name.split(".")[0] not in _HEADS}
    names = [n for n, why in reasons.items() if why and any(fnmatch.fnmatch(n, glob) for glob in globs)]
    return {n: f"{type(model.get_submodule(n)).__name__}, which {reasons[n]}" for n in names}


def told(refused: Mapping[str, str]) -> str:
    """Return what was refused as text, all layers of one reason together."""
    by: dict[str, list[str]] = {}
    for name, what in refused.items():
        by.setdefault(what, []).append(name)
    return "; ".join(f"{some(names)} ({what})" for what, names in by.items())


def is_convolution(module: nn.Module) -> bool:
    """Return whether a module is a convolution that may be replaced, as far as its kind goes."""
    return isinstance(module, (nn.Conv2d, nn.Conv1d))


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
        refused = told(refused_sites(model, kind))
        why = f": {refused}" if refused else ""
        raise ConfigError(f"{label}: {type(model).__name__} has no {kind} layer that could be replaced{why}{way}")
    names = [n for n in sites if fnmatch.fnmatch(n, rule.match or "")]
    if not names:
        refused = told(refused_sites(model, kind, [rule.match or ""]))
        why = f"{refused}; others are" if refused else f"matches none of the {kind} layers:"
        raise ConfigError(f"{label}.match={rule.match} {why} {some(sites)}")
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
