"""Hydra overrides as texts: keys, quoting, merging. Imports no torch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

PLACES = ("run.dir", "run.root", "data.root", "sweep.dir", "backbone.checkpoint")
"""Keys whose values are paths."""


def quoted(text: str) -> str:
    """Return a text as a value that Hydra reads back as it is."""
    text = re.sub(r"(\\+)(?='|$)", r"\1\1", text)  # backslashes count only before a quote
    return "'" + text.replace("'", "\\'") + "'"


def quoted_once(override: str) -> str:
    """Return an override that a shell's single quotes can hold: Hydra's own are left out, or double, where they can.

    Which override it is stays the same.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, _, value = override.partition("=")
    inner = value[1:-1]
    if len(value) < 2 or value[0] != "'" or value[-1] != "'" or set(inner) & set("'\"\\"):
        return override
    for text in (inner, f'"{inner}"'):
        try:
            if inner and OverridesParser.create().parse_override(f"{key}={text}").value() == inner:
                return f"{key}={text}"
        except HydraException:
            continue
    return override


def key_of(override: str) -> str:
    """Return the key of an override, without ``+``, ``++`` or ``~``."""
    return override.lstrip("+~").split("=", 1)[0]


def merge_overrides(*parts: Sequence[str]) -> list[str]:
    """Return all overrides; of several for one key the last counts."""
    merged: dict[str, str] = {}
    for override in itertools.chain(*parts):
        key = key_of(override)
        if key in merged and merged[key].startswith("+") and not override.startswith(("+", "~")):
            override = "+" * (len(merged[key]) - len(merged[key].lstrip("+"))) + override
        merged[key] = override
    return list(merged.values())


def sweep_text(values: Any) -> str:
    """Return the values of an axis in Hydra's sweep syntax."""
    if not isinstance(values, list):
        return str(values)
    return ",".join(_value_text(v) for v in values)


def _value_text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(_value_text(v) for v in value)}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{k}:{_value_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, str) and not re.fullmatch(r"[\w./*-]+", value):
        return quoted(value)
    return str(value)


def is_sweep(override: str) -> bool:
    """Return whether an override is the sweep's own."""
    return key_of(override) == "grid" or key_of(override).startswith("sweep.")


def is_hydra(override: str) -> bool:
    """Return whether an override is for Hydra, such as the launcher."""
    return key_of(override).startswith(("hydra.", "hydra/"))
