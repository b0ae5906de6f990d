"""Where the options of the groups lie: ``conf/`` and folders of the user. Imports neither Hydra nor torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from convnn.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]
CONF_DIR = next(folder for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if folder.is_dir())
"""The configuration groups: packed into an installed package, beside it in a checkout."""

CONFIG_PATH = "CONVNN_CONFIG_PATH"
"""Environment variable with more folders of options, ``os.pathsep`` between them; child processes inherit it."""


def config_folders() -> list[Path]:
    """Return the folders that hold options: the package's own, which counts most, then the user's."""
    given = os.environ.get(CONFIG_PATH, "").split(os.pathsep)
    return [CONF_DIR, *(Path(folder).absolute() for folder in given if folder)]


def add_config_folders(given: Mapping[str, str]) -> None:
    """Take options from more folders, in this process and in those that it starts.

    Args:
        given: what the user wrote, by absolute path.

    Raises:
        ConfigError: for a folder that does not exist, or an option that the package's of the same name would hide.
    """
    found = dict(given) | {str(folder): CONFIG_PATH for folder in config_folders()[1:] if str(folder) not in given}
    for folder, source in found.items():
        if not Path(folder).is_dir():
            raise ConfigError(f"{source}: there is no folder {folder}")
        if os.pathsep in folder:
            raise ConfigError(f"{source}: {folder} has a '{os.pathsep}' in its name; use another folder")
        for file in sorted(Path(folder).glob("*/*.yaml")):
            own = CONF_DIR / file.parent.name / file.name
            if own.is_file() and own.read_bytes() != file.read_bytes():
                option = f"{file.parent.name}={file.stem}"
                raise ConfigError(f"{source}: {file} would never be read, {option} is convnn's own; rename the file")
    if found:
        os.environ[CONFIG_PATH] = os.pathsep.join(found)


def config_groups() -> dict[str, list[str]]:
    """Return the options of each configuration group, the user's among them."""
    found: dict[str, set[str]] = {}
    for file in (file for folder in config_folders() for file in folder.glob("*/*.yaml")):
        found.setdefault(file.parent.name, set()).add(file.stem)
    return {group: sorted(options) for group, options in sorted(found.items())}
