"""What run folders and sweep folders hold, read defensively: damaged files become a reason, not an error.

Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from convnn.config.identity import NOT_IDENTITY, fingerprint_of, identity_of
from convnn.errors import ConfigError
from convnn.runs.contents import is_run_folder
from convnn.runs.metrics import epochs_done
from convnn.runs.record import read_record
from convnn.runs.status import COMPLETE, DAMAGED, TODO, UNFINISHED, UNUSABLE
from convnn.text import show

POINT = "point.name"
"""Name of a grid's point."""
NAMES = (POINT, "experiment.name", "swap.name", "schedule.name", "train.name")
"""Keys that no configuration has: what the points of a sweep, and the options chosen for them, are called."""


@dataclass
class Run:
    """A run folder, or a point of a sweep that has none yet."""

    name: str
    folder: Path
    status: str = TODO
    reason: str | None = None
    exit_code: int | None = None
    log: Path | None = None
    fingerprint: str | None = None
    keys: dict[str, Any] = field(default_factory=dict)
    """The configuration's leaves by dotted key, and ``NAMES``."""
    has_all_keys: bool = False
    """``keys`` is the whole configuration, not only a sweep's overrides."""
    on_spectrum: bool | None = None
    """Whether any of a complete run's layers has a blend, a k and a temperature; None: its metrics do not say."""
    result: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    def priority(self) -> int:
        """Return a number by which the run that counts, of several of one configuration, is the highest."""
        return (self.status != TODO) + self.has_all_keys + 4 * (self.status == COMPLETE)

    def started(self) -> float:
        """Return when the run last began, in seconds; of folders that do not say it, when they were written."""
        try:
            return datetime.fromisoformat(self.environment["started"]).timestamp()
        except (KeyError, TypeError, ValueError):
            pass
        try:
            return self.folder.stat().st_mtime
        except OSError:
            return 0.0

    def content(self) -> str | None:
        """Return a hash of the classes and images that the run had; None of before runs kept it."""
        data = self.result.get("data")
        if not isinstance(data, Mapping):
            return None
        kept = json.dumps([data.get("classes"), data.get("content")], sort_keys=True)
        return hashlib.sha256(kept.encode()).hexdigest()[:8]

    def test_content(self) -> str | None:
        """Return the hash of the test images that the run had; None of before runs kept it."""
        data = self.result.get("data")
        content = data.get("content") if isinstance(data, Mapping) else None
        return text_of(content.get("test")) if isinstance(content, Mapping) else None


@dataclass
class FoundRuns:
    """What was found in some folders."""

    base: Path
    """Paths are shown relative to it."""
    runs: list[Run] = field(default_factory=list)
    commands: list[list[str]] = field(default_factory=list)
    """Of the sweeps."""
    sweeps: list[str] = field(default_factory=list)
    """Their names."""
    invalid: list[tuple[str, str]] = field(default_factory=list)
    """Overrides of a point that is no valid configuration, and the reason."""
    duplicates: int = 0
    """Runs left out because another of the same configuration and data counts."""
    conflicts: list[str] = field(default_factory=list)
    """Where those had another result, a line for each."""

    def relative(self, path: Path | None) -> str | None:
        """Return a path relative to ``base``, without the home directory."""
        if path is None:
            return None
        outside = self.base == Path(self.base.anchor)
        return tidy(str(path) if outside else os.path.relpath(path, self.base))


def tidy(text: str) -> str:
    """Return text on one line, encodable, with ``~`` for the home directory."""
    try:
        home = str(Path.home())
    except RuntimeError:  # there is none
        home = ""
    if len(home) > 1:
        text = re.sub(re.escape(home) + r"(?![\w.-])", "~", text)
    return " ".join(text.encode(errors="replace").decode().split())


def find_results(folders: Sequence[Path]) -> FoundRuns:
    """Read all runs and sweeps below some folders; each configuration counts once.

    Raises:
        ConfigError: if a folder is missing, or nothing is found at all.
    """
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder")
    roots = [folder.resolve() for folder in folders]
    common = Path(os.path.commonpath(roots))
    found = FoundRuns(common.parent if (common / "config.yaml").exists() else common)
    runs: dict[Path, Run] = {}
    sweeps = []
    for path, kind in dict.fromkeys(one for root in roots for one in _find_folders(root)):
        if kind == "sweep":
            sweeps.append(path)
        else:
            runs[path] = _read_run(path)
    for sweep in sweeps:
        _read_sweep(sweep, runs, found)
    if not runs and not found.invalid:
        raise ConfigError(f"no runs in {', '.join(map(str, folders))}: no config.yaml or plan.json below")
    _name_contents(list(runs.values()))
    found.runs = _without_duplicates(list(runs.values()), found)
    _share_names(found.runs)
    found.duplicates = len(runs) - len(found.runs)
    return found


