"""From a grid to the points of a sweep: expanded, composed, checked, and compared with what is on disk. No torch."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from convnn.checks import all_keys, check, typed
from convnn.cli import CONF_DIR, config_groups, from_hydra, translate
from convnn.config import Config, ConfigError, fingerprint, run_name
from convnn.files import read_json, write_json


@dataclass
class SweepConfig:
    """Which runs a sweep makes, and how."""

    name: str = "custom"
    """Name of the sweep; its W&B group."""
    dir: str = "sweeps/${sweep.name}"
    """Where plan, runs, logs and report go."""
    base: list[str] = field(default_factory=list)
    """Overrides of every point."""
    points: dict[str, list[str]] = field(default_factory=dict)
    """Named alternatives, each a list of overrides; the axes are applied to each of them."""
    axes: dict[str, Any] = field(default_factory=dict)
    """Values of each key or group: a list, or Hydra's sweep syntax in a string."""
    on_invalid: str = "fail"
    """``fail``: run nothing if a point cannot work; ``skip``: leave such points out."""
    retry_failed: bool = True
    """Run failed points again."""
    dry_run: bool = False
    """Say what would run, and stop."""
    report: bool = True
    """Write tables and plots at the end."""
    jobs_per_device: int = 1
    """Runs that may share one GPU."""
    point: str | None = None
    """Set by sweep.py for each job: ``p`` and the fingerprint of the point."""
    token: str | None = None
    """Set by sweep.py for each job: the sweep that it belongs to."""


@dataclass
class SweepRun(Config):
    """A run's configuration with the sweep's besides."""

    sweep: SweepConfig = field(default_factory=SweepConfig)


ConfigStore.instance().store(name="sweep_schema", node=SweepRun)


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    name: str
    """The run folder's name in ``<sweep.dir>/points``; it ends in the fingerprint's first digits."""
    fingerprint: str
    overrides: tuple[str, ...]
    label: str = ""
    """Name among ``sweep.points``."""

    @property
    def folder(self) -> str:
        """Run folder, relative to the sweep's."""
        return f"points/{self.name}"

    @property
    def log(self) -> str:
        """File of the process's output, relative to the sweep's folder."""
        return f"logs/{self.name}.log"


@dataclass
class Plan:
    """All points of a sweep."""

    points: list[Point]
    invalid: list[tuple[tuple[str, ...], str]]
    """Overrides of the points that cannot work, each with its reason."""
    axes: dict[str, list[str]]
    configs: dict[str, Config] = field(default_factory=dict)
    """By fingerprint."""
    duplicates: int = 0
    """Points left out because another has the same configuration."""


# ---------------------------------------------------------------------------------------------- composing


@contextmanager
def _hydra() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        yield


def sweep_options(overrides: Sequence[str], launcher: Sequence[str] = ()) -> SweepConfig:
    """Compose the ``sweep`` part of conf/sweep.yaml, and check Hydra's own overrides with it.

    Raises:
        ConfigError: one line, naming the key and the way out.
    """
    try:
        with _hydra():
            values = compose("sweep", [*overrides, *launcher])
        options: SweepConfig = OmegaConf.to_object(values.sweep)  # type: ignore[assignment]
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise translate(error, [*overrides, *launcher], SweepRun) from error
    if not options.dir.strip():
        raise ConfigError("sweep.dir is empty; name a folder")
    if options.on_invalid not in ("fail", "skip"):
        raise ConfigError(f"sweep.on_invalid={options.on_invalid} is not one of fail, skip")
    if options.jobs_per_device < 1:
        raise ConfigError(f"sweep.jobs_per_device={options.jobs_per_device} must be at least 1")
    for name, values in options.axes.items():
        if isinstance(values, list) and not values:
            raise ConfigError(f"sweep.axes.{name} is empty; give it values, or leave it out")
    return options


def quoted(text: str) -> str:
    """Return a text as a value that Hydra reads back as it is."""
    text = re.sub(r"(\\+)(?='|$)", r"\1\1", text)  # backslashes count only before a quote
    return "'" + text.replace("'", "\\'") + "'"


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


