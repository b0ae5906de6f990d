"""A report over runs: CSV tables, a Markdown summary, pictures, and all of it in one HTML file. Imports no torch."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from convnn.config.overrides import quoted_once
from convnn.errors import ConfigError
from convnn.report.analyses import analysis_sections
from convnn.report.compare import Differences, compare_arms
from convnn.report.compare_plots import save_differences
from convnn.report.content import MAX_RUNS, Picture, Report, Table, copied_picture
from convnn.report.differences import verdict, write_frames
from convnn.report.pages import html_page, markdown
from convnn.report.plots import draw_all
from convnn.report.results import FoundRuns, find_results, integer_of, tidy
from convnn.report.settings import CompareSettings
from convnn.report.tables import METRICS, import_pandas, named_operators, runs_frame, score_of, summarize
from convnn.report.writing import REPORT
from convnn.runtime.owned import naming
from convnn.text import show

if TYPE_CHECKING:
    import pandas as pd


def make_report(folders: Sequence[Path], out: Path, metric: str = "top1_last", baseline: str | None = None) -> Report:
    """Read all runs and sweeps below ``folders`` and write a report to ``out``.

    Args:
        folders: searched for run folders and sweep folders at any depth.
        out: made if missing; files of an earlier report there are replaced, all others stay.
        metric: what is plotted and stands first in the tables, a key of ``convnn.report.tables.METRICS``.
        baseline: arm that the others are compared with, see ``convnn.report.arms.baseline_of``; None: the one in which
            no layer is replaced, and no differences where there is none.

    Raises:
        ConfigError: if there is nothing to report, the metric is unknown, the baseline means no arm, pandas or
            matplotlib is missing, or a file in ``out`` that no report wrote stands in the way.
        OSError: if the disk refuses, naming the file; an earlier report is then as it was.
    """
    if metric not in METRICS:
        raise ConfigError(f"metric={metric} is not one of {', '.join(METRICS)}")
    import_pandas()
    found = find_results(folders)
    runs = runs_frame(found)
    summary = summarize(runs)
    report = Report(
        runs,
        summary,
        metric,
        out,
        subject=_subject(found),
        invalid=found.invalid,
        commands=_commands(found.commands),
        run_commands=_commands(_run_commands(found)),
        environments=_environments(found),
        duplicates=found.duplicates,
        conflicts=found.conflicts,
    )
    report.differences, report.verdict = _differences(found, runs, summary, metric, baseline)
    with REPORT.written_aside(out) as aside:
        for name, frame in (("results.csv", runs), ("summary.csv", named_operators(summary))):
            with naming(aside / name):
                frame.to_csv(aside / name, index=False)
        report.pictures = draw_all(runs, summary, metric, [run.folder for run in found.runs], aside, report.subject)
        report.pictures += run_pictures(found, aside)
        if report.differences is not None:
            with naming(aside / "differences.csv"):
                write_frames(report.differences, aside)
            report.difference_pictures = save_differences(report.differences, summary, aside, report.subject)
        report.sections += analysis_sections(folders, found, runs, summary, aside)
        for name, text in (("table.md", markdown(report)), ("index.html", html_page(report))):
            with naming(aside / name):
                (aside / name).write_text(text, encoding="utf-8")
    for pictures in (report.pictures, report.difference_pictures, *(s.pictures for s in report.sections)):
        pictures[:] = [replace(p, png=out / p.png.name, svg=out / p.svg.name) for p in pictures]
    return report


def _differences(
    found: FoundRuns, runs: pd.DataFrame, summary: pd.DataFrame, metric: str, baseline: str | None
) -> tuple[Differences | None, str]:
    """Return the differences of the arms and what they say, or nothing and how to have them."""
    try:
        made = compare_arms(found, runs, summary, CompareSettings(metric=metric, baseline=baseline))
    except ConfigError as error:
        if baseline is not None:
            raise
        several = sum(score_of(row, metric).n > 0 for row in summary.to_dict("records")) > 1
        return None, f"No differences: {error}" if several else ""
    return made, verdict(made)


def run_pictures(found: FoundRuns, out: Path) -> list[Picture]:
    """Return what scripts/visualize.py left in the run folders, of at most ``MAX_RUNS`` runs, copied to ``out``."""
    titles = {
        "neighbors": "Which tokens the layers mix",
        "blends": "One query from convolution to attention",
        "weights": "How much each token weighs",
    }
    folders = [run.folder for run in found.runs if (run.folder / "pictures" / "neighbors.svg").is_file()]
    pictures = []
    for i, folder in enumerate(folders[:MAX_RUNS]):
        for name, title in titles.items():
            caption = f"Drawn by scripts/visualize.py for {tidy(folder.name)}."
            picture = copied_picture(folder / "pictures", name, out / f"run{i + 1}_{name}", title, caption)
            pictures += [picture] if picture else []
    return pictures


def _subject(found: FoundRuns) -> str:
    """Say what the runs are: the sweeps' names, the data and the epochs, such as ``smoke: digits, 6 epochs``."""
    parts = [
        _some(dict.fromkeys(str(run.keys["data.name"]) for run in found.runs if "data.name" in run.keys), "data sets")
    ]
    for key, word in (("train.epochs", "epochs"), ("train.max_steps", "steps at most")):
        numbers = sorted({n for run in found.runs if (n := integer_of(run.keys.get(key))) is not None})
        if numbers:
            span = show(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
            parts.append(f"{span} {word.removesuffix('s') if numbers == [1] and word == 'epochs' else word}")
    names = _some(dict.fromkeys(found.sweeps), "sweeps")
    return ": ".join(filter(None, [names, ", ".join(filter(None, parts))])) or "runs"


def _some(names: Iterable[str], word: str) -> str:
    names = list(names)
    return tidy(" and ".join(names)) if len(names) < 3 else f"{len(names)} {word}"


def _commands(commands: Iterable[Sequence[str]]) -> list[str]:
    """Return commands as a shell takes them, each once."""
    lines = (shlex.join(map(quoted_once, command)) for command in commands)
    return [tidy(line) for line in dict.fromkeys(lines)]


def _run_commands(found: FoundRuns) -> Iterator[list[str]]:
    for run in found.runs:
        arguments = run.environment.get("command")
        if isinstance(arguments, list):
            yield ["train.py", *map(str, arguments)]


def _environments(found: FoundRuns) -> Table:
    """Return what differs and what agrees among the runs' versions and hardware, one row a distinct set."""
    counts: Counter[str] = Counter()
    for run in found.runs:
        values = {key: v for key, v in run.environment.items() if key not in ("command", "started", "versions")}
        versions = run.environment.get("versions")
        values |= versions if isinstance(versions, dict) else {}
        if values:
            counts[json.dumps(values, sort_keys=True)] += 1
    sets = [(json.loads(text), n) for text, n in counts.most_common()]
    names = list(dict.fromkeys(name for values, _ in sets for name in values))
    rows = [[name, *(tidy(show(values.get(name))) for values, _ in sets)] for name in names]
    return ["runs", *(str(n) for _, n in sets)], rows