def _find_folders(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield the folders of sweeps and runs below a folder, each with its kind; nothing lies inside a run's folder."""
    for path, folders, files in os.walk(root):
        if "plan.json" in files:
            yield Path(path), "sweep"
        elif "config.yaml" in files and _is_run(Path(path), files):
            yield Path(path), "run"
            folders.clear()
        folders[:] = sorted(f for f in folders if not f.startswith("."))


def _is_run(folder: Path, files: Sequence[str]) -> bool:
    """Return whether a folder with a config.yaml is a run's, and not some other project's."""
    if not {"result.json", "metrics.jsonl", "env.json", "train.log"}.isdisjoint(files) or is_run_folder(folder):
        return True
    try:
        return b"backbone:" in (folder / "config.yaml").read_bytes()
    except OSError:
        return True  # to be listed as damaged


def _name_contents(runs: list[Run]) -> None:
    """Give runs a key ``data.content`` where equal settings stand for different data, lest a mean be over both."""
    same: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        settings = tuple(sorted((key, str(v)) for key, v in run.keys.items() if key.startswith("data.")))
        same.setdefault(settings, []).append(run)
    for group in same.values():
        if len({run.content() for run in group} - {None}) > 1:
            for run in group:
                run.keys["data.content"] = run.content()


def _share_names(runs: list[Run]) -> None:
    """Give runs of one configuration but the seed the same names, lest two sweeps' names part their mean."""
    settings = [
        tuple(sorted((key, str(v)) for key, v in run.keys.items() if key != "seed" and key not in NAMES))
        for run in runs
    ]
    named: dict[tuple[Any, ...], dict[str, Any]] = {}
    for run, same in zip(runs, settings, strict=True):
        for key in NAMES:
            if run.keys.get(key):
                named.setdefault(same, {}).setdefault(key, run.keys[key])
    for run, same in zip(runs, settings, strict=True):
        run.keys |= named.get(same, {})


def _without_duplicates(runs: list[Run], found: FoundRuns) -> list[Run]:
    """Return of the runs of one configuration and data the one that counts: a complete one, of several the newest."""
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.fingerprint or id(run), []).append(run)
    kept = []
    for group in groups.values():
        contents = dict.fromkeys(run.content() for run in group if run.content()) or {None: None}
        first = next(iter(contents))  # runs that do not say what data they had go with the first
        for content in contents:
            same = [run for run in group if (run.content() or first) == content]
            best = max(same, key=lambda run: (run.priority(), run.started()))
            kept.append(best)
            found.conflicts += [
                _conflict(best, run, found) for run in same if _scores(run) not in (None, _scores(best))
            ]
    return kept


def _scores(run: Run) -> dict[str, Any] | None:
    """Return the accuracies of a complete run."""
    return {k: v for k, v in run.result.items() if "top" in k} if run.status == COMPLETE else None


def _conflict(best: Run, other: Run, found: FoundRuns) -> str:
    """Say which of two results counts, with the commits where they differ."""
    commits = [run.environment.get("git_commit") for run in (best, other)]

    def told(run: Run, commit: Any) -> str:
        parts = [f"top-1 {show(run.result.get('top1_last'))}", str(run.environment.get("started", "no date"))]
        parts += [f"commit {str(commit)[:10] if commit else 'unknown'}"] * (commits[0] != commits[1])
        return tidy(f"{found.relative(run.folder)} ({', '.join(parts)})")

    newest, older = (told(run, commit) for run, commit in zip((best, other), commits, strict=True))
    return f"of two results of one configuration the newest counts: {newest}, not {older}"


