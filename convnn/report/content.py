"""What a report holds: tables and pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from convnn.figures.hints import Hint
from convnn.report.tables import COSTS, METRICS, main_keys, name_moving, score_of, short_name, varying_keys
from convnn.runs.status import COMPLETE, UNUSABLE
from convnn.runtime.owned import naming
from convnn.text import aligned, show

if TYPE_CHECKING:
    import pandas as pd

    from convnn.report.compare import Differences


@dataclass
class Picture:
    """A plot in the report's folder, as ``NAME.png`` and ``NAME.svg``."""

    name: str
    title: str
    caption: str
    png: Path
    svg: Path
    hints: Sequence[Hint] = ()
    """What its points say."""


def copied_picture(folder: Path, name: str, copy: Path, title: str, caption: str) -> Picture | None:
    """Return a picture that another program left as ``NAME.png`` and ``NAME.svg``, copied; None where it did not.

    Args:
        folder: that has it.
        name: of its files.
        copy: its place in the report's folder, without the ending.
        title: of the picture.
        caption: below it.
    """
    files = [folder / f"{name}.{kind}" for kind in ("png", "svg")]
    if not all(file.is_file() for file in files):
        return None
    png, svg = (copy.parent / f"{copy.name}{file.suffix}" for file in files)
    for file, target in zip(files, (png, svg), strict=True):
        content = file.read_bytes()
        with naming(target):
            target.write_bytes(content)
    return Picture(copy.name, title, caption, png, svg)


MAX_TEXT_ROWS = 60
MAX_RUNS = 2
"""Runs whose own pictures a report holds."""

_COST_NAMES = {"seconds": "seconds", "params": "M params", "gflops": "GFLOPs", "images_per_second": "images/s"}
Table = tuple[list[str], list[list[str]]]
"""Header and rows."""


@dataclass
class Section:
    """A part of a page beside the tables and pictures of accuracy, such as an analysis of the trained networks."""

    title: str
    text: str = ""
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


@dataclass
class Report:
    """What a report holds."""

    runs: pd.DataFrame
    summary: pd.DataFrame
    metric: str
    out: Path
    subject: str
    """What the runs are: names of the sweeps, data, epochs."""
    invalid: list[tuple[str, str]]
    """Overrides of points that are no valid configuration, and the reasons."""
    commands: list[str]
    """Of the sweeps, each once."""
    run_commands: list[str]
    """Of the runs, those of a sweep's points among them."""
    environments: Table
    """Versions and hardware, with the number of runs."""
    duplicates: int
    conflicts: list[str] = field(default_factory=list)
    """Where a run that was left out had another result than the one that counts."""
    pictures: list[Picture] = field(default_factory=list)
    differences: Differences | None = None
    """Of the arms to a baseline; None: there are not two, or no baseline."""
    verdict: str = ""
    """What the differences say, or how to have them."""
    difference_pictures: list[Picture] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    """Further ones, below the pictures."""

    def counts(self) -> str:
        """Say how many runs there are of each status."""
        counts = ", ".join(f"{n} {status}" for status, n in Counter(self.runs["status"]).most_common())
        text = f"{len(self.runs)} runs" + (f": {counts}" if counts else "")
        if self.duplicates:
            text += f"; {self.duplicates} more of the same configurations left out"
        return text

    def all_pictures(self) -> list[Picture]:
        """Return the pictures of all sections."""
        further = (picture for section in self.sections for picture in section.pictures)
        return [*self.pictures, *self.difference_pictures, *further]

    def table(self) -> Table:
        """Return the summary with its numbers formatted."""
        keys = main_keys(self.summary)
        metrics = [m for m in METRICS if m != "top5_last" or m == self.metric]
        metrics = [self.metric, *(m for m in metrics if m != self.metric and f"{m}_mean" in self.summary)]
        header = [*keys, *(metric_title(m) for m in metrics), *_COST_NAMES.values(), "failed", "open"]
        rows = []
        for row in map(name_moving, self.summary.to_dict("records")):
            cells = [show(row[key]) for key in keys] + [str(score_of(row, m)) for m in metrics]
            costs = [row[name] / 1e6 if name == "params" else row[name] for name in COSTS]
            rows.append(
                cells + [show(float(f"{cost:.4g}")) for cost in costs] + [str(row["n_failed"]), str(row["n_open"])]
            )
        return header, rows

    def follows(self) -> str:
        """Name the keys that differ but are not in the table, since they follow from those that are."""
        shown = main_keys(self.summary)
        left_out = [key for key in varying_keys(self.summary) if key not in shown]
        return f"Also different, following from the columns shown: {', '.join(left_out)}." if left_out else ""

    def problems(self) -> Table:
        """Return the failed runs."""
        failed = self.runs[self.runs["status"].isin(UNUSABLE)]
        names = ["name", "status", "reason", "log"]
        return names, [[show(row[name]) for name in names] for row in failed.to_dict("records")]

    def open_runs(self) -> Table:
        """Return the runs that are neither complete nor failed."""
        rest = self.runs[~self.runs["status"].isin([*UNUSABLE, COMPLETE])]
        names = ["name", "status", "epochs", "reason", "log"]
        return names, [[show(row[name]) for name in names] for row in rest.to_dict("records")]

    def text(self) -> str:
        """Return the summary as an aligned table, and where the files are."""
        header, rows = self.table()
        text = [
            f"{self.subject}; {self.counts()}",
            "",
            aligned([short_name(name) for name in header], rows[:MAX_TEXT_ROWS]),
        ]
        if len(rows) > MAX_TEXT_ROWS:
            text.append(f"... and {len(rows) - MAX_TEXT_ROWS} more rows in summary.csv")
        text += ["", *(f"warning: {conflict}" for conflict in self.conflicts)] if self.conflicts else []
        _, problems = self.problems()
        text += ["", *(f"{name}: {status}: {reason} ({log})" for name, status, reason, log in problems[:20])]
        if len(problems) > 20:
            text.append(f"... and {len(problems) - 20} more in table.md")
        text += [self.verdict] * bool(self.verdict)
        names = ["index.html", "table.md", "summary.csv", "results.csv"]
        names += ["differences.csv", "matched.csv"] * (self.differences is not None)
        names += [p.png.name for p in self.all_pictures()]
        return "\n".join([*text, f"{self.out}: {', '.join(names)}"])

    def shown_metric(self) -> str:
        """Say what the pictures show, and the table first."""
        return f"{self.metric}: {METRICS[self.metric]}"


def metric_title(metric: str) -> str:
    """Return a metric as a column's title."""
    return f"{metric} (chosen on the test set)" if metric == "top1_best_on_test" else metric
