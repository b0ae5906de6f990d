"""Keys of the schema: finding them, nearest names, plain values with the schema's types. Imports no torch."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, asdict, fields, is_dataclass
from functools import lru_cache
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from convnn.config.schema import Config, OperatorConfig, SwapConfig, SwapRule
from convnn.errors import ConfigError, first_line

T = TypeVar("T")


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known name (after ``prefix``), else the list of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{prefix}{close[0]}'?"
    return f"; known: {', '.join(known[:20])}{', ...' if len(known) > 20 else ''}"


def all_keys(schema: type = Config, prefix: str = "") -> list[str]:
    """Return every dotted key of the schema, leaves and groups."""
    keys = []
    for f in fields(schema):
        keys.append(prefix + f.name)
        default = f.default_factory() if callable(f.default_factory) else None
        if is_dataclass(default):
            keys += all_keys(type(default), f"{prefix}{f.name}.")
    return keys


def text_keys(schema: type = Config) -> list[str]:
    """Return the dotted keys that take any text."""
    return [key for key, f in _leaves(schema) if str(f.type).startswith("str") and "choices" not in f.metadata]


def list_keys(schema: type = Config) -> list[str]:
    """Return the dotted keys that take a list."""
    return [key for key, f in _leaves(schema) if str(f.type).startswith("list")]


def _leaves(schema: type, prefix: str = "") -> Iterator[tuple[str, Field[Any]]]:
    """Yield every dotted key that has no keys below it, with its field."""
    for f in fields(schema):
        default = f.default_factory() if callable(f.default_factory) else None
        if is_dataclass(default):
            yield from _leaves(type(default), f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f


def as_list(key: str, value: Any) -> ConfigError:
    """Return the error for a single value where a list is needed."""
    return ConfigError(f"{key}={value} is one value where a list is needed; write '{key}=[{value}]'")


_FREE = (
    "backbone.kwargs",
    "operator.options",
    "data.options",
    "swap.operator",
    "swap.rules",
    "sweep.axes",
    "sweep.points",
)


def unknown_key_error(key: str, schema: type = Config) -> ConfigError:
    """Return the error for a key that the schema lacks, with the nearest key that it has."""
    known = all_keys(schema)
    parent, _, leaf = key.rpartition(".")
    free = next((k for k in _FREE if key == k or key.startswith(f"{k}.")), None)
    if free:
        example = key if key != free else f"{free}.KEY"
        return ConfigError(f"'{key}' is not set yet; add an entry with a plus sign: +{example}=VALUE")
    same = [k for k in known if k.rpartition(".")[2] == leaf and k != key]
    if same:
        return ConfigError(f"unknown key '{key}'; did you mean {' or '.join(map(repr, same[:3]))}?")
    siblings = [k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == parent]
    close = difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.5)
    if close:
        return ConfigError(f"unknown key '{key}'; did you mean '{f'{parent}.' if parent else ''}{close[0]}'?")
    return ConfigError(f"unknown key '{key}'{nearest(key, siblings if siblings and parent else known)}")


_WORDS = (("true", "yes", "on"), ("false", "no", "off"))
"""What YAML reads as true and as false; such a value arrives as "True" or "False" where a choice is asked for."""


def meant(value: Any, choices: Sequence[str]) -> Any:
    """Return the choice that a YAML boolean means, or the value as it is."""
    if value not in choices:
        for words in _WORDS:
            if str(value).lower() in words:
                return next((one for one in choices if one in words), value)
    return value


def _with_choices(values: Mapping[str, Any], schema: type) -> dict[str, Any]:
    """Return plain values of a dataclass in which YAML's booleans are the choices that they mean.

    Likewise numbers in text, where a word may stand in place of a number: such a field takes any text.
    """
    found = dict(values)
    for f in fields(schema):
        default = f.default_factory() if callable(f.default_factory) else None
        if f.name in found and "choices" in f.metadata:
            found[f.name] = meant(found[f.name], f.metadata["choices"])
        elif f.metadata.get("words") and re.fullmatch(r"[+-]?\d+", str(found.get(f.name))):
            found[f.name] = int(found[f.name])
        elif is_dataclass(default) and isinstance(found.get(f.name), Mapping):
            found[f.name] = _with_choices(found[f.name], type(default))
    return found


def check_keys(values: Mapping[str, Any], schema: type = Config, prefix: str = "") -> None:
    """Raise ConfigError for any key of ``values`` that the schema lacks (``+key=`` gets past Hydra's own check)."""
    by_name = {f.name: f for f in fields(schema)}
    for name, value in values.items():
        if name not in by_name:
            if not prefix:
                raise unknown_key_error(str(name), schema)
            raise ConfigError(f"unknown key '{prefix}{name}'{nearest(str(name), by_name, prefix)}")
        factory = by_name[name].default_factory
        default = factory() if callable(factory) else None
        if is_dataclass(default) and isinstance(value, Mapping):
            check_keys(value, type(default), f"{prefix}{name}.")
    if schema is SwapConfig:
        for name, rule in (values.get("rules") or {}).items():
            if not isinstance(rule, Mapping):
                raise ConfigError(f"{prefix}rules.{name}={rule} is not a rule; write {prefix}rules.{name}.match=GLOB")
            check_keys(rule, SwapRule, f"{prefix}rules.{name}.")


@lru_cache
def schema_node(schema: type) -> DictConfig:
    """Return a dataclass as OmegaConf takes it, with values that may be set.

    It is one for all, which merging copies. OmegaConf makes the fields of frozen dataclasses read-only, which would
    refuse every override of ``operator``.
    """
    node = OmegaConf.structured(schema)
    for child in [node, *(node[key] for key in node if OmegaConf.is_dict(node._get_node(key)))]:
        if child is not None:
            OmegaConf.set_readonly(child, None)
    return node


def typed(schema: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """Return plain values as a dataclass, converted to its types.

    What was converted before is copied: the points of a grid share most of their sections.

    Raises:
        ConfigError: for an unknown key or a wrong type; ``prefix`` comes before the key.
    """
    key = schema, repr(values)  # which tells 1, 1.0, True and '1' apart
    if key not in _converted:
        if len(_converted) >= 1000:
            _converted.clear()
        _converted[key] = _convert(schema, values, prefix)
    return copy.deepcopy(_converted[key])


_converted: dict[tuple[type, str], Any] = {}


def _convert(schema: type[T], values: Mapping[str, Any], prefix: str) -> T:
    check_keys(values, schema, prefix)
    try:
        return OmegaConf.to_object(OmegaConf.merge(schema_node(schema), _with_choices(values, schema)))  # type: ignore[return-value, arg-type]
    except OmegaConfBaseException as error:
        value = values.get(str(error.full_key))
        if error.full_key in list_keys(schema) and not isinstance(value, (list, Mapping)):
            raise as_list(f"{prefix}{error.full_key}", value) from error
        raise ConfigError(f"{prefix}{error.full_key}: {first_line(error)}") from error


def typed_rule(values: Mapping[str, Any], operator: OperatorConfig, prefix: str) -> SwapRule:
    """Return a swap rule whose own operator settings have the types of ``operator``, over which they stand.

    Raises:
        ConfigError: for an unknown key or a wrong type.
    """
    rule = typed(SwapRule, values, f"{prefix}.")
    rule.operator = {name: getattr(own_operator(rule, operator, prefix), name) for name in rule.operator}
    return rule


def own_operator(rule: SwapRule, operator: OperatorConfig, prefix: str) -> OperatorConfig:
    """Return the operator of a rule's layers: its own settings over the common ones.

    Raises:
        ConfigError: for an unknown key or a wrong type.
    """
    return typed(OperatorConfig, asdict(operator) | rule.operator, f"{prefix}.operator.")
