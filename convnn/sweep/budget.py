"""The time that one call of a sweep may take: which points it still begins, and when it stops. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convnn.config.load import read_values
from convnn.config.overrides import key_of
from convnn.errors import ConfigError
from convnn.runs.metrics import epochs_done
from convnn.runs.status import COMPLETE
from convnn.runtime.files import read_json
from convnn.sweep.plan import Point, read_plan
from convnn.sweep.times import budget_seconds

SPENT = "the sweep's budget was spent"
"""Reason of a point that the end of the budget stopped."""


@dataclass(frozen=True)
class Budget:
    """When a call has to end, and what its points take."""

    folder: Path
    """Of the sweep."""
    deadline: float | None = None
    """Seconds since 1970; None: no limit."""
    clock: Callable[[], float] = time.time

    @classmethod
    def from_now(cls, folder: Path, text: str | None) -> Budget:
        """Return the budget of a call that begins now; ``text`` as of ``budget_seconds``."""
        seconds = budget_seconds(text)
        return cls(folder, None if seconds is None else time.time() + seconds)

    def left(self) -> float:
        """Return the seconds that are left; infinite without a limit."""
        return float("inf") if self.deadline is None else self.deadline - self.clock()

    def spent(self) -> bool:
        """Return whether no time is left."""
        return self.left() <= 0

    def admits(self, point: Point) -> bool:
        """Return whether a point may begin: it would end in time, as far as the points done so far tell."""
        if self.deadline is None:
            return True
        return not self.spent() and (self.expected(point) or 0) <= self.left()

    def expected(self, point: Point) -> float | None:
        """Return the seconds that a point will take, from now on; None where no point is complete yet.

        The longest time of the complete points most like it: those that share the most overrides with it, seeds
        aside. Of a point that was stopped, the epochs that are left count.
        """
        overrides = {p["fingerprint"]: p["overrides"] for p in read_plan(self.folder).get("points", [])}
        own, known = _settings(point.overrides), []
        for path in (self.folder / "status").glob("*.json"):
            record = read_json(path) or {}
            if record.get("status") == COMPLETE and isinstance(record.get("seconds"), (int, float)):
                known.append((len(own & _settings(overrides.get(path.stem, ()))), record["seconds"]))
        if not known:
            return None
        most = max(shared for shared, _ in known)
        return max(seconds for shared, seconds in known if shared == most) * _share_left(self.folder / point.folder)


def _settings(overrides: Any) -> set[str]:
    return {o for o in overrides if key_of(o) != "seed"}


def _share_left(run: Path) -> float:
    """Return the share of its epochs that a run still has to train."""
    done = epochs_done(run / "metrics.jsonl")
    if not done:
        return 1.0
    try:
        epochs = int(read_values(run)["train"]["epochs"])
    except (ConfigError, KeyError, TypeError, ValueError):
        return 1.0
    return max(0.0, 1 - done / max(epochs, 1))