def _read_run(folder: Path) -> Run:
    run = Run(folder.name, folder, UNFINISHED)
    try:
        values = yaml.load((folder / "config.yaml").read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        identity = identity_of(values)
        run.keys, run.has_all_keys = dict(_leaf_values(identity)), True
        run.fingerprint = fingerprint_of(identity)
    except (OSError, ValueError, yaml.YAMLError) as error:
        problem = getattr(error, "problem", None) or error
        run.status, run.reason = DAMAGED, f"config.yaml is damaged: {tidy(str(problem))[:120]}"
    except (TypeError, KeyError, AttributeError, RecursionError):
        run.status, run.reason = DAMAGED, "config.yaml is damaged: it is not the configuration of a run"
    environment, _ = _read_json(folder / "env.json")
    run.environment = environment or {}
    run.log = folder / "train.log" if (folder / "train.log").exists() else None
    _read_result(run)
    return run


def _read_result(run: Run) -> None:
    result, problem = _read_json(run.folder / "result.json")
    if result is not None and not isinstance(result.get("status"), str):
        result, problem = None, "it has no status"
    if problem:
        run.status = DAMAGED
        run.reason = "; ".join(filter(None, [run.reason, f"result.json is damaged: {problem}"]))
    elif result is None:
        run.result = {"epochs": epochs_done(run.folder / "metrics.jsonl")}
    elif run.status != DAMAGED:
        run.result, run.status = result, tidy(result["status"])
        run.reason, run.exit_code = text_of(result.get("reason")), integer_of(result.get("exit_code"))
        known, record = text_of(result.get("fingerprint")), read_record(run.folder)
        if run.status == COMPLETE and known and known != run.fingerprint:
            run.status, run.reason = DAMAGED, "config.yaml is not that of result.json: their fingerprints differ"
        elif record.complete and record.damage and (run.folder / "metrics.jsonl").exists():
            run.status, run.reason = DAMAGED, record.damage
        if run.status == COMPLETE:
            run.on_spectrum = _has_spectrum(record.whole_rows)
        run.fingerprint = known or run.fingerprint


def _has_spectrum(rows: Sequence[Mapping[str, Any]]) -> bool | None:
    """Return whether any layer of the last epoch has a blend; None if the rows do not list the layers."""
    layers = rows[-1].get("layers") if rows else None
    return any(isinstance(one, dict) and "blend" in one for one in layers) if isinstance(layers, list) else None


def _read_json(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """Return a file's mapping, or None and what is wrong with it (None: it does not exist)."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError, RecursionError) as error:
        return None, tidy(str(error))[:120]
    return (value, None) if isinstance(value, dict) else (None, "it holds no mapping")


def _leaf_values(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaf_values(value, f"{prefix}{key}.")
        else:
            plain = isinstance(value, (bool, float, str)) or value is None or integer_of(value) is not None
            yield f"{prefix}{key}", value if plain else json.dumps(value)


def text_of(value: Any) -> str | None:
    """Return a text on one line, or None if the value is none."""
    return tidy(value) if isinstance(value, str) else None


def integer_of(value: Any) -> int | None:
    """Return an integer of at most 64 bits, or None if the value is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 else None


def _read_sweep(folder: Path, runs: dict[Path, Run], found: FoundRuns) -> None:
    """Add a sweep's points to ``runs``, and to those there what the sweep knows of them."""
    plan, problem = _read_json(folder / "plan.json")
    if plan is None:
        runs[folder] = Run(folder.name, folder, DAMAGED, f"plan.json is damaged: {problem}")
        return
    if isinstance(plan.get("command"), list):
        found.commands.append([str(part) for part in plan["command"]])
    found.sweeps.append(text_of(plan.get("name")) or folder.name)
    for point in _mappings(plan.get("invalid")):
        found.invalid.append((" ".join(_overrides(point)), text_of(point.get("reason")) or "no reason given"))
    known: dict[Any, Run] = {}
    bare = []
    for point in _mappings(plan.get("points")):
        path = Path(os.path.realpath(folder / str(point.get("folder", f"points/{point.get('name')}"))))
        run = runs[path] = runs.pop(path, Run(str(point.get("name", path.name)), path))  # to the end: the plan's order
        run.name = str(point.get("name", run.name))
        run.fingerprint = run.fingerprint or text_of(point.get("fingerprint"))
        _apply_status(run, folder, _read_json(folder / "status" / f"{point.get('fingerprint')}.json")[0] or {})
        overrides, label = _overrides(point), text_of(point.get("label"))
        own = _keys_of(overrides) | ({POINT: label} if label else {})
        if run.has_all_keys:
            run.keys |= {key: value for key, value in own.items() if key in NAMES}
            known.setdefault(_swept_keys(overrides), run)
        else:
            bare.append((run, overrides, own))
    for run, overrides, own in bare:
        sibling = known.get(_swept_keys(overrides))
        run.keys = {key: v for key, v in sibling.keys.items() if key not in NAMES} | own if sibling else own
        run.has_all_keys = sibling is not None


def _mappings(values: Any) -> list[dict[str, Any]]:
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def _overrides(point: Mapping[str, Any]) -> list[str]:
    values = point.get("overrides")
    return [str(value).lstrip("+") for value in values] if isinstance(values, list) else []


def _apply_status(run: Run, sweep: Path, status: Mapping[str, Any]) -> None:
    """Take over what a status file says, unless the run's own result says that it is complete."""
    if isinstance(status.get("log"), str):
        run.log = sweep / status["log"]
    state = text_of(status.get("status"))
    if state is None or run.status == COMPLETE or (run.status == DAMAGED and state not in UNUSABLE):
        return
    if state == COMPLETE:
        if run.status in (TODO, UNFINISHED):
            run.reason = "the sweep says that it is complete, but it has no result.json"
            run.status = DAMAGED
        return
    run.status = state
    run.reason = text_of(status.get("reason")) or run.reason
    code = integer_of(status.get("exit_code"))
    run.exit_code = run.exit_code if code is None else code


def _swept_keys(overrides: list[str]) -> frozenset[str]:
    """Return which keys a point sets and which groups it chooses: alike in points that differ in values alone."""
    keys = (override.partition("=")[0] for override in overrides)
    return frozenset(key if _is_leaf(key) else override for key, override in zip(keys, overrides, strict=True))


def _keys_of(overrides: list[str]) -> dict[str, Any]:
    """Return the leaves of an identity that overrides set; ``group=option`` counts as ``group.name``."""
    pairs = [override.partition("=")[::2] for override in overrides if "=" in override]
    pairs = [(key, text) for key, text in pairs if key.split(".")[0] not in NOT_IDENTITY]
    return {key if _is_leaf(key) else f"{key}.name": _value(text) for key, text in pairs}


def _is_leaf(key: str) -> bool:
    return "." in key or key == "seed"


def _value(text: str) -> Any:
    """Return an override's value as config.yaml would have it."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return json.dumps(value) if isinstance(value, (list, dict)) else value
