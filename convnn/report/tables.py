"""The results of many runs as tables: one row a run, and one row for each configuration over its seeds.

Columns with a dot in their name are the configuration keys that differ among the runs. Imports no torch, and pandas
only where a table is made.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convnn.errors import ConfigError
from convnn.report.results import POINT, FoundRuns, Run, find_results, integer_of, text_of, tidy
from convnn.runs.metrics import is_number
from convnn.runs.status import COMPLETE, DAMAGED, UNUSABLE
from convnn.text import Score, is_missing, show, sort_key

if TYPE_CHECKING:
    import pandas as pd

METRICS = {
    "top1_last": "test top-1 of the last epoch (%)",
    "top5_last": "test top-5 of the last epoch (%)",
    "top1_best_on_test": "best test top-1, chosen on the test set (%)",
    "top1_at_best_val": "test top-1 at the best validation epoch (%)",
    "val_top1_best": "best validation top-1 (%)",
}

COSTS = ("seconds", "params", "gflops", "images_per_second")
_INTEGERS = ("exit_code", "seed", "best_epoch", "epochs", "steps", "params", "peak_memory_bytes")
_SCALARS = (*METRICS, "best_epoch", "epochs", "steps", *COSTS, "peak_memory_bytes", "device")
_FIRST = (
    *(POINT, "experiment.name", "backbone.name", "data.name", "operator.name", "swap.name", "schedule.name"),
    *("operator.branch_ratio", "operator.k", "operator.blend"),
)
PLAIN = "no layer replaced"
"""What stands for the operator's keys of a plain backbone."""
ON_SPECTRUM = "on_spectrum"
"""Column: whether a run's layers have a blend, a k and a temperature; empty: not known."""


def import_pandas() -> Any:
    """Return pandas.

    Raises:
        ConfigError: if it, matplotlib or scipy is not installed.
    """
    try:
        import matplotlib  # noqa: F401
        import pandas
        import scipy  # noqa: F401
    except ImportError as error:
        raise ConfigError("needs pandas, matplotlib and scipy: uv sync --extra report") from error
    return pandas


def read_runs(folders: Sequence[Path]) -> pd.DataFrame:
    """Return the table of all runs below some folders, one row a run.

    Raises:
        ConfigError: if a folder is missing, or nothing is found at all.
    """
    return runs_frame(find_results(folders))


def runs_frame(found: FoundRuns) -> pd.DataFrame:
    """Return the table of the runs found; row i is ``found.runs[i]``."""
    pd = import_pandas()
    keys = _differing_keys(found.runs)
    rows = [_row(run, found, keys) for run in found.runs]
    versions = sorted({name for row in rows for name in row if name.startswith("version_")})
    before = ["name", "folder", "status", "reason", "exit_code", "log"]
    names = [*before, *keys, "seed", *_SCALARS, *versions, "fingerprint", ON_SPECTRUM]
    columns = {name: [row.get(name) for row in rows] for name in names}
    for key in keys:
        if any(isinstance(value, float) for value in columns[key]):
            columns[key] = [float(value) if type(value) is int else value for value in columns[key]]
    frame = pd.DataFrame(columns, dtype=object)
    types = {name: "Int64" if name in _INTEGERS else float for name in (*METRICS, *COSTS, *_INTEGERS)}
    return frame.astype(types)


