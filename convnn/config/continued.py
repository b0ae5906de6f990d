"""The configuration of a run folder with changes: to go on with that run, or to begin another. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from convnn.config.compose import compose_config
from convnn.config.folders import config_groups
from convnn.config.identity import LENGTH, differences, identity, length_of, lengthened, without_place
from convnn.config.keys import schema_node
from convnn.config.load import load_config
from convnn.config.overrides import key_of, quoted
from convnn.config.schema import Config, RunConfig
from convnn.errors import ConfigError

_NODE = "run_folder"
_WHOLE = "experiment"
"""A group whose options describe a whole run."""


def resumed_config(folder: Path, overrides: Sequence[str], said: str) -> Config:
    """Return the configuration with which the run of a folder goes on.

    Args:
        folder: of the run.
        overrides: changes. Of what decides the outcome only the length may change, by its own keys, and only grow: the
            run is then extended, which ``train.extended_from`` records.
        said: what named the folder on the command line.

    Raises:
        ConfigError: if an override contradicts the run, naming the key.
    """
    begun = load_config(folder, to_read=False)
    place = [f"run.dir={quoted(str(folder))}", "run.if_exists=resume"]
    if any(key_of(override) == _WHOLE for override in overrides):
        config = compose_config([*overrides, *place])
    else:
        config = changed_config(begun, [*overrides, *place])
    before, after = length_of(asdict(begun.train)), length_of(asdict(config.train))
    if after != before and {key_of(override) for override in overrides} & {f"train.{key}" for key in LENGTH}:
        config.train = replace(config.train, extended_from=[*begun.train.extended_from, before])
        for key, value in after.items():
            if value < before.get(key, math.inf):
                there = f"is less than the {before[key]}" if key in before else "is a limit that was none"
                raise ConfigError(f"train.{key}={value} {there} of {said}; a run can be made longer, not shorter")
    old, new = (without_place(identity(one)) for one in (begun, config))
    found = differences(lengthened(old, new), new)
    if found:
        way = f"leave that out, or begin a run of its own: from_run={folder}"
        raise ConfigError(f"{said} is a run of another configuration ({'; '.join(found[:5])}); {way}")
    return config


def derived_config(folder: Path, overrides: Sequence[str]) -> Config:
    """Return the configuration of a new run: that of a folder's run, with changes.

    Its folder is its own, and it has the whole length from its beginning, also where that run was extended.

    Raises:
        ConfigError: if the changes cannot be made.
    """
    begun = load_config(folder, to_read=False)
    begun.train = replace(begun.train, extended_from=[])
    return changed_config(begun, overrides)


def changed_config(begun: Config, overrides: Sequence[str]) -> Config:
    """Return a configuration with overrides; an option of a group stands in place of all that the group had.

    Raises:
        ConfigError: if the overrides cannot be taken.
    """
    groups = config_groups()
    chosen = {key_of(override) for override in overrides} & groups.keys()
    if _WHOLE in chosen:
        raise ConfigError(f"{_WHOLE}= describes a whole run; leave it out, or from_run")
    values: Mapping[str, Any] = {**asdict(begun), "run": asdict(RunConfig())}
    kept = {key: value for key, value in values.items() if key not in chosen}
    if "backbone" in kept and "backbone.checkpoint" in map(key_of, overrides):
        kept["backbone"]["checkpoint_sha256"] = None  # that of another file, or of this one at another place
    ConfigStore.instance().store(name=_NODE, node=OmegaConf.merge(schema_node(Config), kept))
    return compose_config([_added(override, groups) for override in overrides], _NODE)


def _added(override: str, groups: Mapping[str, Any]) -> str:
    """Return an override for a configuration that chose no option yet, and may have what ``+key=`` adds."""
    key = key_of(override)
    if override.startswith("~"):
        return override
    if key in groups:
        return f"+{override.lstrip('+')}"
    return f"++{override.lstrip('+')}" if override.startswith("+") else override
