"""Published and measured side by side: a paper table's rows as a sweep, and what came of it. Imports no torch."""

from __future__ import annotations

import csv
import fnmatch
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from convnn.config.composer import Composer
from convnn.config.identity import differences, fingerprint, identity
from convnn.config.overrides import key_of, merge_overrides
from convnn.config.schema import Config
from convnn.errors import ConfigError
from convnn.paper.published import PaperRow, PaperTable
from convnn.runs.record import Record, read_record
from convnn.runs.status import DAMAGED
from convnn.runtime.files import write_text
from convnn.sweep.options import SweepConfig
from convnn.sweep.plan import read_plan
from convnn.text import Score, markdown_table

SCORES = {
    "top1_best": "best epoch (chosen on the test set)",
    "top1_last": "last epoch",
    "top1_last5_mean": "mean of the last five epochs",
}
"""Columns of accuracies and what they mean."""

IMAGENET_CLASSES = 1000
"""Of ImageNet-1K; another folder at data.root is another experiment, which the configuration does not tell."""


def select_rows(table: PaperTable, patterns: str | None) -> list[PaperRow]:
    """Return the rows that match one of the comma-separated globs; all of them for None.

    Raises:
        ConfigError: if a glob matches none, with the nearest name.
    """
    if patterns is None:
        return list(table.rows)
    chosen: list[PaperRow] = []
    for pattern in patterns.split(","):
        found = [row for row in table.rows if fnmatch.fnmatchcase(row.row, pattern)]
        if not found:
            table.row(pattern)  # says which name is nearest
        chosen += [row for row in found if row not in chosen]
    return chosen


def sweep_of(
    table: PaperTable, rows: Sequence[PaperRow], folder: str, *, careful: bool, seeds: Sequence[int]
) -> SweepConfig:
    """Return the sweep that runs the rows, with their own seeds unless others are given."""
    points = {}
    for row in rows:
        overrides = merge_overrides(row.overrides, table.careful if careful else ())
        points[row.row] = [o for o in overrides if key_of(o) != "seed" or not seeds]
    base = [o for o in table.base if key_of(o) != "seed" or not seeds]
    axes = {"seed": list(seeds)} if seeds else {}
    return SweepConfig(name=Path(folder).name, dir=folder, base=base, points=points, axes=axes)


@dataclass(frozen=True)
class Comparison:
    """A row as published and as measured."""

    row: PaperRow
    scores: dict[str, Score]
    """By column of ``SCORES``; those that were measured."""
    changed: tuple[str, ...]
    """In what our runs differ from the published experiment, seeds aside; then the figures are no comparison."""
    params: int | None
    gflops: float | None
    runs: int
    """Complete runs."""
    planned: int
    damaged: tuple[str, ...] = ()
    """Of complete runs whose files contradict each other, the folder and in what; such a row has no scores."""

    @property
    def label(self) -> str:
        """Say what the measured numbers are."""
        if self.damaged:
            return DAMAGED
        if not self.runs:
            return "not run"
        parts = [] if self.runs == self.planned else [f"{self.runs} of {self.planned} runs"]
        if self.changed:
            shortened = any(c.startswith(("train.epochs", "train.max_steps", "data.limit")) for c in self.changed)
            parts.append("SHORTENED, not comparable" if shortened else "not comparable")
        return ", ".join(parts) or "whole"

    def difference(self, column: str) -> float | None:
        """Return ours less published in points; None unless the experiment is the published one."""
        published, ours = getattr(self.row, column), self.scores.get(column)
        if self.changed or published is None or ours is None:
            return None
        return ours.mean - published

    def within_noise(self, noise: float | None) -> bool | None:
        """Say whether the best epochs differ by no more than two standard deviations of their difference.

        That deviation is ``noise * sqrt(1 + 1/n)``: one published run against the mean of n of ours.
        """
        gap = self.difference("top1_best")
        if gap is None or noise is None:
            return None
        return abs(gap) <= 2 * noise * math.sqrt(1 + 1 / self.scores["top1_best"].n)


def compare(
    table: PaperTable, rows: Sequence[PaperRow], options: SweepConfig, given: Sequence[str]
) -> list[Comparison]:
    """Collect what the sweep's folder holds for each row.

    Args:
        table: of the rows.
        rows: to report.
        options: the sweep, see ``sweep_of``.
        given: overrides from the command line.

    Raises:
        ConfigError: if a row's configuration cannot work.
    """
    composer = Composer()
    folder = Path(options.dir)
    places = {p["fingerprint"]: folder / p["folder"] for p in read_plan(folder).get("points", [])}
    seeds = options.axes.get("seed", [])
    found = []
    for row in rows:
        published = composer(table.overrides(row))
        ours = merge_overrides(options.base, options.points[row.row], given)
        configs = [composer(merge_overrides(ours, [f"seed={seed}"])) for seed in seeds] or [composer(ours)]
        folders = [places[f] for c in configs if (f := fingerprint(c)) in places]
        found.append(_comparison(row, published, configs, folders))
    return found