def _row(run: Run, found: FoundRuns, keys: Sequence[str]) -> dict[str, Any]:
    values = {key: run.keys.get(key) for key in keys}
    row: dict[str, Any] = {key: tidy(value) if isinstance(value, str) else value for key, value in values.items()}
    row |= {"name": tidy(run.name), "folder": found.relative(run.folder), "log": found.relative(run.log)}
    row |= {"status": run.status, "reason": run.reason, "exit_code": run.exit_code, "fingerprint": run.fingerprint}
    row[ON_SPECTRUM] = run.on_spectrum
    row["seed"] = integer_of(run.keys.get("seed"))
    for name in _SCALARS:
        value = run.result.get(name)
        if name == "device":
            row[name] = text_of(value)
        elif name in _INTEGERS:
            row[name] = integer_of(value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            row[name] = value
    versions = run.result.get("versions")
    for name, value in versions.items() if isinstance(versions, dict) else ():
        row[f"version_{name}".replace(".", "_")] = tidy(str(value))
    return row


def _differing_keys(runs: Sequence[Run]) -> list[str]:
    """Return the dotted keys that differ among the runs."""
    whole = [run for run in runs if run.has_all_keys]
    partial = [run for run in runs if not run.has_all_keys]
    keys = []
    for key in dict.fromkeys(key for run in runs for key in run.keys if "." in key):
        values = {run.keys.get(key) for run in whole} | {run.keys[key] for run in partial if key in run.keys}
        if len(values) > 1:
            keys.append(key)
    for moving in [key for key in keys if key in MOVABLE]:  # a column says so even where it is the same for all runs
        keys += sorted({key for run in runs for key in _movers(run.keys, moving)} - set(keys))
    return sorted(keys, key=lambda key: _FIRST.index(key) if key in _FIRST else len(_FIRST))


MOVABLE = ("operator.blend", "operator.k", "operator.temperature")
"""Keys whose value is not what a run computed with where a schedule, a learned blend or a swap rule moves it."""

_SWAPS = re.compile(r"swap\.(match$|rules\.)")


def _movers(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return what moves ``key``, of values by dotted key: a schedule, a learned blend, values of rules."""
    name = key.removeprefix("operator.")
    found = {}
    for other, value in values.items():
        own = other.startswith("swap.") and other.endswith(f".{key}")
        learned = name == "blend" and other.endswith("operator.learn_blend") and value != "no"
        scheduled = other == f"schedule.{name}.shape" and value != "constant"
        if (own or learned or scheduled) and not is_missing(value):
            found[other] = value
    return found


def is_plain(values: Mapping[str, Any]) -> bool:
    """Return whether values by dotted key, ``swap.match`` among them, say that no layer is replaced."""
    return "swap.match" in values and all(is_missing(v) for key, v in values.items() if _SWAPS.match(key))


def without_operator(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by dotted key in which ``PLAIN`` stands for the operator's texts where no layer is replaced.

    These are its name and classes; numbers stay, since columns of them are numeric.
    """
    if not is_plain(values):
        return dict(values)
    return {key: PLAIN if key.startswith("operator.") and isinstance(v, str) else v for key, v in values.items()}


def name_moving(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration's values with the number of a key that something moves replaced by a text that says so.

    So no picture draws a scheduled or learned blend at the number that its configuration happens to have. Where no
    layer has a blend, as with ACmix, there is nothing in its place. Nor is a plain backbone called by an operator.
    """
    named, plain = without_operator(values), is_plain(values)
    for key in MOVABLE:
        if values.get(ON_SPECTRUM) is False and not plain:
            named |= {key: None} if key in values else {}
            continue
        movers = _movers(values, key) if is_number(values.get(key)) else {}
        if plain and key in values:
            named[key] = PLAIN
        elif any(other.endswith(".shape") for other in movers):
            named[key] = f"{next(v for other, v in movers.items() if other.endswith('.shape'))} schedule"
        elif any(other.endswith(".learn_blend") for other in movers):
            named[key] = f"learned from {show(values[key])}"
        elif movers:
            named[key] = f"{show(values[key])} and others"
    return named


def varying_keys(frame: pd.DataFrame) -> list[str]:
    """Return the columns that are configuration keys, the seed aside."""
    return [column for column in frame.columns if "." in column]


Places = Mapping[str, Mapping[Any, int]]


def name_places(frame: pd.DataFrame) -> Places:
    """Return the place of each value of the columns that hold names, in the order in which a table has them."""
    names = [key for key in varying_keys(frame) if key.endswith(".name")]
    return {key: {value: i for i, value in enumerate(dict.fromkeys(frame[key]))} for key in names}


def ordered(places: Places, keys: Sequence[str], values: Sequence[Any]) -> list[tuple[int, float, str]]:
    """Order values of some keys: names as ``places`` has them, ``PLAIN`` before them, the rest as ``sort_key`` does."""
    return [
        sort_key(value) if key not in places or is_missing(value) else (1, places[key].get(value, -1), "")
        for key, value in zip(keys, values, strict=True)
    ]


def grouped(frame: pd.DataFrame) -> list[tuple[tuple[Any, ...], list[int]]]:
    """Return the values of the varying keys and the rows that share them: names in their order, the rest sorted.

    Runs whose configuration is unknown are left out.
    """
    keys = varying_keys(frame)
    rows = zip(*(frame[key] for key in keys), strict=True) if keys else [()] * len(frame)
    unknown = (frame["status"] == DAMAGED) & frame["seed"].isna()
    groups: dict[tuple[Any, ...], list[int]] = {}
    for position, (values, left_out) in enumerate(zip(rows, unknown, strict=True)):
        if not left_out:
            groups.setdefault(tuple(None if is_missing(v) else v for v in values), []).append(position)
    places = name_places(frame)
    return sorted(groups.items(), key=lambda item: ordered(places, keys, item[0]))


def complete_groups(frame: pd.DataFrame) -> list[tuple[dict[str, Any], list[int]]]:
    """Return the varying keys of the configurations that have complete runs, and the rows of these runs, sorted.

    A value that something moves is named, see ``name_moving``.
    """
    keys, status = varying_keys(frame), list(frame["status"])
    found = []
    for values, positions in grouped(frame):
        rows = [i for i in positions if status[i] == COMPLETE]
        if rows:
            known = dict(zip(keys, values, strict=True)) | {ON_SPECTRUM: _known(frame, rows)}
            found.append((name_moving(known), rows))
    return found


def _known(frame: pd.DataFrame, rows: Sequence[int]) -> bool | None:
    """Return whether the layers of some runs of one configuration have a blend."""
    column = list(frame[ON_SPECTRUM])
    return next((column[i] for i in rows if column[i] is not None), None)


def summarize(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each configuration but the seed, from a table of runs.

    Only complete runs count: ``n`` of them; ``METRIC_mean``, ``METRIC_std`` (sample standard deviation, empty for one
    run) and ``METRIC_n``; and the means ``seconds``, ``params``, ``gflops`` and ``images_per_second``. ``n_failed``
    runs failed, and ``n_open`` are to do, running or stopped before their end.
    """
    pd = import_pandas()
    keys = varying_keys(frame)
    status = list(frame["status"])
    values = {name: [None if pd.isna(v) else float(v) for v in frame[name]] for name in (*METRICS, *COSTS)}
    complete = [i for i, s in enumerate(status) if s == COMPLETE]
    metrics = [m for m in METRICS if m == "top1_last" or any(values[m][i] is not None for i in complete)]
    rows = []
    for group, positions in grouped(frame):
        done = [i for i in positions if status[i] == COMPLETE]
        failed = sum(status[i] in UNUSABLE for i in positions)
        row: dict[str, Any] = dict(zip(keys, group, strict=True))
        row |= {"n": len(done), "n_failed": failed, "n_open": len(positions) - len(done) - failed}
        for name in (*metrics, *COSTS):
            numbers = [v for i in done if (v := values[name][i]) is not None]
            score = Score.of(numbers)
            row |= {name: score.mean} if name in COSTS else {f"{name}_{k}": v for k, v in score._asdict().items()}
        rows.append(row | {ON_SPECTRUM: _known(frame, done)})
    names = [f"{metric}_{part}" for metric in metrics for part in Score._fields]
    summary = pd.DataFrame(rows, columns=[*keys, "n", "n_failed", "n_open", *names, *COSTS, ON_SPECTRUM])
    for key in (*keys, ON_SPECTRUM):
        summary[key] = pd.Series([row[key] for row in rows], dtype=object)
    return summary


def named_operators(summary: pd.DataFrame) -> pd.DataFrame:
    """Return a summary for its file: as of ``without_operator``."""
    named, rows = summary.copy(), [without_operator(row) for row in summary.to_dict("records")]
    for key in varying_keys(summary):
        if key.startswith("operator."):
            named[key] = [row[key] for row in rows]
    return named


def score_of(row: Mapping[str, Any], metric: str) -> Score:
    """Return a metric in a row of a summary; of a metric that the summary lacks, the score of no runs."""
    return Score(*(row.get(f"{metric}_{part}", 0) for part in Score._fields))


def is_numeric(frame: pd.DataFrame, key: str) -> bool:
    """Return whether a key has numbers alone, two or more; those that something moves do not count."""
    if key in MOVABLE:
        named = [name_moving(row)[key] for row in frame.to_dict("records")]
        values: list[Any] = list({value for value in named if is_number(value)})
    else:
        values = values_of(frame, key)
    return len(values) > 1 and all(type(value) in (int, float) and math.isfinite(value) for value in values)


def values_of(frame: pd.DataFrame, key: str) -> list[Any]:
    """Return a key's distinct values, sorted; nothing is none."""
    return sorted({value for value in frame[key] if not is_missing(value)}, key=sort_key)


def main_keys(frame: pd.DataFrame) -> list[str]:
    """Return the varying keys without those that follow from the text-valued ones, as a patch size from the backbone.

    Names (``*.name``) are among them, but for those that follow from the name of a grid's point.
    """
    keys = varying_keys(frame)
    texts = {key for key in keys if not is_numeric(frame, key)}
    point = [key for key in keys if key == POINT]
    kept = point + [k for k in keys if k.endswith(".name") and k not in point and not _follows(frame, k, point)]
    for key in keys:
        if key not in kept and not _follows(frame, key, [k for k in kept if k in texts]):
            kept.append(key)
    return [key for key in keys if key in kept]


def _follows(frame: pd.DataFrame, key: str, others: list[str]) -> bool:
    if not others:
        return False
    found: dict[Any, Any] = {}
    for *given, value in frame[[*others, key]].itertuples(index=False, name=None):
        known = tuple(map(str, given))
        if str(found.setdefault(known, value)) != str(value):
            return False
    return True


def short_name(key: str) -> str:
    """Return a key as plots show it: ``k`` for operator.k, ``backbone`` for backbone.name."""
    return key.removesuffix(".name") if key.endswith(".name") else key.removeprefix("operator.")


def describe(values: Mapping[str, Any]) -> str:
    """Return keys and values as a label, such as ``resnet18, k=4``, without what they say twice or not at all."""
    shown = {key: show(v) for key, v in values.items() if not is_missing(v) and not _said(values, key)}
    bare = {key: key.endswith(".name") or text == PLAIN for key, text in shown.items()}
    parts = [text if bare[key] else f"{short_name(key)}={text}" for key, text in shown.items()]
    return ", ".join(dict.fromkeys(parts)) or (f"no {', '.join(map(short_name, values))}" if values else "all runs")


def _said(values: Mapping[str, Any], key: str) -> bool:
    """Return whether a key's value is in that of what it moves, see ``name_moving``, or moves nothing."""
    if key.startswith("swap.") and key != "swap.name" and PLAIN in values.values():
        return True
    if key.endswith("learn_blend"):
        return values[key] == "no"
    section, _, rest = key.partition(".")
    track, _, leaf = rest.partition(".")
    if section != "schedule" or not leaf:
        return False
    known = f"operator.{track}" in values
    return values.get(f"{section}.{track}.shape") == "constant" or (leaf == "shape" and known)


def labels_of(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[str]:
    """Return a label for each of some rows, no two alike."""
    labels: list[str] = []
    seen: Counter[str] = Counter()
    for row in rows:
        label = describe({key: row[key] for key in keys})
        seen[label] += 1
        labels.append(f"{label} ({seen[label]})" if seen[label] > 1 else label)
    return labels
