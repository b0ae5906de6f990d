"""How many settings of the optimizer were tried for an arm. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convnn.report.arms import SWAP, Arm
from convnn.report.results import NAMES, find_results
from convnn.report.tables import is_plain
from convnn.runs.status import TODO
from convnn.text import show

TUNED = "optim."
_FREE = (
    *("seed", "data.val_fraction", "data.val_folder", "data.content", "data.limit_test"),
    *("train.epochs", "train.max_steps", "train.extended_from", "train.eval_batch_size"),
)
"""What a run that tries a setting may have otherwise than the arm: seed, validation and test, length."""


@dataclass(frozen=True)
class Trials:
    """What was tried for an arm."""

    count: int
    """Distinct settings of ``optim``."""
    nearest: list[str]
    """Where there is none: the keys in which the most similar run differs from the arm."""


def count_trials(arms: Sequence[Arm], folders: Sequence[Path]) -> dict[str, Trials]:
    """Return by arm's name how many distinct settings of ``optim`` the runs below some folders tried for it.

    A run is a trial of an arm if it equals it in all but ``optim``, the seed, how images are held out and how long it
    trains. Runs that failed or diverged were tried too; several seeds of one setting are one trial. In a plain arm the
    settings of operator, swap and schedule have no effect and do not count.

    Raises:
        ConfigError: if a folder is missing, or holds no runs.
    """
    tried: dict[frozenset[tuple[str, str]], set[tuple[Any, ...]]] = {}
    for run in find_results(folders).runs:
        if run.has_all_keys and run.status != TODO:
            setting = tuple(sorted((key, show(v)) for key, v in run.keys.items() if key.startswith(TUNED)))
            tried.setdefault(_rest(run.keys), set()).add(setting)
    found = {}
    for arm in arms:
        own = _rest(arm.keys)
        nearest = [] if own in tried else min((_differing(own, other) for other in tried), key=len, default=[])
        found[arm.name] = Trials(len(tried.get(own, ())), nearest)
    return found


def _differing(one: frozenset[tuple[str, str]], other: frozenset[tuple[str, str]]) -> list[str]:
    return sorted({key for key, _ in one ^ other})


def _rest(keys: Mapping[str, Any]) -> frozenset[tuple[str, str]]:
    """Return what a trial and its arm have in common."""
    left_out = (TUNED, *(SWAP if is_plain(keys) else ()))
    return frozenset(
        (key, show(value))
        for key, value in keys.items()
        if key not in _FREE and key not in NAMES and not key.startswith(left_out)
    )