def expand(options: SweepConfig, given: Sequence[str]) -> tuple[list[tuple[str, list[str]]], dict[str, list[str]]]:
    """Return (label, overrides) of every point, and the values of every axis.

    ``given``, the command line, counts more than the points, the points more than axes and base.

    Raises:
        ConfigError: for an override that Hydra cannot read.
    """
    axes = [f"{key}={sweep_text(values)}" for key, values in options.axes.items()]
    points, names = [], options.points or {"": []}
    swept: dict[str, list[str]] = {}
    for label, own in names.items():
        merged = merge_overrides(options.base, axes, own, given)
        try:
            with _hydra():
                parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
                parsed = parser.parse_overrides(merged)
                deleted = [str(o.input_line) for o in parsed if o.is_delete()]
                batch = BasicSweeper.split_arguments([o for o in parsed if not o.is_delete()], None)[0]
                for override in parsed:
                    if override.is_sweep_override():
                        values = [str(v) for v in override.sweep_string_iterator()]
                        swept.setdefault(override.key_or_group, values)
        except ValueError as error:
            swept_over = " ".join(o for o in merged if "(" in o)
            raise ConfigError(f"{swept_over}: {error}") from error
        except HydraException as error:
            raise translate(error, merged, SweepRun) from error
        points += [(label, [*overrides, *deleted]) for overrides in batch]
    return points, swept


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
        for override in self._parser.parse_overrides(plain):
            section, _, name = override.key_or_group.rpartition(".")
            changes.setdefault(section, {})[name] = override.value()
        for section, values in changes.items():
            self._set(config, section, values)
        return check(config)

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
            with _hydra():
                values = compose("config", list(overrides))
            return from_hydra(values), "${" in json.dumps(OmegaConf.to_container(values, resolve=False))
        except (HydraException, OmegaConfBaseException) as error:
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


def point_name(config: Config, label: str = "") -> str:
    """Return the name of a point's folder: readable, of harmless characters, and its own."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", f"{label}-{run_name(config)}" if label else run_name(config))
    return f"{readable[:80].lstrip('.')}-{fingerprint(config)[:8]}"


def make_plan(options: SweepConfig, given: Sequence[str]) -> Plan:
    """Expand, compose, check and fingerprint all points.

    Raises:
        ConfigError: if there is nothing to run, or a point cannot work and ``on_invalid`` is ``fail``.
    """
    points, axes = expand(options, given)
    plan = Plan([], [], axes)
    composer = Composer()
    for label, overrides in points:
        try:
            config = composer(overrides)
        except ConfigError as error:
            plan.invalid.append((tuple(overrides), str(error)))
            continue
        print_ = fingerprint(config)
        if print_ in plan.configs:
            plan.duplicates += 1
            continue
        plan.configs[print_] = config
        plan.points.append(Point(point_name(config, label), print_, tuple(overrides), label))
    return plan


# ------------------------------------------------------------------------------------------------ on disk


def adopt_names(plan: Plan, folder: Path) -> None:
    """Let points that the folder knows keep the names, and so the run folders, that they have there."""
    names = {p["fingerprint"]: p["name"] for p in read_plan(folder).get("points", [])}
    plan.points = [replace(p, name=names.get(p.fingerprint, p.name)) for p in plan.points]


def save_plan(plan: Plan, folder: Path, command: Sequence[str]) -> None:
    """Write plan.json; points that other commands made in the same folder stay listed."""
    adopt_names(plan, folder)
    points = {p["fingerprint"]: p for p in read_plan(folder).get("points", [])}
    for point in plan.points:
        points[point.fingerprint] = asdict(point) | {
            "overrides": list(point.overrides),
            "folder": point.folder,
            "log": point.log,
        }
    values = {
        "command": list(command),
        "axes": plan.axes,
        "points": list(points.values()),
        "invalid": [{"overrides": list(o), "reason": reason} for o, reason in plan.invalid],
    }
    write_json(folder / "plan.json", values)


def read_plan(folder: Path) -> dict[str, Any]:
    """Return the content of plan.json; an empty mapping if there is none.

    Raises:
        ConfigError: if it is damaged.
    """
    path = folder / "plan.json"
    if not path.exists():
        return {}
    values = read_json(path)
    points = values.get("points") if values else None
    keys = {"name", "fingerprint", "overrides", "label", "folder"}
    if (
        values is None
        or not isinstance(points, list)
        or not all(isinstance(p, dict) and keys <= set(p) for p in points)
    ):
        raise ConfigError(f"{path} is damaged; remove it, the runs stay")
    return values


def load_point(folder: Path, print_: str) -> Point:
    """Return a point of plan.json by its fingerprint."""
    for p in read_plan(folder).get("points", []):
        if p["fingerprint"] == print_:
            return Point(p["name"], p["fingerprint"], tuple(p["overrides"]), p["label"])
    raise ConfigError(f"{folder / 'plan.json'} has no point {print_}")
