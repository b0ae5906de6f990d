"""The operators of ``conf/operator`` for the library, from the same files as on the command line. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from convnn.config.folders import config_folders, config_groups
from convnn.config.keys import nearest, typed
from convnn.config.schema import ATTENTION, OperatorConfig
from convnn.errors import ConfigError

_FIXED = ("kind", "target")
"""What a preset's name stands for: other values would make it another layer's name."""


def presets() -> list[str]:
    """Return the names of all operators that ``operator=NAME`` takes, the user's among them."""
    return config_groups()["operator"]


def preset(name: str, **settings: Any) -> OperatorConfig:
    """Return a named operator, with some settings changed: ``preset("hybrid", k=4)``.

    Raises:
        ConfigError: for an unknown name or setting, with the nearest one, or a setting that contradicts the name.
    """
    whole: Any = OmegaConf.to_container(OmegaConf.create({"operator": _values(name)}), resolve=True)
    base = typed(OperatorConfig, whole["operator"], "operator.")
    for key in _FIXED:
        if key in settings and settings[key] != getattr(base, key):
            raise ConfigError(
                f"operator.{key}={settings[key]} contradicts operator.name={name}, whose {key} is "
                f"{getattr(base, key)}; leave one out"
            )
    plain = {field: getattr(base, field) for field in base.__dataclass_fields__}
    return typed(OperatorConfig, plain | settings | {"name": name}, "operator.")


def operator_of(given: OperatorConfig | Mapping[str, Any] | str | None, **settings: Any) -> OperatorConfig:
    """Return an operator as the library is given one: whole, by a preset's name, or by some of its settings.

    A mapping whose ``name`` is that of a preset changes that preset. Without a name, ``kind="attention"`` changes
    ``convnn_attention``, and all else the paper's CNN layer.
    """
    if isinstance(given, str):
        return preset(given, **settings)
    if isinstance(given, OperatorConfig):
        return typed(OperatorConfig, vars(given) | settings, "operator.") if settings else given
    values = dict(given or {}) | settings
    name = values.pop("name", None)
    if name is None and values.get("kind") == ATTENTION and values.get("target", _ATTENTION) == _ATTENTION:
        return preset("convnn_attention", **values)
    if name in presets() and not (name == OperatorConfig().name and _differs(name, values)):
        return preset(name, **values)
    return typed(OperatorConfig, values if name is None else {"name": name, **values}, "operator.")


_ATTENTION = "convnn.ConvNNAttention"


def _differs(name: str, values: Mapping[str, Any]) -> bool:
    """Return whether a mapping is of another layer than the preset: of one whose name was left at the default."""
    base = _values(name)
    return any(values.get(key, base.get(key)) != base.get(key) for key in _FIXED)


def _values(name: str, above: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the plain values of a preset's file and of those that it names as its defaults, later over earlier ones.

    Raises:
        ConfigError: for a name that is unknown or stands above itself, or defaults that are no names of operators.
    """
    known = presets()
    if name not in known:
        raise ConfigError(f"operator={name}: no such option{nearest(name, known)}")
    file = next(path for folder in config_folders() if (path := folder / "operator" / f"{name}.yaml").is_file())
    if name in above:
        raise ConfigError(f"{file}: operator={name} is among its own defaults")
    own: Any = OmegaConf.to_container(OmegaConf.load(file))
    bases = own.pop("defaults", [])
    values: dict[str, Any] = {}
    for base in [*bases, *(["_self_"] if "_self_" not in bases else [])]:
        if not isinstance(base, str):
            raise ConfigError(f"{file}: the library takes names of operators as defaults, not {base}")
        values |= own if base == "_self_" else _values(base.lstrip("/").removeprefix("operator/"), (*above, name))
    return values
