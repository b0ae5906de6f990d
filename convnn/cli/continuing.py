"""Command lines of train.py that name a run folder to start from: ``resume=DIR``, ``from_run=DIR``, ``run.dir=DIR``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from convnn.config.continued import derived_config, resumed_config
from convnn.config.load import expanded, read_values
from convnn.config.overrides import key_of
from convnn.config.schema import Config
from convnn.errors import ConfigError
from convnn.runs.contents import MARKER, is_run_folder
from convnn.runtime.distributed import world_from_environment
from convnn.runtime.files import read_json

log = logging.getLogger("convnn")
RESUME, FROM_RUN = "resume", "from_run"


def config_from_folder(overrides: Sequence[str]) -> Config | None:
    """Return the configuration of a command line that names a run folder to start from; None: it names none.

    Raises:
        ConfigError: if the folder cannot be used, or an override contradicts it.
    """
    named = {key: [o for o in overrides if key_of(o) == key] for key in (RESUME, FROM_RUN)}
    given = named[RESUME] + named[FROM_RUN]
    if not given:
        return _in_run_dir(overrides)
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)}: give one of them")
    key, folder = key_of(given[0]), _folder(given[0])
    others = [override for override in overrides if override != given[0]]
    _check_folder(folder, given[0])
    if key == FROM_RUN:
        if world_from_environment().rank == 0:  # of several processes, which have not met yet
            begins = any(key_of(override) == "backbone.checkpoint" for override in others)
            log.info("the configuration is that of %s%s", folder, "" if begins else "; its weights are not taken")
        return derived_config(folder, others)
    place = next((override for override in others if key_of(override).startswith("run.")), None)
    if place:
        raise ConfigError(f"{place}: {given[0]} names the run folder; leave it out")
    if "overwriting" in (read_json(folder / MARKER) or {}):
        raise ConfigError(
            f"{given[0]} was about to be overwritten; give the whole command with run.if_exists=overwrite"
        )
    return resumed_config(folder, others, given[0])


def _in_run_dir(overrides: Sequence[str]) -> Config | None:
    """Return the configuration of ``run.dir=DIR run.if_exists=resume``; None: it is another command, or a new run."""
    values = {key_of(override): override for override in overrides}
    if "run.dir" not in values or values.get("run.if_exists", "").partition("=")[2].strip("'\"") != "resume":
        return None
    folder = _folder(values["run.dir"])
    begun = folder.is_dir() and (folder / "config.yaml").exists() and is_run_folder(folder)
    if not begun or "overwriting" in (read_json(folder / MARKER) or {}):
        return None
    others = [override for override in overrides if key_of(override) not in ("run.dir", "run.if_exists")]
    return resumed_config(folder, others, values["run.dir"])


def _folder(override: str) -> Path:
    """Return the folder that an override names, in Hydra's quotes or as it is."""
    key, _, text = override.partition("=")
    if not text:
        raise ConfigError(f"{override} needs the folder of a run: {key}=DIR")
    try:
        value = OverridesParser.create().parse_override(override).value()
    except HydraException:
        value = text
    return Path(expanded(value if isinstance(value, str) else text, key))


def _check_folder(folder: Path, said: str) -> None:
    if not folder.is_dir():
        raise ConfigError(f"{said}: there is no such folder")
    if not is_run_folder(folder):
        raise ConfigError(f"{said} is not a run folder; train.py prints that of a run")
    read_values(folder)
