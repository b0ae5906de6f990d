"""The files of an analysis: a picture, and a table over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convnn.analysis.base import Analysis, ArmResults, Mean, headline_means, series_means
from convnn.figures.style import save_figure
from convnn.runtime.owned import Owner, naming
from convnn.train.predictions import csv_text

_DPI = 80


def write_analysis(out: Path, name: str, analysis: Analysis, arms: Sequence[ArmResults]) -> list[Path]:
    """Write ``NAME.png``, ``NAME.svg`` and ``NAME.csv`` into a folder, all of them or none; return the files.

    The table has a row for each arm and number: a number of the headline (``at`` is empty), or a series at a place;
    with the mean over seeds, its t interval of 95 % and the seeds.

    Raises:
        ConfigError: if a file would replace one that this analysis did not write.
        OSError: if the disk refuses.
    """
    arms = arms if analysis.compare is None else analysis.compare(arms)
    figure = analysis.draw(arms)
    with Owner("analysis", f".convnn-analysis-{name}").written_aside(out) as aside:
        with naming(aside / f"{name}.csv"):
            (aside / f"{name}.csv").write_bytes(csv_text(*table(analysis, arms)))
        save_figure(figure, aside / name, dpi=_DPI)
        written = sorted(file.name for file in aside.iterdir())
    return [out / file for file in written]


def table(analysis: Analysis, arms: Sequence[ArmResults]) -> tuple[list[str], list[list[Any]]]:
    """Return the header and the rows of an analysis' table."""
    keys = list(dict.fromkeys(key for arm in arms for key in arm.values))
    rows = []
    for arm in arms:
        first = [arm.name, *(_cell(arm.values.get(key)) for key in keys)]
        rows += [[*first, what, "", *_cells(mean)] for what, mean in headline_means(arm, analysis.headline).items()]
        series = dict.fromkeys(what for result in arm.results.values() for what in result.get("series", {}))
        for what in series:
            rows += [[*first, what, at, *_cells(mean)] for at, mean in zip(*series_means(arm, what), strict=True)]
    return ["arm", *keys, "measure", "at", "mean", "low", "high", "n"], rows


def _cells(mean: Mean) -> list[Any]:
    return [*map(_cell, (mean.mean, mean.low, mean.high)), mean.n]


def _cell(value: Any) -> Any:
    if value is None or value != value:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value
