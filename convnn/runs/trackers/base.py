"""What a tool to watch runs in takes of a run: rows of metrics, pictures, tables, the final numbers."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeGuard

from convnn.config.schema import TrackerConfig

Row = Mapping[str, Any]


@dataclass(frozen=True)
class TrackedRun:
    """A run as it is introduced to a tool."""

    config: TrackerConfig
    folder: Path
    values: Mapping[str, Any] = field(default_factory=dict)
    """The whole configuration, nested."""
    rows: Sequence[Row] = ()
    """Those of the checkpoint that the run goes on from."""
    kind: str = "train"
    """``train``, or ``report`` for what a sweep says of its runs."""

    def id_from(self, name: str) -> str:
        """Return the run's name in a tool, 8 hexadecimal digits, which a file of its folder keeps across resumes."""
        path = self.folder / name
        if not path.exists():
            path.write_text(secrets.token_hex(4))
        return path.read_text().strip()


class RunTracker(ABC):
    """A run in one tool. Any method may raise, the constructor too; the run then goes on without the tool."""

    title: ClassVar[str]
    """What the tool is called in messages."""

    @abstractmethod
    def __init__(self, run: TrackedRun) -> None:
        """Begin the run in the tool, or go on with it: no step is there twice afterwards.

        Raises:
            ImportError: if the tool is not installed.
        """

    @abstractmethod
    def log(self, row: Row) -> None:
        """Add a row of metrics.jsonl, at its ``step``."""

    @abstractmethod
    def images(self, files: Sequence[Path]) -> None:
        """Add pictures, named after their files."""

    @abstractmethod
    def table(self, name: str, rows: Sequence[Row]) -> None:
        """Add a table whose rows have the same keys."""

    @abstractmethod
    def summary(self, values: Row) -> None:
        """Add the final numbers and texts of a run."""

    @abstractmethod
    def finish(self, exit_code: int) -> None:
        """Write out what is left, and close the run."""


def is_scalar(value: Any) -> TypeGuard[float | str]:
    """Return whether a value is a number or a text."""
    return isinstance(value, (int, float, str)) and not isinstance(value, bool)


def flat_row(row: Row) -> dict[str, float | str]:
    """Return the numbers and texts of a row, those of a layer as ``layers/NAME/KEY``."""
    flat = {key: value for key, value in row.items() if is_scalar(value)}
    for layer in row.get("layers", []):
        flat |= {f"layers/{layer['name']}/{k}": v for k, v in layer.items() if k != "name" and is_scalar(v)}
    return flat
