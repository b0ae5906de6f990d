"""From plain values, or a run folder's config.yaml, to a checked Config. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from convnn.config.checks import check
from convnn.config.keys import typed, typed_rule
from convnn.config.schema import NO_TRACKER, BackboneConfig, Config
from convnn.errors import ConfigError, first_line
from convnn.runtime.files import sha256_of


def expanded(path: str, key: str) -> str:
    """Return a path whose ``~`` or ``~user`` is the home folder.

    Raises:
        ConfigError: naming ``key``, if there is none.
    """
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError as error:
        raise ConfigError(f"{key}={path}: there is no home folder for ~; write the path in full") from error


def to_config(values: Any) -> Config:
    """Build and check a Config from plain values.

    Raises:
        ConfigError: for unknown keys, wrong types and impossible combinations.
    """
    config = typed(Config, values)
    swap = config.swap
    swap.operator = typed_rule({"operator": swap.operator}, config.operator, "swap").operator
    swap.rules = {name: typed_rule(rule, config.operator, f"swap.rules.{name}") for name, rule in swap.rules.items()}
    return finished(config)


def finished(config: Config) -> Config:
    """Write out the ``~`` of paths, take the hash of a file of weights, and check the whole.

    Raises:
        ConfigError: one line that names the key and the fix.
    """
    data, place = config.data, config.run
    data.root, place.root = expanded(data.root, "data.root"), expanded(place.root, "run.root")
    place.dir = place.dir and expanded(place.dir, "run.dir")
    _identify_weights(config.backbone)
    frozen = config.backbone.freeze
    config.backbone.freeze = [frozen] if isinstance(frozen, str) else frozen or []
    names = config.tracker.names
    config.tracker.name = names if len(names) > 1 else (names or [NO_TRACKER])[0]
    return check(config)


def _identify_weights(backbone: BackboneConfig) -> None:
    """Take the hash of ``backbone.checkpoint``, unless it is known: a run that has begun needs the file no longer.

    Raises:
        ConfigError: if there is no such file, or a hash without one.
    """
    if backbone.checkpoint is None:
        if backbone.checkpoint_sha256 is not None:
            raise ConfigError("backbone.checkpoint_sha256 says what backbone.checkpoint is; set that too")
        return
    backbone.checkpoint = _file_of(expanded(backbone.checkpoint, "backbone.checkpoint"))
    if backbone.checkpoint_sha256 is None:
        try:
            backbone.checkpoint_sha256 = sha256_of(Path(backbone.checkpoint))
        except OSError as error:
            raise ConfigError(
                f"backbone.checkpoint={backbone.checkpoint} cannot be read: {error.strerror}; "
                "runs that have begun go on without it: train.py resume=DIR, or with backbone.checkpoint_sha256 of "
                "their config.yaml"
            ) from error


def _file_of(place: str) -> str:
    """Return the file of weights that a place means: itself, or of a run folder its last checkpoint, else its best.

    Raises:
        ConfigError: for a folder without either.
    """
    folder = Path(place)
    if not folder.is_dir():
        return place
    files = [folder / "checkpoints" / f"{name}.pt" for name in ("last", "best")]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise ConfigError(
            f"backbone.checkpoint={place} is a folder without checkpoints/last.pt or best.pt; give a run folder with "
            "one, or a file of weights"
        )
    return str(found)


def read_values(folder: Path) -> dict[str, Any]:
    """Return what a run folder's config.yaml holds, as it stands there.

    Raises:
        ConfigError: if the folder is none, or its file is damaged.
    """
    path = folder / "config.yaml"
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{folder} is not a run folder: it has no readable config.yaml") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is damaged: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is damaged: it holds no mapping")
    return values


def load_config(folder: Path, *, to_read: bool = True) -> Config:
    """Read the configuration of a run folder; keys that it lacks take their defaults.

    Args:
        folder: of the run.
        to_read: nothing is going to be tracked, so that all but the tracker's name and mode is left out.

    Raises:
        ConfigError: if the folder is none, or its file is damaged.
    """
    values = read_values(folder)
    if isinstance(data := values.get("data"), dict):  # runs older than this key took no notice of such a folder
        data.setdefault("val_folder", not data.get("val_fraction"))
    if to_read and isinstance(
        tracker := values.get("tracker"), dict
    ):  # may be what W&B refuses, which is nothing to a reader
        values["tracker"] = {key: value for key, value in tracker.items() if key in ("name", "mode")}
    return to_config(values)
