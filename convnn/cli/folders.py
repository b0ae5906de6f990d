"""The user's own folders of options, taken from a command line: ``--config-dir`` and ``hydra.searchpath``."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from convnn.config.compose import translate
from convnn.config.folders import add_config_folders
from convnn.config.load import expanded
from convnn.config.overrides import PLACES, key_of, quoted
from convnn.errors import ConfigError


def take_config_folders(argv: Sequence[str]) -> list[str]:
    """Return a command line without the folders of options that it names, which are searched from now on.

    Where other overrides begin a path with ``~``, the home folder stands in its place.

    Hydra would search them in this process alone, and before the package's own.

    Raises:
        ConfigError: for a folder that cannot be used.
    """
    rest: list[str] = []
    given: dict[str, str] = {}
    arguments = iter(argv)
    for arg in arguments:
        flag, equals, value = arg.partition("=")
        if flag in ("--config-dir", "-cd"):
            value = value if equals else next(arguments, "")
            if not value:
                raise ConfigError(f"{flag} needs a folder: {flag} DIR")
            given[_absolute(value)] = f"{flag}={value}"
        elif key_of(arg) == "hydra.searchpath":
            given |= {_absolute(_without_scheme(place, arg)): arg for place in _places(arg)}
        else:
            rest.append(_with_home(arg))
    add_config_folders(given)
    return rest


def _with_home(arg: str) -> str:
    """Return an override of a path with the home folder in place of a leading ``~``, which Hydra cannot read."""
    key, _, value = arg.partition("=")
    return f"{key}={quoted(expanded(value, key))}" if key_of(key) in PLACES and value.startswith("~") else arg


def _absolute(folder: str) -> str:
    return str(Path(expanded(folder, "--config-dir")).absolute())


def _places(override: str) -> list[str]:
    """Return the entries of a ``hydra.searchpath``."""
    try:
        value = OverridesParser.create().parse_override(override).value()
    except HydraException as error:
        raise translate(error, [override]) from error
    places = [value] if isinstance(value, str) else value
    if not isinstance(places, list) or not all(isinstance(place, str) for place in places):
        raise ConfigError(f"{override} is no list of folders; write hydra.searchpath=[DIR,DIR]")
    return places


def _without_scheme(place: str, override: str) -> str:
    """Return the folder of ``file://FOLDER``, ``pkg://PACKAGE`` or a plain one."""
    if not place.startswith("pkg://"):
        return place.removeprefix("file://")
    package = place.removeprefix("pkg://").replace("/", ".")
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        found = None
    if found is None or not found.submodule_search_locations:
        raise ConfigError(f"{override}: there is no package {package}")
    return next(iter(found.submodule_search_locations))
