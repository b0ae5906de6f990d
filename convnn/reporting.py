"""A report over runs: CSV tables, a Markdown summary, pictures, and all of it in one HTML file. Imports no torch."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convnn.config import ConfigError
from convnn.results import COMPLETE, FAILED, Findings, find_results, tidy
from convnn.tables import (
    COSTS,
    METRICS,
    import_pandas,
    main_keys,
    read_runs,
    runs_frame,
    short_name,
    show,
    summarize,
    varying_keys,
)

if TYPE_CHECKING:
    import pandas as pd

    from convnn.plots import Picture

__all__ = ["Report", "make_report", "read_runs", "summarize"]

MAX_TEXT_ROWS = 60
MAX_RUNS = 2
"""Runs whose own pictures a report holds."""
_COST_NAMES = {"seconds": "seconds", "params": "M params", "gflops": "GFLOPs", "images_per_second": "images/s"}

Table = tuple[list[str], list[list[str]]]
"""Header and rows."""


@dataclass
class Report:
    """What a report holds."""

    runs: pd.DataFrame
    summary: pd.DataFrame
    metric: str
    out: Path
    invalid: list[tuple[str, str]]
    """Overrides of points that are no valid configuration, and the reasons."""
    commands: list[str]
    """Of the sweeps and the runs, each once."""
    environments: Table
    """Versions and hardware, with the number of runs."""
    duplicates: int
    pictures: list[Picture] = field(default_factory=list)

    def counts(self) -> str:
        """Say how many runs there are of each status."""
        counts = ", ".join(f"{n} {status}" for status, n in Counter(self.runs["status"]).most_common())
        text = f"{len(self.runs)} runs" + (f": {counts}" if counts else "")
        if self.duplicates:
            text += f"; {self.duplicates} more of the same configurations left out"
        return text

    def table(self) -> Table:
        """Return the summary with its numbers formatted."""
        keys = main_keys(self.summary)
        metrics = [m for m in METRICS if m != "top5_last" or m == self.metric]
        metrics = [self.metric, *(m for m in metrics if m != self.metric and f"{m}_mean" in self.summary)]
        header = [*keys, *(metric_title(m) for m in metrics), *_COST_NAMES.values(), "failed", "open"]
        rows = []
        for row in self.summary.to_dict("records"):
            cells = [show(row[key]) for key in keys] + [score(row, metric) for metric in metrics]
            costs = [row[name] / 1e6 if name == "params" else row[name] for name in COSTS]
            rows.append(
                cells + [show(float(f"{cost:.4g}")) for cost in costs] + [str(row["n_failed"]), str(row["n_open"])]
            )
        return header, rows

    def follows(self) -> str:
        """Name the keys that differ but are not in the table, since they follow from those that are."""
        left_out = [key for key in varying_keys(self.summary) if key not in main_keys(self.summary)]
        return f"Also different, following from the columns shown: {', '.join(left_out)}." if left_out else ""

    def problems(self) -> Table:
        """Return the failed runs."""
        failed = self.runs[self.runs["status"].isin(FAILED)]
        names = ["name", "status", "reason", "log"]
        return names, [[show(row[name]) for name in names] for row in failed.to_dict("records")]

    def open_runs(self) -> Table:
        """Return the runs that are neither complete nor failed."""
        rest = self.runs[~self.runs["status"].isin([*FAILED, COMPLETE])]
        names = ["name", "status", "epochs", "reason", "log"]
        return names, [[show(row[name]) for name in names] for row in rest.to_dict("records")]

    def text(self) -> str:
        """Return the summary as an aligned table, and where the files are."""
        header, rows = self.table()
        lines = [[short_name(name) for name in header], *rows[:MAX_TEXT_ROWS]]
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        text = [self.counts(), ""]
        text += ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        if len(rows) > MAX_TEXT_ROWS:
            text.append(f"... and {len(rows) - MAX_TEXT_ROWS} more rows in summary.csv")
        _, problems = self.problems()
        text += ["", *(f"{name}: {status}: {reason} ({log})" for name, status, reason, log in problems[:20])]
        if len(problems) > 20:
            text.append(f"... and {len(problems) - 20} more in table.md")
        names = ["index.html", "table.md", "summary.csv", "results.csv", *(p.png.name for p in self.pictures)]
        return "\n".join([*text, f"{self.out}: {', '.join(names)}"])


def make_report(folders: Sequence[Path], out: Path, metric: str = "top1_last") -> Report:
    """Read all runs and sweeps below ``folders`` and write a report to ``out``.

    Args:
        folders: searched for run folders and sweep folders at any depth.
        out: made if missing; files of an earlier report there are replaced.
        metric: what is plotted and stands first in the tables, a key of ``convnn.tables.METRICS``.

    Raises:
        ConfigError: if there is nothing to report, the metric is unknown, or pandas or matplotlib is missing.
    """
    if metric not in METRICS:
        raise ConfigError(f"metric={metric} is not one of {', '.join(METRICS)}")
    import_pandas()
    findings = find_results(folders)
    runs = runs_frame(findings)
    summary = summarize(runs)
    commands, environments = _commands(findings), _environments(findings)
    report = Report(runs, summary, metric, out, findings.invalid, commands, environments, findings.duplicates)
    out.mkdir(parents=True, exist_ok=True)
    runs.to_csv(out / "results.csv", index=False)
    summary.to_csv(out / "summary.csv", index=False)
    from convnn.pages import html_page, markdown
    from convnn.plots import PICTURES, draw_all

    for old in (path for pattern in PICTURES for path in out.glob(pattern)):
        old.unlink()
    report.pictures = draw_all(runs, summary, metric, [run.folder for run in findings.runs], out)
    report.pictures += run_pictures(findings, out)
    (out / "table.md").write_text(markdown(report), encoding="utf-8")
    (out / "index.html").write_text(html_page(report), encoding="utf-8")
    return report


def run_pictures(findings: Findings, out: Path) -> list[Picture]:
    """Return what scripts/visualize.py left in the run folders, of at most ``MAX_RUNS`` runs, copied to ``out``."""
    from convnn.plots import Picture

    titles = {
        "neighbors": "Which tokens the layers mix",
        "blends": "One query from convolution to attention",
        "weights": "How much each token weighs",
    }
    folders = [run.folder for run in findings.runs if (run.folder / "pictures" / "neighbors.svg").is_file()]
    pictures = []
    for i, folder in enumerate(folders[:MAX_RUNS]):
        for name, title in titles.items():
            files = [folder / "pictures" / f"{name}.{kind}" for kind in ("png", "svg")]
            if all(file.is_file() for file in files):
                copies = [out / f"run{i + 1}_{file.name}" for file in files]
                for file, copy in zip(files, copies, strict=True):
                    copy.write_bytes(file.read_bytes())
                caption = f"Drawn by scripts/visualize.py for {tidy(folder.name)}."
                pictures.append(Picture(copies[0].stem, title, caption, *copies))
    return pictures


def metric_title(metric: str) -> str:
    """Return a metric as a column's title."""
    return f"{metric} (chosen on the test set)" if metric == "top1_best_on_test" else metric


