"""From a grid to the points of a sweep: expanded, composed, checked, and compared with what is on disk. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from convnn.config.checks import check_kinds
from convnn.config.compose import hydra_context, several_trackers, translate
from convnn.config.composer import Composer
from convnn.config.identity import effect, fingerprint, fingerprint_of, run_name
from convnn.config.overrides import merge_overrides, sweep_text
from convnn.config.schema import Config
from convnn.errors import ConfigError
from convnn.runs.data_record import RecordReader
from convnn.runtime.files import read_json, write_json
from convnn.sweep.options import SweepConfig, SweepRun


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    name: str
    """The run folder's name in ``<sweep.dir>/points``; it ends in the fingerprint's first digits."""
    fingerprint: str
    overrides: tuple[str, ...]
    label: str = ""
    """Name among ``sweep.points``."""
    before: str = ""
    """Fingerprint of its result where that was computed while the data lay elsewhere."""

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
    """Points left out because another has the same configuration, or one that differs in nothing that has an effect."""


def expand_points(
    options: SweepConfig, given: Sequence[str]
) -> tuple[list[tuple[str, list[str]]], dict[str, list[str]]]:
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
            with hydra_context():
                parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
                parsed = parser.parse_overrides(merged)
                if between := next((o.input_line for o in parsed if o.is_interval_sweep()), None):
                    way = "a grid takes values such as 0,0.5,1; hydra/sweeper=optuna searches an interval"
                    raise ConfigError(f"{between}: {way}")
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
        for override in parsed:
            if override.key_or_group in swept and override.key_or_group in ("tracker", "tracker.name"):
                raise several_trackers(str(override.input_line))
        points += [(label, [*overrides, *deleted]) for overrides in batch]
    return points, swept


def point_name(config: Config, label: str = "", digest: str | None = None) -> str:
    """Return the name of a point's folder: readable, of harmless characters, and its own; ``digest``: if known."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", f"{label}-{run_name(config)}" if label else run_name(config))
    return f"{readable[:80].lstrip('.')}-{(digest or fingerprint(config))[:8]}"


def make_plan(options: SweepConfig, given: Sequence[str]) -> Plan:
    """Expand, compose, check and fingerprint all points.

    Raises:
        ConfigError: if there is nothing to run, or a point cannot work and ``on_invalid`` is ``fail``.
    """
    points, axes = expand_points(options, given)
    plan = Plan([], [], axes)
    composer, read = Composer(), RecordReader()
    alike: dict[str, str] = {}
    for label, overrides in points:
        try:
            config = composer(overrides)
            check_kinds(config)
        except ConfigError as error:
            plan.invalid.append((tuple(overrides), str(error)))
            continue
        digest = fingerprint(config)
        first = alike.setdefault(fingerprint_of(effect(config)), digest)
        if first in plan.configs:
            other = _other_data(plan.configs[first], config, read)
            if other:
                plan.invalid.append((tuple(overrides), other))
            plan.duplicates += not other
            continue
        plan.configs[digest] = config
        plan.points.append(Point(point_name(config, label, digest), digest, tuple(overrides), label))
    return plan


def _other_data(first: Config, second: Config, read: RecordReader) -> str:
    """Say why two equal configurations are not one point: their folders hold other data; empty if they are."""
    try:
        found = read.differences(first.data, second.data)
    except ConfigError as error:
        found = [str(error)]
    if not found:
        return ""
    roots = f"data.root={first.data.root} and {second.data.root}"
    return f"{roots} hold other data ({'; '.join(found[:5])}); give each a data.name of its own"


def keep_known_names(plan: Plan, folder: Path) -> None:
    """Give points that the folder's plan.json knows the names, and so the run folders, that they have there."""
    known = {p["fingerprint"]: p for p in read_plan(folder).get("points", [])}
    plan.points = [
        replace(p, name=known[p.fingerprint]["name"], before=known[p.fingerprint].get("before", ""))
        if p.fingerprint in known
        else p
        for p in plan.points
    ]


def save_plan(plan: Plan, folder: Path, command: Sequence[str], name: str) -> None:
    """Write plan.json with the sweep's ``name``; points that other commands made in the same folder stay listed."""
    keep_known_names(plan, folder)
    points = {p["fingerprint"]: p for p in read_plan(folder).get("points", [])}
    own = {point.name: point.fingerprint for point in plan.points}
    points = {f: p for f, p in points.items() if own.get(p["name"], f) == f}  # of data that moved, the present place
    for point in plan.points:
        points[point.fingerprint] = asdict(point) | {
            "overrides": list(point.overrides),
            "folder": point.folder,
            "log": point.log,
        }
    values = {
        "name": name,
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


def to_point(entry: Mapping[str, Any]) -> Point:
    """Return the point that an entry of plan.json describes."""
    before = entry.get("before", "")
    return Point(entry["name"], entry["fingerprint"], tuple(entry["overrides"]), entry["label"], before)


def load_point(folder: Path, digest: str) -> Point:
    """Return a point of plan.json by its fingerprint."""
    for p in read_plan(folder).get("points", []):
        if p["fingerprint"] == digest:
            return to_point(p)
    raise ConfigError(f"{folder / 'plan.json'} has no point {digest}")
