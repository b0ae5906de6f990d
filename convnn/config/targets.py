"""Classes and functions that a configuration names. Imports torch only where the target does."""

from __future__ import annotations

import importlib
from typing import Any

from convnn.config.identity import FIRST_NAMES
from convnn.errors import ConfigError

_PRESENT_NAMES = {first: present for present, first in FIRST_NAMES.items()}


def resolve_target(path: str, key: str) -> Any:
    """Import ``package.module.name``.

    Raises:
        ConfigError: naming the configuration key, if there is no such thing.
    """
    path = _PRESENT_NAMES.get(path, path)
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{key}={path} cannot be imported: {error}") from error
    if not callable(found):
        raise ConfigError(f"{key}={path} is a {type(found).__name__}, neither a class nor a function")
    return found