def _comparison(row: PaperRow, published: Config, configs: Sequence[Config], folders: Sequence[Path]) -> Comparison:
    records = {path: read_record(path) for path in folders}
    damaged = tuple(f"{path}: {r.damage}" for path, r in records.items() if r.damage)
    complete = [r for r in records.values() if r.complete]
    old, new = identity(published), identity(configs[0])
    old.pop("seed"), new.pop("seed")
    first = (complete[0].result if complete else None) or {}
    changed = differences(old, new)
    if published.data.name == "imagenet" and first.get("classes", IMAGENET_CLASSES) != IMAGENET_CLASSES:
        changed.append(f"classes: {IMAGENET_CLASSES} -> {first['classes']}")
    costs = first.get("params"), first.get("gflops")
    scores = {} if damaged else _scores(complete)
    return Comparison(row, scores, tuple(changed), *costs, runs=len(complete), planned=len(configs), damaged=damaged)


def _scores(records: Sequence[Record]) -> dict[str, Score]:
    """Return the accuracies of whole runs, by column of ``SCORES``."""
    values: dict[str, list[float]] = {column: [] for column in SCORES}
    for record in records:
        accuracies = [row["test_top1"] for row in record.rows]
        values["top1_best"].append(max(accuracies))
        values["top1_last"].append(accuracies[-1])
        values["top1_last5_mean"].append(statistics.fmean(accuracies[-5:]))
    return {column: Score.of(v) for column, v in values.items() if v}


def _decimal(value: float | None, digits: int = 2, sign: bool = False) -> str:
    return "–" if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def _thousands(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def comparison_table(table: PaperTable, found: Sequence[Comparison]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the comparison as text."""
    header = ["row"]
    for column in SCORES:
        header += [f"{column} published", "ours"]
    header += ["difference of best", "within noise", "params published", "ours", "GFLOPs published", "ours", "status"]
    lines = []
    for c in found:
        cells = [c.row.row]
        for column in SCORES:
            cells += [_decimal(getattr(c.row, column)), str(c.scores.get(column, "–"))]
        noise = table.noise.get(_dataset(c.row))
        verdict = c.within_noise(noise)
        cells += [_decimal(c.difference("top1_best"), sign=True), {None: "–", True: "yes", False: "no"}[verdict]]
        cells += [_thousands(c.row.params), _thousands(c.params)]
        lines.append([*cells, _decimal(c.row.gflops, 4), _decimal(c.gflops, 4), c.label])
    return header, lines


def _dataset(row: PaperRow) -> str:
    return next((o.split("=", 1)[1] for o in row.overrides if key_of(o) == "data"), "")


def explanation(table: PaperTable, found: Sequence[Comparison], command: str) -> list[str]:
    """Return what a reader of the comparison has to know, one paragraph each."""
    lines = [
        "Published figures: the authors' result files, named in the column source of the CSV file. "
        + "; ".join(f"{column}: {meaning}" for column, meaning in SCORES.items())
        + ". Accuracies are top-1 on the test images in percent; ours are means over n seeds, ± the sample deviation.",
        "GFLOPs: published ones are what the authors' profiler counted, which leaves convolutions out; ours count the "
        "whole forward pass of one image, a multiplication and an addition as two.",
    ]
    for changed in dict.fromkeys(c.changed for c in found if c.changed):
        rows = [c.row.row for c in found if c.changed == changed]
        lines.append(
            f"Not comparable, since run with other settings than the published ones ({', '.join(rows)}): "
            f"{'; '.join(changed)}. Such rows show that the machinery works, and no more."
        )
    if table.noise:
        known = ", ".join(f"{sd:g} points on {data}" for data, sd in table.noise.items())
        lines.append(
            f"Within noise: the difference of the best epochs is at most two standard deviations of a difference, from "
            f"the deviation of equal published runs ({known}: {table.noise_source})."
        )
    if broken := [fault for c in found for fault in c.damaged]:
        lines.append(
            f"Damaged, and not scored: {'; '.join(broken)}. Remove these folders and call the same command again."
        )
    if table.needs:
        lines.append(table.needs)
    return [*lines, f"Made by: {command}"]


def write_comparison(table: PaperTable, found: Sequence[Comparison], folder: Path, command: str) -> list[Path]:
    """Write reproduction.md and reproduction.csv to the sweep's folder; return their paths."""
    header, rows = comparison_table(table, found)
    text = [f"# {table.title}: published and measured", "", markdown_table(header, rows), ""]
    text += [line for paragraph in explanation(table, found, command) for line in (paragraph, "")]
    paths = [folder / "reproduction.md", folder / "reproduction.csv"]
    write_text(paths[0], "\n".join(text))
    file = StringIO()
    writer = csv.writer(file)
    columns = [name for column in SCORES for name in (f"{column}_published", column, f"{column}_std")]
    costs = ["params_published", "params", "gflops_published", "gflops"]
    writer.writerow(["row", *columns, "n", *costs, "status", "changed", "source"])
    for c in found:
        cells: list[object] = [c.row.row]
        for column in SCORES:
            score = c.scores.get(column)
            cells += [getattr(c.row, column), score and round(score.mean, 4)]
            cells.append(score.std if score and score.n > 1 else None)
        cells += [c.runs, c.row.params, c.params, c.row.gflops, c.gflops, c.label, "; ".join(c.changed), c.row.source]
        writer.writerow(cells)
    write_text(paths[1], file.getvalue())
    return paths


def parse_seeds(text: str | None, careful: bool) -> list[int]:
    """Return the seeds of ``seeds=0,1,2``; careful runs have three of their own.

    Raises:
        ConfigError: if the text is no list of integers.
    """
    if text is None:
        return [0, 1, 2] if careful else []
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"seeds={text} is not a list of integers such as 0,1,2") from error
