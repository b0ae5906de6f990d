"""What a run's result.json and metrics.jsonl say together, and whether they agree. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convnn.runs.metrics import is_number, read_metrics
from convnn.runs.status import COMPLETE
from convnn.runtime.files import read_json

_LAST = {"top1_last": "test_top1", "top5_last": "test_top5"}
_BEST = {"top1_best_on_test": "test_top1", "val_top1_best": "val_top1"}
"""Keys of result.json, and the column of metrics.jsonl whose last or highest value each is."""
_NUMBERS = (*_LAST, *_BEST, "epochs", "params", "gflops", "images_per_second", "classes")


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return the content of result.json, or None if there is none, or it is damaged or not what a run writes."""
    result = read_json(folder / "result.json")
    if result is None or not isinstance(result.get("status"), str):
        return None
    if any(result.get(key) is not None and not is_number(result[key]) for key in _NUMBERS):
        return None
    return result if result["status"] != COMPLETE or is_number(result.get("top1_last")) else None


@dataclass(frozen=True)
class Record:
    """A run's two files."""

    result: dict[str, Any] | None
    """None: there is none, or it cannot be read."""
    rows: list[dict[str, Any]]
    """Of metrics.jsonl, up to the first damaged one."""
    damage: str | None
    """Why the numbers cannot be trusted; None: nothing speaks against them."""

    @property
    def complete(self) -> bool:
        """Whether the run came to its end; its numbers count if there is no ``damage`` besides."""
        return self.result is not None and self.result["status"] == COMPLETE

    @property
    def whole_rows(self) -> list[dict[str, Any]]:
        """The rows, none if the run is complete and they are not all of its epochs."""
        return [] if self.complete and self.damage else self.rows


def read_record(folder: Path) -> Record:
    """Read a run folder; a complete run's epochs are held against its result."""
    result, rows = read_result(folder), read_metrics(folder / "metrics.jsonl")
    if result is None:
        exists = (folder / "result.json").exists()
        return Record(None, rows, "result.json cannot be read" if exists else None)
    return Record(result, rows, damage_of(result, rows) if result["status"] == COMPLETE else None)


def damage_of(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Return how a complete run's metrics.jsonl contradicts its result.json, or None."""
    epochs = result.get("epochs")
    if not is_number(epochs):
        return "result.json does not say how many epochs there were"
    found = [row["epoch"] for row in rows]
    whole = next((i for i, epoch in enumerate(found) if epoch != i), len(found))
    if whole != epochs or len(found) != epochs:
        return f"metrics.jsonl has {whole} whole epochs in a row, result.json {epochs}"
    if any(not is_number(row.get("test_top1")) for row in rows):
        return "metrics.jsonl lacks the test_top1 of an epoch"
    for key, column in (_LAST | _BEST).items():
        values = [row[column] for row in rows if is_number(row.get(column))]
        expected = result.get(key)
        if not values or not is_number(expected):
            continue
        value = values[-1] if key in _LAST else max(values)
        if value != expected:
            return f"{key} is {expected:g} in result.json and {value:g} in metrics.jsonl"
    return None
