"""What scripts/analyze.py found of the runs: a section of the report, and analyses.csv. Imports no torch."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convnn.report.arms import arms_of
from convnn.report.content import Picture, Section, Table, copied_picture
from convnn.report.results import FoundRuns, Run, text_of
from convnn.runs.contents import ANALYSES
from convnn.runs.metrics import is_number
from convnn.runtime.files import read_json, sha256_of
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
    kept, others = _alike({run.folder: _kept(run) for arm in arms for run in arm.runs.values()})
    titles = {name: found.title for one in kept.values() for name, found in one.items()}
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
    if others:
        text += f" {others} results with other settings (images=, checkpoint=) than most are left out."
    return [Section("Analyses of the networks", text, _pictures(folders, titles, out), tables)]


@dataclass(frozen=True)
class _Kept:
    title: str
    headline: Mapping[str, Any]
    settings: str
    """All but the checkpoint's digest."""


def _kept(run: Run) -> dict[str, _Kept]:
    """Return what a run folder keeps of each analysis, by name; damaged files and other checkpoints' are left out."""
    kept: dict[str, _Kept] = {}
    for path in sorted((run.folder / ANALYSES).glob("*.json")):
        entry = read_json(path) or {}
        title, headline, settings = text_of(entry.get("title")), entry.get("headline"), entry.get("settings")
        if entry.get("analysis") != path.stem or not title:
            continue
        if not isinstance(headline, dict) or not isinstance(settings, dict):
            continue
        checkpoint = run.folder / "checkpoints" / f"{settings.get('checkpoint')}.pt"
        if not checkpoint.is_file() or sha256_of(checkpoint) == settings.get("sha256"):  # else it has been trained on
            how = json.dumps({key: value for key, value in settings.items() if key != "sha256"}, sort_keys=True)
            kept[path.stem] = _Kept(title, headline, how)
    return kept


def _alike(kept: Mapping[Path, dict[str, _Kept]]) -> tuple[dict[Path, dict[str, _Kept]], int]:
    """Return the results of the settings that most runs have, for each analysis, and how many others there are."""
    counts: dict[str, Counter[str]] = {}
    for one in kept.values():
        for name, found in one.items():
            counts.setdefault(name, Counter())[found.settings] += 1
    usual = {name: count.most_common(1)[0][0] for name, count in counts.items()}
    same = {
        folder: {name: found for name, found in one.items() if found.settings == usual[name]}
        for folder, one in kept.items()
    }
    return same, sum(map(len, kept.values())) - sum(map(len, same.values()))


def _numbers(kept: Mapping[str, _Kept]) -> dict[str, float]:
    return {name: float(v) for one in kept.values() for name, v in one.headline.items() if is_number(v)}


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
