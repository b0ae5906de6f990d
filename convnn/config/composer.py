"""Composing many points that share most of their configuration. Imports no torch."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from convnn.config.compose import COMPOSE_ERRORS, from_hydra, hydra_context, translate
from convnn.config.folders import config_groups
from convnn.config.keys import all_keys, typed
from convnn.config.load import finished
from convnn.config.overrides import key_of
from convnn.config.schema import Config
from convnn.errors import ConfigError


class Composer:
    """Composes the points of a grid; what they share is composed by Hydra once.

    A point's overrides of plain values are put into the configuration that the others compose to, which is what
    Hydra does with them, 20 times faster. Where a value refers to another (``${...}``), Hydra composes every point.
    """

    def __init__(self) -> None:
        groups = set(config_groups())
        free = {f"{s.name}.{f.name}" for s in fields(Config) for f in _dict_fields(s)}
        self._leaves = set(all_keys()) - {s.name for s in fields(Config) if _is_section(s)} - groups - free
        self._shared: dict[tuple[str, ...], tuple[Config, bool] | ConfigError] = {}
        self._parser = OverridesParser.create()
        self._values: dict[str, tuple[str, Any]] = {}

    def __call__(self, overrides: Sequence[str]) -> Config:
        """Return the checked configuration of a point.

        Raises:
            ConfigError: one line, naming the key and the way out.
        """
        plain = [o for o in overrides if key_of(o) in self._leaves and o[0] not in "+~" and "$" not in o]
        rest = tuple(o for o in overrides if o not in plain)
        if rest not in self._shared:
            try:
                self._shared[rest] = self._compose(rest)
            except ConfigError as error:
                self._shared[rest] = error
        known = self._shared[rest]
        if isinstance(known, ConfigError):  # perhaps of the shared part alone: say what the whole point lacks
            return self._compose(overrides)[0]
        shared, refers = known
        if refers:
            return self._compose(overrides)[0]
        config = copy.deepcopy(shared)
        changes: dict[str, dict[str, Any]] = {}
        for override in plain:
            if override not in self._values:
                parsed = self._parser.parse_override(override)
                self._values[override] = parsed.key_or_group, parsed.value()
            key, value = self._values[override]
            section, _, name = key.rpartition(".")
            changes.setdefault(section, {})[name] = value
        if "checkpoint" in changes.get("backbone", {}):
            changes["backbone"].setdefault("checkpoint_sha256", None)  # that of another file
        for section, values in changes.items():
            self._set(config, section, values)
        return finished(config)

    @staticmethod
    def _set(config: Config, section: str, values: dict[str, Any]) -> None:
        """Set values of a section (``schedule.blend``), with its types."""
        if not section:
            top = {f.name: getattr(config, f.name) for f in fields(Config) if not _is_section(f)}
            for name, value in asdict(typed(_Top, top | values)).items():
                setattr(config, name, value)
            return
        *parents, last = section.split(".")
        owner: Any = config
        for parent in parents:
            owner = getattr(owner, parent)
        old = getattr(owner, last)
        setattr(owner, last, typed(type(old), asdict(old) | values, f"{section}."))

    @staticmethod
    def _compose(overrides: Sequence[str]) -> tuple[Config, bool]:
        try:
            with hydra_context():
                values = compose("config", list(overrides))
            return from_hydra(values), "${" in json.dumps(OmegaConf.to_container(values, resolve=False))
        except COMPOSE_ERRORS as error:
            raise translate(error, overrides) from error


@dataclass
class _Top:
    """The keys of a run that belong to no section."""

    seed: int = 0
    device: str = "auto"
    debug: bool = False


def _is_section(f: Any) -> bool:
    return callable(f.default_factory) and is_dataclass(f.default_factory())


def _dict_fields(section: Any) -> list[Any]:
    if not _is_section(section):
        return []
    return [f for f in fields(section.default_factory) if str(f.type).startswith("dict")]