def score(row: dict[str, Any], metric: str) -> str:
    """Return mean, standard deviation and number of runs of a summary's row, such as ``86.12 ± 0.35 (n=3)``."""
    n = row.get(f"{metric}_n", 0)
    if not n:
        return "–"
    spread = f" ± {row[f'{metric}_std']:.2f}" if n > 1 else ""
    return f"{row[f'{metric}_mean']:.2f}{spread} (n={n})"


def _commands(findings: Findings) -> list[str]:
    commands = [shlex.join(command) for command in findings.commands]
    for run in findings.runs:
        arguments = run.environment.get("command")
        if isinstance(arguments, list):
            commands.append(shlex.join(["train.py", *map(str, arguments)]))
    return [tidy(command) for command in dict.fromkeys(commands)]


def _environments(findings: Findings) -> Table:
    """Return what differs and what agrees among the runs' versions and hardware, one row a distinct set."""
    found: Counter[str] = Counter()
    for run in findings.runs:
        values = {key: v for key, v in run.environment.items() if key not in ("command", "started", "versions")}
        versions = run.environment.get("versions")
        values |= versions if isinstance(versions, dict) else {}
        if values:
            found[json.dumps(values, sort_keys=True)] += 1
    sets = [(json.loads(text), n) for text, n in found.most_common()]
    names = list(dict.fromkeys(name for values, _ in sets for name in values))
    rows = [[name, *(tidy(show(values.get(name))) for values, _ in sets)] for name in names]
    return ["runs", *(str(n) for _, n in sets)], rows
