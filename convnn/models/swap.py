"""Replace layers of a model: plan -> check -> apply -> report."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from timm.layers.attention import Attention
from torch import nn

from convnn.config.checks import check_kind, check_operator, check_rule
from convnn.config.identity import is_own
from convnn.config.keys import own_operator, typed_rule
from convnn.config.presets import operator_of
from convnn.config.schema import ATTENTION, CONV, OperatorConfig, SwapConfig, SwapRule
from convnn.config.targets import resolve_target
from convnn.errors import ConfigError
from convnn.models.flops import Cost, count_operations, on_meta
from convnn.models.kept import check_called, check_replaceable, like
from convnn.models.memory import Memory
from convnn.models.sites import FOR_ATTENTION, find_sites, is_operator, refused_sites, select_sites, some, told
from convnn.models.tokens import forget_token_grids, site_of
from convnn.nn.adapters.layer import AdaptedAttention
from convnn.nn.adapters.registry import stand_in
from convnn.nn.attention import ConvNNAttention
from convnn.nn.base import NeighborLayer, Site, TokenGrid
from convnn.nn.convolution import plain_convolution, with_taps
from convnn.ops.settings import check_choice
from convnn.text import aligned


@dataclass(frozen=True)
class Replacement:
    """One replaced layer: a row of the report."""

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
    init: str = "fresh"
    """``transfer`` if it took over the weights of the layer."""
    dropped: str = ""
    """What computed the layer's weight and is no more, such as a weight_norm: what it came to is a plain weight now."""


@dataclass(frozen=True)
class SwapReport:
    """The replaced layers in forward order; ``str(report)`` is a table."""

    rows: tuple[Replacement, ...]
    left: dict[str, str] = field(default_factory=dict)
    """Attention that the rules mean, but that cannot be replaced: class and reason by name."""
    memory: Memory | None = None
    """Of a training step; None: not counted."""

    def with_costs(self, cost: Cost) -> SwapReport:
        """Return the report with operations of each layer, from a count of the model that watched all of them."""
        rows = []
        for row in self.rows:
            before = count_operations(row.plain, cost.calls[row.name]).total
            rows.append(replace(row, flops_before=before, flops_after=cost.layers[row.name]))
        return replace(self, rows=tuple(rows))

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
        left = [f"left as they are: {told(self.left)}"] if self.left else []
        memory = [] if self.memory is None else [str(self.memory)]
        return "\n".join([first, rule, *lines[:-1], rule, lines[-1], *self._dropped(), *left, *memory]) + "\n"

    def _dropped(self) -> list[str]:
        """Return a line for each thing that layers had and their replacements lack."""
        names: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            if row.dropped:
                names.setdefault((row.dropped, row.init), []).append(row.name)
        came = {"transfer": "; the weights that it gave were taken over"}
        return [f"not kept: {what}{came.get(init, '')}: {some(own)}" for (what, init), own in names.items()]


Rule = SwapRule | Mapping[str, Any] | str
Rules = Rule | SwapConfig | Iterable[Rule]


def _named_rules(rules: Rules, operator: OperatorConfig) -> dict[str, SwapRule]:
    if isinstance(rules, SwapConfig):
        return {f"swap.rules.{n}" if rules.rules else n: rule for n, rule in rules.effective_rules().items()}
    if isinstance(rules, (SwapRule, Mapping, str)):
        rules = [rules]
    out = {}
    for i, rule in enumerate(rules):
        label = f"rules[{i}]"
        if isinstance(rule, str):
            rule = {"match": rule}
        out[label] = rule if isinstance(rule, SwapRule) else typed_rule(rule, operator, label)
    return out


