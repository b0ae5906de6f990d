"""Composing ``conf/`` with Hydra into a checked Config, and Hydra's errors in one line. Imports no torch."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from convnn.config.folders import CONF_DIR, config_folders, config_groups
from convnn.config.keys import all_keys, as_list, list_keys, nearest, schema_node, text_keys, unknown_key_error
from convnn.config.load import to_config
from convnn.config.overrides import PLACES, key_of, quoted
from convnn.config.schema import KERNEL, Config
from convnn.errors import ConfigError, first_line

COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError)
"""What Hydra raises for overrides and files that it cannot compose; see ``translate``."""

ConfigStore.instance().store(name="schema", node=schema_node(Config))


_ELSEWHERE = {
    "grid": "sweep.py grid=NAME",
    "table": "scripts/reproduce.py table=NAME",
    "resume": "train.py resume=DIR",
    "from_run": "train.py from_run=DIR",
}
"""Words of one program that are none of another, where they are understood."""


def _options(*more: str) -> str:
    """Return the groups of a run, and ``more``, with their options, a line each, for ``--help``."""
    groups = {group: options for group, options in config_groups().items() if group in more or group not in _ELSEWHERE}
    return "\n".join(f"{group}: {', '.join(options)}" for group, options in groups.items())


OmegaConf.register_new_resolver("convnn_groups", _options, replace=True)


class UserFolders(SearchPathPlugin):
    """Lets Hydra look into the user's folders wherever it composes: here, in its own main, in a launcher's workers."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the folders after the package's own."""
        for folder in config_folders()[1:]:
            search_path.append("user", f"file://{folder}")


Plugins.instance().register(UserFolders)


def compose_config(overrides: Sequence[str] = (), config_name: str = "config") -> Config:
    """Compose ``conf/`` with Hydra overrides into a checked Config. Imports no torch.

    Raises:
        ConfigError: one line, naming the key and the way out.
    """
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            values = compose(config_name, list(overrides))
        return from_hydra(values)
    except COMPOSE_ERRORS as error:
        raise translate(error, overrides) from error


def from_hydra(values: DictConfig) -> Config:
    """Turn what Hydra composed into a checked Config."""
    return to_config(OmegaConf.to_container(values, resolve=True))


def translate(error: Exception, overrides: Sequence[str], schema: type = Config) -> ConfigError:
    """Say what Hydra means in one line."""
    text = str(error)
    if isinstance(error, yaml.YAMLError):
        return ConfigError(" ".join(text.split()))
    if "interpolation '${operator.k}'" in text and f"Value '{KERNEL}'" in text:
        return ConfigError(f"schedule.k needs operator.k to be a number: with {KERNEL} each layer has its own")
    groups = config_groups()
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        if group in groups:
            return ConfigError(f"{group}={option}: no such option{nearest(option, groups[group])}")
        if error.options:
            return ConfigError(f"{group}={option}: no such option{nearest(option, error.options)}")
    found = re.search(r"Could not override '([^']+)'", text)
    if found:
        key = found.group(1).split("@")[0]
        if "." in key:
            return unknown_key_error(key, schema)
        if key in _ELSEWHERE:
            return ConfigError(f"{key}= is no part of this command; use {_ELSEWHERE[key]}")
        leaves = [k for k in all_keys(schema) if k.endswith(f".{key}")]
        if leaves:
            return unknown_key_error(key, schema)
        return ConfigError(f"unknown key '{key}'{nearest(key, [*all_keys(schema), *groups])}")
    several = next((o for o in overrides if key_of(o) in ("tracker", "tracker.name") and re.search(r",|=\[", o)), "")
    if several and re.search("Ambiguous value|requires --multirun|Error merging override", text):
        return several_trackers(several)
    if "Ambiguous value for argument" in text or "requires --multirun" in text:
        given = next((o for o in overrides if "," in o or "(" in o), "")
        way = _quoting(given) if key_of(given) in PLACES else None
        return ConfigError(
            f"{given} is a sweep over several values, where one is needed; {way or 'sweep.py takes several'}"
        )
    if isinstance(error, OverrideParseException):
        text_is_meant = key_of(error.override) in text_keys(schema)
        way = (text_is_meant and _quoting(error.override)) or f"Hydra cannot read this override: {text.splitlines()[0]}"
        return ConfigError(f"{error.override}: {way}")
    key = getattr(error, "full_key", None) or getattr(error.__cause__, "full_key", None)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if key and error.__cause__ is not None:
        lines = [first_line(error.__cause__)]
    value = next((o.partition("=")[2] for o in overrides if key and key_of(o) == key), "")
    if key in list_keys(schema) and value and not value.startswith("["):
        return as_list(str(key), value)
    shown = next((o for o in overrides if key and o.lstrip("+~").startswith(f"{key}=")), key)
    return ConfigError(f"{shown}: {lines[0]}" if shown else " ".join(lines[:2]))


def several_trackers(override: str) -> ConfigError:
    """Return the error for an override that names trackers as if they were values to sweep over."""
    names = override.partition("=")[2].strip("[]")
    return ConfigError(f"{override}: several trackers of one run are a list of options: 'tracker=[{names}]'")


def _quoting(override: str) -> str | None:
    """Return how an override is written so that the shell and Hydra leave its value as it is; None: that is no help."""
    key, equals, value = override.partition("=")
    within = f"{key}={quoted(value)}"
    try:
        read = OverridesParser.create().parse_override(within)
    except HydraException:
        return None
    if not equals or read.value() != value:
        return None
    typed = shlex.quote(within) if set(within) & set('"$`\\!') else f'"{within}"'
    return f"the value needs quotes, for the shell and for Hydra: {typed}"


@contextmanager
def hydra_context() -> Iterator[None]:
    """Let ``compose`` read ``conf/``, whatever Hydra was doing before."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        yield
