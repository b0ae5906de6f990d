"""Replace layers of a model: plan -> check -> apply -> report."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from timm.layers.attention import Attention
from torch import nn

from convnn.config.checks import check_operator, check_rule
from convnn.config.keys import own_operator, typed, typed_rule
from convnn.config.schema import CONV, OperatorConfig, SwapConfig, SwapRule
from convnn.config.targets import resolve_target
from convnn.errors import ConfigError
from convnn.models.flops import Cost, count_operations, on_meta
from convnn.nn.base import NeighborLayer, Site
from convnn.text import aligned

_HEADS = ("pre_logits", "head", "head_dist", "fc", "classifier")


@dataclass(frozen=True)
class Replacement:
    """One row of the report."""

    name: str
    old: str
    new: str
    params_before: int
    params_after: int
    plain: nn.Module = field(repr=False, compare=False)
    """The layer that was replaced, without its data."""
    flops_before: int | None = None
    """Operations for one image, see ``convnn.models.flops``; None: not counted."""
    flops_after: int | None = None


@dataclass(frozen=True)
class SwapReport:
    """What became what."""

    rows: tuple[Replacement, ...]

    def with_costs(self, cost: Cost) -> SwapReport:
        """Return the report with what the layers cost, ``cost`` being that of the model with all of them watched."""
        rows = []
        for row in self.rows:
            before = count_operations(row.plain, torch.empty(cost.inputs[row.name], device="meta")).total
            rows.append(replace(row, flops_before=before, flops_after=cost.layers[row.name]))
        return SwapReport(tuple(rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        if not self.rows:
            return "no layer replaced (swap.match=null)\n"
        header = ["name", "from", "to", "params before", "after"]
        cells = [[r.name, r.old, r.new, f"{r.params_before:,}", f"{r.params_after:,}"] for r in self.rows]
        before, after = (sum(getattr(r, f"params_{w}") for r in self.rows) for w in ("before", "after"))
        cells.append([f"{len(self.rows)} layers", "", "", f"{before:,}", f"{after:,}"])
        if all(r.flops_before is not None for r in self.rows):
            header += ["MFLOPs before", "after", "ratio"]
            flops = [(r.flops_before or 0, r.flops_after or 0) for r in self.rows]
            flops.append((sum(b for b, _ in flops), sum(a for _, a in flops)))
            for row, (b, a) in zip(cells, flops, strict=True):
                row += [f"{b / 1e6:,.2f}", f"{a / 1e6:,.2f}", f"{a / b:.2f}" if b else ""]
        first, *lines = aligned(header, cells, right_from=3).split("\n")
        rule = "-" * len(first)
        return "\n".join([first, rule, *lines[:-1], rule, lines[-1]]) + "\n"


def find_sites(model: nn.Module, kind: str) -> dict[str, nn.Module]:
    """Return the layers of a kind that may be replaced, in forward order: all but the classifier head's."""
    wanted = nn.Conv2d if kind == CONV else Attention
    inside = tuple(f"{name}." for name, m in model.named_modules() if name and _is_operator(m))
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, wanted) and name.split(".")[0] not in _HEADS and not name.startswith(inside)
    }


def _is_operator(module: nn.Module) -> bool:
    return hasattr(type(module), "from_layer")