def swap_layers(
    model: nn.Module,
    rules: Rules,
    operator: OperatorConfig | Mapping[str, Any] | str | None = None,
    init: str | None = None,
    **settings: Any,
) -> SwapReport:
    """Replace layers of ``model`` in place.

    Everything is planned and built before anything changes, so that an error leaves the model as it was.

    Args:
        model: any model; stages and token grids are read from timm's attributes where they exist.
        rules: one rule or several, as ``SwapRule``, mappings of its fields, globs over names, or a ``SwapConfig``.
        operator: what to put in: the name of a preset (``convnn.presets()``), an ``OperatorConfig``, or a mapping of
            its fields, over the preset of its ``name`` if it has one; see ``convnn.preset``.
        init: ``fresh``, ``transfer``, or ``auto``: ``transfer`` where an operator of convnn defines it. Default: that
            of the SwapConfig if it names one of the first two, else ``fresh``.
        **settings: of the operator: ``swap_layers(model, "layer4.*", "hybrid", k=9)``.

    Returns:
        One row per replaced layer.

    Raises:
        ConfigError: if a rule matches nothing, two rules claim one layer, or a layer cannot be replaced.
    """
    operator = operator_of(operator, **settings)
    if init is None:
        init = rules.init if isinstance(rules, SwapConfig) and rules.init != "auto" else "fresh"
    check_choice("swap.init", init, ("fresh", "transfer", "auto"))
    claims = _claims(model, rules, operator)
    built, refused, grids = _build_all(model, claims, init)
    if refused:
        raise _refusal(refused, claims, model)
    for patch_embed, grid in grids.items():
        patch_embed.register_forward_hook(grid.note)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    rows = []
    for name in sorted(built, key=order.__getitem__):
        old, one = claims[name].layer, built[name]
        _replace(model, old, one.new)
        counts = count_parameters(old), count_parameters(one.new)
        kept: dict[str, Any] = {"init": one.init, "dropped": one.dropped}
        rows.append(Replacement(name, _describe(old), _describe(one.new), *counts, on_meta(one.plain), **kept))
    return SwapReport(tuple(rows), _left(model, rules, operator))


def refusals(model: nn.Module, operator: OperatorConfig, init: str = "fresh") -> dict[str, ConfigError]:
    """Return why layers of an operator's kind cannot be replaced by it, by name; the model stays as it is."""
    claims = _claims(model, "*", operator) if find_sites(model, operator.kind) else {}
    return _build_all(model, claims, init)[1]


def _build_all(
    model: nn.Module, claims: Mapping[str, _Claim], init: str
) -> tuple[dict[str, _Built], dict[str, ConfigError], dict[nn.Module, TokenGrid]]:
    """Return the replacements, why others cannot be built, and what is to note the grids of images."""
    built: dict[str, _Built] = {}
    refused: dict[str, ConfigError] = {}
    grids: dict[nn.Module, TokenGrid] = {}
    for name, claim in claims.items():
        site = site_of(model, name, grids)
        ways: tuple[str, ...] = (init,)
        if init == "auto":  # others may take no notice of what they are asked for
            ways = ("transfer", "fresh") if is_own(claim.operator.target) else ("fresh",)
        for way in ways:
            try:
                check_called(model, name)
                built[name] = _built(claim, way, site)
                refused.pop(name, None)
                break
            except ConfigError as error:
                refused[name] = error
    return built, refused, grids


def _left(model: nn.Module, rules: Rules, operator: OperatorConfig) -> dict[str, str]:
    """Return the attention that the rules' globs match, but that cannot be replaced."""
    left: dict[str, str] = {}
    for label, rule in _named_rules(rules, operator).items():
        refused = refused_sites(model, own_operator(rule, operator, label).kind, [rule.match or ""])
        left |= {n: why for n, why in refused.items() if not any(fnmatch.fnmatch(n, glob) for glob in rule.exclude)}
    return left


@dataclass(frozen=True)
class _Built:
    """A replacement."""

    new: nn.Module
    plain: nn.Module
    """The layer as ``plain_convolution`` has it."""
    dropped: str
    """What of the layer is lost."""
    init: str


def _built(claim: _Claim, init: str, site: Site) -> _Built:
    build = _builder(claim.operator.target)
    check_replaceable(site.name, claim.layer)
    if any(is_operator(module) for module in claim.layer.modules()):
        raise ConfigError(f"'{site.name}' holds layers that were replaced before; replace it first, or exclude it")
    plain, dropped = plain_convolution(claim.layer, site.name)
    adapts = resolve_target(claim.operator.target, "operator.target") is ConvNNAttention
    source, site = stand_in(plain, init, site, adapts)
    new = build(source, with_taps(claim.operator, source), init, site)
    return _Built(like(claim.layer, source, new, site.name), plain, dropped, init)


def _builder(target: str) -> Callable[..., nn.Module]:
    """Return what makes an operator from a layer, by the operator's name."""
    build = getattr(resolve_target(target, "operator.target"), "from_layer", None)
    if not callable(build):
        raise ConfigError(f"operator.target={target} is no operator: it has no from_layer")
    return build


