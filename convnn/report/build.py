"""A report over runs: CSV tables, a Markdown summary, pictures, and all of it in one HTML file. Imports no torch."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from convnn.errors import ConfigError
from convnn.report.content import MAX_RUNS, Picture, Report, Table
from convnn.report.pages import html_page, markdown
from convnn.report.plots import PICTURES, draw_all
from convnn.report.results import FoundRuns, find_results, tidy
from convnn.report.tables import METRICS, import_pandas, runs_frame, summarize
from convnn.text import show


def make_report(folders: Sequence[Path], out: Path, metric: str = "top1_last") -> Report:
    """Read all runs and sweeps below ``folders`` and write a report to ``out``.

    Args:
        folders: searched for run folders and sweep folders at any depth.
        out: made if missing; files of an earlier report there are replaced.
        metric: what is plotted and stands first in the tables, a key of ``convnn.report.tables.METRICS``.

    Raises:
        ConfigError: if there is nothing to report, the metric is unknown, or pandas or matplotlib is missing.
    """
    if metric not in METRICS:
        raise ConfigError(f"metric={metric} is not one of {', '.join(METRICS)}")
    import_pandas()
    found = find_results(folders)
    runs = runs_frame(found)
    summary = summarize(runs)
    commands, environments = _commands(found), _environments(found)
    report = Report(runs, summary, metric, out, found.invalid, commands, environments, found.duplicates)
    out.mkdir(parents=True, exist_ok=True)
    runs.to_csv(out / "results.csv", index=False)
    summary.to_csv(out / "summary.csv", index=False)
    for old in (path for pattern in PICTURES for path in out.glob(pattern)):
        old.unlink()
    report.pictures = draw_all(runs, summary, metric, [run.folder for run in found.runs], out)
    report.pictures += run_pictures(found, out)
    (out / "table.md").write_text(markdown(report), encoding="utf-8")
    (out / "index.html").write_text(html_page(report), encoding="utf-8")
    return report


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
            files = [folder / "pictures" / f"{name}.{kind}" for kind in ("png", "svg")]
            if all(file.is_file() for file in files):
                copies = [out / f"run{i + 1}_{file.name}" for file in files]
                for file, copy in zip(files, copies, strict=True):
                    copy.write_bytes(file.read_bytes())
                caption = f"Drawn by scripts/visualize.py for {tidy(folder.name)}."
                pictures.append(Picture(copies[0].stem, title, caption, *copies))
    return pictures


def _commands(found: FoundRuns) -> list[str]:
    commands = [shlex.join(command) for command in found.commands]
    for run in found.runs:
        arguments = run.environment.get("command")
        if isinstance(arguments, list):
            commands.append(shlex.join(["train.py", *map(str, arguments)]))
    return [tidy(command) for command in dict.fromkeys(commands)]


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
