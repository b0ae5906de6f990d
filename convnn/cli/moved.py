"""Command lines of evaluate.py that ask for a trained model at other settings: what they may set, and the points."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from convnn.config.checks import check_kinds
from convnn.config.compose import compose_config
from convnn.config.composer import Composer
from convnn.config.continued import changed_config
from convnn.config.folders import config_groups
from convnn.config.overrides import key_of
from convnn.config.schema import Config, OperatorConfig, ScheduleConfig
from convnn.errors import ConfigError
from convnn.sweep.options import SweepConfig
from convnn.sweep.plan import expand_points

OPERATOR, SWAP = "operator", "swap"
_EVERY = frozenset(f.name for f in fields(OperatorConfig))


@dataclass
class Grid:
    """Points to evaluate a trained model at, composed and checked."""

    own: Config
    """Of the model itself."""
    points: list[tuple[dict[str, str], Config, frozenset[str]]] = field(default_factory=list)
    """Values by key, configuration, and the operator's settings that it is to have of that."""
    name: str = ""
    """For a folder: the keys, and what tells them from other values of the same."""


def of_layers(override: str) -> bool:
    """Return whether an argument sets what the layers are, or where."""
    return key_of(override).partition(".")[0] in (OPERATOR, SWAP)


def of_config(override: str) -> bool:
    """Return whether an argument sets a key, or chooses an option, of a run's configuration."""
    first, dot, _ = key_of(override).partition(".")
    return first in config_groups() or (bool(dot) and first in {f.name for f in fields(Config)}) or first == "seed"


def grid_of_run(config: Config, folder: Path, overrides: Sequence[str]) -> Grid:
    """Return the points of a run's model.

    Args:
        config: of the run.
        folder: of the run, for messages.
        overrides: of operator and swap; lists of values make a grid.

    Raises:
        ConfigError: for a point that cannot be, before torch is loaded.
    """
    swapped = bool(config.swap.effective_rules())
    where = next((o for o in overrides if key_of(o).partition(".")[0] == SWAP), None)
    if swapped and where:
        raise ConfigError(
            f"{where}: run={folder} was trained with a swap, which stays; operator.KEY=... moves its layers, and "
            "layers=each one of them at a time"
        )
    if not swapped and where is None:
        raise ConfigError(
            f"run={folder} was trained without a swap; say which layers to replace by what, such as "
            "operator=convnn_attention swap=all_attention operator.aggregation=sum"
        )
    # Where a schedule ended is in the checkpoint; at other settings it is to limit nothing.
    begun = replace(config, schedule=ScheduleConfig())
    points, axes = _expanded(overrides)
    grid = Grid(config, name=_name(overrides, axes))
    for given in points:
        grid.points.append(_point(changed_config(begun, given), given, axes))
    return grid


def grid_of_backbone(overrides: Sequence[str], device: str) -> Grid:
    """Return the points of a backbone with weights of a file, from the words of train.py; none without a swap's.

    Raises:
        ConfigError: for a point that cannot be, before torch is loaded.
    """
    where = [o for o in overrides if of_layers(o)]
    fixed = [o for o in overrides if not of_layers(o)]
    grid = Grid(compose_config([*fixed, f"device={device}"]))
    if not where:
        return grid
    points, axes = _expanded(overrides)
    if wrong := next((key for key in axes if not of_layers(key)), None):
        raise ConfigError(f"{wrong} has several values; the axes are of operator and swap")
    grid.name, composer = _name(where, axes), Composer()
    for given in points:
        config = composer([*given, f"device={device}"])
        if not config.swap.effective_rules():
            raise ConfigError(f"{' '.join(where)}: there is no swap; name the layers, such as swap=all_attention")
        grid.points.append(_point(config, [o for o in given if of_layers(o)], axes))
    return grid


def _expanded(overrides: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    points, axes = expand_points(SweepConfig(), overrides)
    return [given for _, given in points], list(axes)


def _point(config: Config, given: Sequence[str], axes: Sequence[str]) -> tuple[dict[str, str], Config, frozenset[str]]:
    check_kinds(config)
    values = {key_of(override): override.partition("=")[2] for override in given}
    if values.get("swap.init") == "fresh":
        raise ConfigError("swap.init=fresh would draw new weights, which nothing trains here; leave it out")
    own = {key.partition(".")[2] for key in values if key.startswith(f"{OPERATOR}.")}
    told = {key: value for key, value in values.items() if key in axes or not axes}
    return told, config, _EVERY if OPERATOR in values else frozenset(own)


def _name(overrides: Sequence[str], axes: Sequence[str]) -> str:
    keys = axes or [key_of(override) for override in overrides]
    readable = "-".join(key.rpartition(".")[2] for key in keys)[:40]
    return f"{readable}-{hashlib.sha256(' '.join(sorted(overrides)).encode()).hexdigest()[:6]}"