def site_stages(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """Return the stage of each named module: the first entry of timm's ``feature_info`` not before it."""
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    info = getattr(model, "feature_info", None) or []
    ends = []
    for entry in info:
        end = str(entry["module"])
        inside = [i for name, i in order.items() if name == end or name.startswith(end + ".")]
        if inside:
            ends.append(max(inside))
    return {name: sum(end < order[name] for end in ends) for name in names}


def _select_sites(model: nn.Module, rule: SwapRule, kind: str, label: str) -> dict[str, nn.Module]:
    """Return the layers that a rule claims.

    Raises:
        ConfigError: if it claims none, or a depth lies outside the model.
    """
    sites = find_sites(model, kind)
    if not sites:
        raise ConfigError(f"{label}: {type(model).__name__} has no {kind} layer that could be replaced")
    names = [n for n in sites if fnmatch.fnmatch(n, rule.match or "")]
    if not names:
        raise ConfigError(f"{label}.match={rule.match} matches none of the {kind} layers: {_some(sites)}")
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
        raise ConfigError(f"{label}: nothing is left of the {len(sites)} {kind} layers: {_some(sites)}")
    return {n: sites[n] for n in names}


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def _kernel(module: nn.Module) -> tuple[int, int]:
    assert isinstance(module, nn.Conv2d)
    return module.kernel_size[0], module.kernel_size[1]


Rules = SwapRule | SwapConfig | Mapping[str, Any] | Iterable[SwapRule | Mapping[str, Any]]


def _named_rules(rules: Rules, operator: OperatorConfig) -> dict[str, SwapRule]:
    if isinstance(rules, SwapConfig):
        return {f"swap.rules.{n}" if rules.rules else n: rule for n, rule in rules.effective_rules().items()}
    if isinstance(rules, (SwapRule, Mapping)):
        rules = [rules]
    out = {}
    for i, rule in enumerate(rules):
        label = f"rules[{i}]"
        out[label] = rule if isinstance(rule, SwapRule) else typed_rule(rule, operator, label)
    return out


def swap_layers(
    model: nn.Module,
    rules: Rules,
    operator: OperatorConfig | Mapping[str, Any] | None = None,
    init: str | None = None,
) -> SwapReport:
    """Replace layers of ``model`` in place.

    Everything is planned and built before anything changes, so that an error leaves the model as it was.

    Args:
        model: any model; stages and token grids are read from timm's attributes where they exist.
        rules: one rule or several, as ``SwapRule``, mappings of its fields, or a ``SwapConfig``.
        operator: what to put in, as ``OperatorConfig`` or a mapping of its fields.
        init: ``fresh`` or ``transfer``; default: of the SwapConfig, else ``fresh``.

    Returns:
        One row per replaced layer.

    Raises:
        ConfigError: if a rule matches nothing, two rules claim one layer, or a layer cannot be replaced.
    """
    if operator is None or isinstance(operator, Mapping):
        operator = typed(OperatorConfig, operator or {}, "operator.")
    if init is None:
        init = rules.init if isinstance(rules, SwapConfig) else "fresh"
    if init not in ("fresh", "transfer"):
        raise ConfigError(f"swap.init={init} is not one of fresh, transfer")

    claims: dict[str, tuple[str, nn.Module, OperatorConfig]] = {}
    for label, rule in _named_rules(rules, operator).items():
        check_rule(rule, label)
        own = own_operator(rule, operator, label)
        check_operator(own, f"{label}.operator" if rule.operator else "operator")
        kind = own.kind if rule.kind == "auto" else rule.kind
        if kind != own.kind:
            raise ConfigError(
                f"operator={own.name} replaces {own.kind} layers, but {label}.kind={kind}; "
                "choose another operator or another swap policy"
            )
        for name, layer in _select_sites(model, rule, kind, label).items():
            if name in claims:
                raise ConfigError(f"'{name}' is claimed by both {claims[name][0]} and {label}; exclude it from one")
            claims[name] = (label, layer, own)

    new_layers = {}
    for name, (_, layer, own) in claims.items():
        build = getattr(resolve_target(own.target, "operator.target"), "from_layer", None)
        if not callable(build):
            raise ConfigError(f"operator.target={own.target} is no operator: it has no from_layer")
        new_layers[name] = build(layer, own, init, _site(model, name)).train(layer.training)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    rows = []
    for name in sorted(new_layers, key=order.__getitem__):
        old, new = claims[name][1], new_layers[name]
        _replace(model, old, new)
        sizes = count_parameters(old), count_parameters(new)
        rows.append(Replacement(name, _describe(old), _describe(new), *sizes, on_meta(old)))
    return SwapReport(tuple(rows))


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` is registered; a shared layer stays shared."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            model.set_submodule(name, new)


def _site(model: nn.Module, name: str) -> Site:
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    prefix = getattr(model, "num_prefix_tokens", 0)
    return Site(name, prefix, (int(grid[0]), int(grid[1])) if grid else None)


def count_parameters(module: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _describe(module: nn.Module) -> str:
    if isinstance(module, nn.Conv2d):
        text = f"Conv2d {module.in_channels}->{module.out_channels} {'x'.join(map(str, module.kernel_size))}"
        if max(_pair_of(module.stride)) > 1:
            text += f" s{module.stride[0]}"
        return text + (f" g{module.groups}" if module.groups > 1 else "")
    if isinstance(module, Attention):
        return f"Attention {module.qkv.in_features} h{module.num_heads}"
    inner = [m for m in module.modules() if isinstance(m, NeighborLayer)]
    text = type(module).__name__
    if inner:
        layer = inner[0]
        text += f" k={layer.k} blend={layer.blend:g}"
        if inner[0] is not module:
            text += f" ({_share(layer)} channels from neighbours)"
    return text


def _share(layer: nn.Module) -> int:
    out = getattr(layer, "out_channels", None)
    return out if out is not None else layer.proj.out_features  # type: ignore[union-attr, return-value]


def _pair_of(value: Any) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


def export_layers(model: nn.Module) -> list[str]:
    """Replace every layer that stands at an end of the spectrum by the plain layer that it equals, in place.

    The result is a plain timm model: its ``state_dict`` loads into ``timm.create_model`` of the same name.

    Returns:
        The names of the layers replaced.

    Raises:
        ConfigError: naming a layer that equals no plain one; the model is then as it was.
    """
    names = [name for name, module in model.named_modules() if _is_operator(module)]
    names = [n for n in names if not any(n.startswith(f"{outer}.") for outer in names)]
    plain = {}
    for name in names:
        layer = model.get_submodule(name)
        to_layer = getattr(layer, "to_layer", None)
        try:
            if to_layer is None:
                raise ValueError(f"{type(layer).__name__} has no plain equivalent")
            plain[name] = to_layer()
        except ValueError as error:
            raise ConfigError(f"'{name}' cannot be exported: {error}") from error
    for name, layer in plain.items():
        _replace(model, model.get_submodule(name), layer)
    return names


def neighbor_layers(model: nn.Module) -> dict[str, NeighborLayer]:
    """Return the layers of the model that lie on the spectrum, by name, in forward order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, NeighborLayer)}
