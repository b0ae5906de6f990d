"""What a stage of gpu_check.py is: parts that start processes of their own and leave rows. Imports no torch."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_verdicts import Row

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Context:
    """What all stages are told."""

    device: str
    """``cuda`` or ``cpu``."""
    gpus: int
    tiny: bool
    data: tuple[str, ...] | None
    """Overrides that name CIFAR-10's images; None: there are none."""
    row_epochs: int | None
    seed: int

    def arm(self, *overrides: str) -> list[str]:
        """Return the overrides of a run that leaves nothing but numbers."""
        own = ["tracker=jsonl", "diagnostics.enabled=false", "checkpoint.predictions=off", f"seed={self.seed}"]
        return [*overrides, *own, f"device={self.device}"]


@dataclass(frozen=True)
class Unit:
    """A part of a stage: commands that run one after another, and what they leave."""

    name: str
    commands: Callable[[Path, float], list[list[str]]]
    """Given a folder of its own and the seconds that it may take."""
    read: Callable[[Path], list[Row]]
    """Rows, perhaps of half the work, from the folder."""
    least: float = 15.0
    """Seconds below which it is not begun."""
    ends: tuple[int, ...] = (0,)
    """Exit codes of a unit that came to its end."""
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """Something to be found out."""

    name: str
    about: str
    weight: float
    """Its share of the time that is left, beside those of the stages after it."""
    units: Callable[[Context], list[Unit]]
    judge: Callable[[list[Row]], tuple[str, str]]
    """``pass``, ``fail`` or ``figure``, and a line that says so."""


def script(name: str) -> list[str]:
    """Return the beginning of the command of a program of this repository."""
    return [sys.executable, str(ROOT / name)]


def read_csv(path: Path) -> list[Row]:
    """Return the rows of a CSV file; none if there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_rows(folder: Path) -> list[Row]:
    """Return what a process wrote of a plan."""
    path = folder / "rows.json"
    return json.loads(path.read_text()) if path.is_file() else []


def steps(folder: Path, **plan: Any) -> list[str]:
    """Write a plan for gpu_steps.py; return the arguments of its process."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(plan))
    return [str(ROOT / "scripts" / "gpu_steps.py"), str(folder)]
