"""The arms of a comparison: runs equal in everything but the seed, by name. Imports no torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

from convnn.errors import ConfigError
from convnn.report.results import NAMES, POINT, FoundRuns, Run
from convnn.report.tables import complete_groups, describe, is_plain, labels_of, main_keys, name_moving
from convnn.runs.metrics import is_number
from convnn.text import is_missing, show

if TYPE_CHECKING:
    import pandas as pd

SWAP = ("operator.", "swap.", "schedule.")
"""Keys without effect in an arm whose layers are all the backbone's own."""

MOST_NAMES = 20
"""Arms that a sentence names."""


@dataclass
class Arm:
    """Complete runs that differ in their seed alone."""

    name: str
    values: dict[str, Any]
    """Of the keys that differ among all runs, those that something moves by name."""
    keys: dict[str, Any]
    """The whole configuration by dotted key, without names and the seed."""
    runs: dict[int, Run]
    """By seed."""
    scores: dict[int, float]
    """The metric by seed, of the runs that have it."""
    repeated: list[int] = field(default_factory=list)
    """Seeds of which a further run was left out."""

    @property
    def plain(self) -> bool:
        """Whether no layer is replaced."""
        return is_plain(self.keys)

    def cost(self, name: str) -> float:
        """Return the mean of a number in the runs' results, such as ``seconds``; NaN where no run has it."""
        values = [run.result.get(name) for run in self.runs.values()]
        known = [float(value) for value in values if is_number(value)]
        return sum(known) / len(known) if known else float("nan")


def arms_of(found: FoundRuns, frame: pd.DataFrame, summary: pd.DataFrame, metric: str) -> list[Arm]:
    """Return the arms that have complete runs, in the order of the report's tables.

    Args:
        found: the runs.
        frame: of the same, see ``runs_frame``.
        summary: of the frame, see ``summarize``.
        metric: what is compared.
    """
    groups = complete_groups(frame)
    names = _names([values for values, _ in groups], main_keys(summary))
    scores = list(frame[metric])
    arms = []
    for name, (values, rows) in zip(names, groups, strict=True):
        first = found.runs[rows[0]].keys
        keys = {key: value for key, value in first.items() if key not in NAMES and key != "seed"}
        arm = Arm(name, values, keys, {}, {})
        for row in rows:
            seed = found.runs[row].keys.get("seed")
            if not is_number(seed):
                continue
            if seed in arm.runs:
                arm.repeated.append(int(seed))
                continue
            arm.runs[int(seed)] = found.runs[row]
            if is_number(scores[row]):
                arm.scores[int(seed)] = float(scores[row])
        if arm.runs:
            arms.append(arm)
    return arms


def _names(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[str]:
    """Return a name for each arm: its point's, with what else differs among the arms of the point; else its keys."""
    rows = [{**dict.fromkeys(keys), **row} for row in rows]
    points = [None if is_missing(row.get(POINT)) else row[POINT] for row in rows]
    labels = labels_of(rows, [key for key in keys if key != POINT])
    names = []
    for row, point, label in zip(rows, points, labels, strict=True):
        same = [other for other, name in zip(rows, points, strict=True) if name == point]
        if point is not None:
            differ = [key for key in keys if key != POINT and len({show(other[key]) for other in same}) > 1]
            label = f"{point}, {describe({key: row[key] for key in differ})}" if len(same) > 1 else str(point)
        names.append(label)
    counts = Counter(names)
    return [f"{name} ({names[: i + 1].count(name)})" if counts[name] > 1 else name for i, name in enumerate(names)]


def baseline_of(arms: Sequence[Arm], given: str | None) -> Arm:
    """Return the arm that the others are compared with.

    Args:
        arms: to choose from.
        given: an arm's name, or ``[point,]key=value[,key=value]`` that hold for one arm alone; None: the one arm in
            which no layer is replaced.

    Raises:
        ConfigError: if no arm is meant, or more than one, with the names of all.
    """
    known = few([arm.name for arm in arms])
    if given is None:
        plain = [arm for arm in arms if arm.plain]
        if len(plain) == 1:
            return plain[0]
        count = "no arm is" if not plain else f"{len(plain)} arms are"
        raise ConfigError(f"{count} without replaced layers; name one by baseline=ARM or baseline=key=value: {known}")
    named = [arm for arm in arms if arm.name == given]
    if not named and "=" in given:
        parts = re.split(r",\s*(?=[\w.]+=)", given)
        wanted = dict((part if "=" in part else f"{POINT}={part}").split("=", 1) for part in parts)
        named = [arm for arm in arms if all(_holds(arm, key, value) for key, value in wanted.items())]
    if len(named) != 1:
        count = "none" if not named else f"{len(named)} ({few([arm.name for arm in named])})"
        raise ConfigError(f"baseline={given} must mean one arm and means {count} of: {known}")
    return named[0]


def few(names: Sequence[str]) -> str:
    """Return names in a row, at most ``MOST_NAMES`` of them."""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return "; ".join(names[:MOST_NAMES]) + more


def _holds(arm: Arm, key: str, text: str) -> bool:
    """Return whether a key, in full or as the tables have it (``k``, ``backbone``), has a value in an arm."""
    places = [key, f"operator.{key}", f"{key}.name"]
    values = name_moving(arm.keys) | arm.values
    for run in arm.runs.values():
        values |= {name: run.keys[name] for name in NAMES if run.keys.get(name)}
    place = next((place for place in places if place in values), None)
    if place is None:
        return False
    try:
        wanted = yaml.safe_load(text)
    except yaml.YAMLError:
        wanted = text
    value = values[place]
    if is_number(value) and is_number(wanted):
        return float(value) == float(wanted)
    try:
        return is_missing(value) if wanted is None else show(value) == text or float(value) == float(text)
    except (TypeError, ValueError):
        return False


def differing(arm: Arm, other: Arm) -> list[str]:
    """Return the keys in which two arms differ, those of ``optim`` aside; ``swap`` for all that replaces layers.

    Without replaced layers in one of the two, the operator, the rule and the schedule are that one choice.
    """
    keys = [key for key in _unequal(arm.keys, other.keys) if not key.startswith("optim.")]
    if arm.plain != other.plain:
        return ["swap", *(key for key in keys if not key.startswith(SWAP))]
    return [key for key in keys if not (arm.plain and key.startswith(SWAP))]


def differing_settings(arm: Arm, other: Arm) -> dict[str, tuple[Any, Any]]:
    """Return the keys of ``optim`` in which two arms differ, with both values."""
    keys = [key for key in _unequal(arm.keys, other.keys) if key.startswith("optim.")]
    return {key: (arm.keys.get(key), other.keys.get(key)) for key in keys}


def other_test_images(arm: Arm, other: Arm) -> bool:
    """Return whether equal settings of the data stood for other test images in the two arms, as far as it is known."""
    if any(key.startswith("data.") and key != "data.content" for key in _unequal(arm.keys, other.keys)):
        return False
    found = [{run.test_content() for run in one.runs.values()} - {None} for one in (arm, other)]
    return all(found) and found[0].isdisjoint(found[1])


def _unequal(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return [key for key in dict.fromkeys([*a, *b]) if show(a.get(key)) != show(b.get(key))]
