"""What scripts/analyze.py found of the runs: a section of the report, and analyses.csv. Imports no torch."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convnn.report.arms import arms_of
from convnn.report.content import Picture, Section, Table, copied_picture
from convnn.report.results import FoundRuns, Run, text_of
from convnn.runs.contents import ANALYSES
from convnn.runs.metrics import is_number
from convnn.runtime.files import read_json
from convnn.runtime.owned import naming
from convnn.text import Score

if TYPE_CHECKING:
    import pandas as pd

CSV = "analyses.csv"


def analysis_sections(
    folders: Sequence[Path], found: FoundRuns, frame: pd.DataFrame, summary: pd.DataFrame, out: Path
) -> list[Section]:
    """Return a section with the numbers that the run folders keep, and the pictures; none where there are none.

    Args:
        folders: of the report; pictures are those in ``analyses/`` of one of them.
        found: the runs.
        frame: of the same, see ``runs_frame``.
        summary: of the frame, see ``summarize``.
        out: where ``analyses.csv``, a row a run, and copies of the pictures go.

    Raises:
        OSError: if the disk refuses.
    """
    arms = arms_of(found, frame, summary, "top1_last")
    kept = {run.folder: _kept(run) for arm in arms for run in arm.runs.values()}
    titles = {name: title for one in kept.values() for name, (title, _) in one.items()}
    if not titles:
        return []
    numbers = {folder: _numbers(one) for folder, one in kept.items()}
    names = list(dict.fromkeys(name for row in numbers.values() for name in row))
    rows: list[list[Any]] = []
    with naming(out / CSV), (out / CSV).open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["arm", "seed", "folder", *names])
        for arm in arms:
            for seed, run in arm.runs.items():
                own = numbers[run.folder]
                table.writerow([arm.name, seed, found.relative(run.folder), *(own.get(name, "") for name in names)])
            scores = [Score.of([n[name] for run in arm.runs.values() if name in (n := numbers[run.folder])])
                      for name in names]  # fmt: skip
            rows.append([arm.name, *map(_cell, scores)])
    tables: list[Table] = [(["arm", *names], rows)]
    text = "By scripts/analyze.py (docs/analyses.md says what each number means); mean ± standard deviation over seeds."
    return [Section("Analyses of the networks", text, _pictures(folders, titles, out), tables)]


def _kept(run: Run) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Return title and numbers of each analysis that a run folder keeps, by name; damaged files are left out."""
    kept: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for path in sorted((run.folder / ANALYSES).glob("*.json")):
        entry = read_json(path) or {}
        title, headline = text_of(entry.get("title")), entry.get("headline")
        if entry.get("analysis") == path.stem and title and isinstance(headline, dict):
            kept[path.stem] = (title, headline)
    return kept


def _numbers(kept: Mapping[str, tuple[str, Mapping[str, Any]]]) -> dict[str, float]:
    return {name: float(v) for _, headline in kept.values() for name, v in headline.items() if is_number(v)}


def _cell(score: Score) -> str:
    if not score.n:
        return "–"
    return f"{score.mean:.4g}" + (f" ± {score.std:.2g}" if score.n > 1 else "") + f" (n={score.n})"


def _pictures(folders: Sequence[Path], titles: Mapping[str, str], out: Path) -> list[Picture]:
    pictures = []
    for name, title in titles.items():
        for place in (folder / ANALYSES for folder in folders):
            caption = "Mean over seeds with 95 % intervals; the numbers are in the table that lies beside it."
            if picture := copied_picture(place, name, out / f"analysis_{name}", title, caption):
                pictures.append(picture)
                break
    return pictures