def _refusal(refused: Mapping[str, ConfigError], claims: Mapping[str, _Claim], model: nn.Module) -> ConfigError:
    """Return one error for all layers that cannot be replaced, with what leaves them out where others remain."""
    reasons: dict[str, list[str]] = {}
    for name, error in refused.items():
        reasons.setdefault(str(error).replace(f"'{name}'", "{layer}"), []).append(f"'{name}'")
    text = "; ".join(reason.replace("{layer}", some(names)) for reason, names in reasons.items())
    if len(refused) == len(claims):  # nothing would be left to replace
        other = all(claim.operator.kind == CONV for claim in claims.values()) and find_sites(model, ATTENTION)
        return ConfigError(f"{text}; or {FOR_ATTENTION}" if other else text)
    rules = {claims[name].rule: claims[name].exclude for name in refused}
    ways = [
        f"{rule}.exclude=[{','.join([*own, *(name for name in refused if claims[name].rule == rule)])}]"
        for rule, own in rules.items()
    ]
    return ConfigError(f"{text}; to leave them out, set {' '.join(ways)}")


@dataclass(frozen=True)
class _Claim:
    """A layer that a rule will replace, and by what."""

    rule: str
    layer: nn.Module
    operator: OperatorConfig
    exclude: list[str]
    """Of the rule."""


def _claims(model: nn.Module, rules: Rules, operator: OperatorConfig) -> dict[str, _Claim]:
    """Return what every rule claims, by the layers' names.

    Raises:
        ConfigError: if a rule claims nothing or what another has claimed, or its operator replaces another kind.
    """
    claims: dict[str, _Claim] = {}
    for label, rule in _named_rules(rules, operator).items():
        check_rule(rule, label)
        own = own_operator(rule, operator, label)
        check_operator(own, f"{label}.operator" if rule.operator else "operator")
        check_kind(rule, own, label)
        for name, layer in select_sites(model, rule, own.kind, label).items():
            if name in claims:
                raise ConfigError(f"'{name}' is claimed by both {claims[name].rule} and {label}; exclude it from one")
            claims[name] = _Claim(label, layer, own, rule.exclude)
    for name in list(claims):
        outer = next((o for o in _names_around(name) if o in claims), None)
        if outer is not None and claims[outer].rule == claims[name].rule:
            del claims[name]  # goes with the outer one
        elif outer is not None:
            rules_of = claims[name].rule, claims[outer].rule
            raise ConfigError(f"'{name}' of {rules_of[0]} lies in '{outer}' of {rules_of[1]}; exclude one of them")
    return claims


def _names_around(name: str) -> list[str]:
    """Return the names of the modules that a module lies in, the outermost first."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` is registered; a shared layer stays shared."""
    for name, module in list(model.named_modules(remove_duplicate=False)):  # a list: the loop changes the model
        if module is old:
            model.set_submodule(name, new)


def count_parameters(module: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _describe(module: nn.Module) -> str:
    if isinstance(module, (nn.Conv2d, nn.Conv1d)):
        kind = "Conv2d" if isinstance(module, nn.Conv2d) else "Conv1d"
        text = f"{kind} {module.in_channels}->{module.out_channels} {'x'.join(map(str, module.kernel_size))}"
        if max(_pair_of(module.stride)) > 1:
            text += f" s{module.stride[0]}"
        return text + (f" g{module.groups}" if module.groups > 1 else "")
    if isinstance(module, Attention):
        return f"Attention {module.qkv.in_features} h{module.num_heads}"
    if isinstance(module, AdaptedAttention):
        return f"ConvNN {type(module.plain).__name__} k={module.k} blend={module.blend:g}"
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
    """Replace every swapped layer by the plain convolution or attention that it is equal to, in place.

    ``convnn.models.plain.timm_description`` says how timm builds the result anew, and in what it cannot.

    Returns:
        The names of the layers replaced.

    Raises:
        ConfigError: naming a layer that equals no plain one; the model is then as it was.
    """
    names = [name for name, module in model.named_modules() if is_operator(module)]
    names = [n for n in names if not any(n.startswith(f"{outer}.") for outer in names)]
    plain = {}
    for name in names:
        layer = model.get_submodule(name)
        for inner in layer.modules():  # the model may have been given another input size since
            if isinstance(getattr(inner, "token_grid", None), TokenGrid):
                inner.grid_size = site_of(model, name, {}).grid_size or inner.grid_size  # type: ignore[assignment]
        to_layer = getattr(layer, "to_layer", None)
        try:
            if to_layer is None:
                raise ValueError(f"{type(layer).__name__} has no plain equivalent")
            plain[name] = to_layer()
        except ValueError as error:
            raise ConfigError(f"'{name}' cannot be exported: {error}") from error
    for name, layer in plain.items():
        _replace(model, model.get_submodule(name), layer)
    forget_token_grids(model)
    return names


def neighbor_layers(model: nn.Module) -> dict[str, NeighborLayer]:
    """Return the model's layers that have a blend between convolution and attention, by name, in forward order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, NeighborLayer)}
