"""Turn the runs below some folders into tables, pictures and one HTML page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from convnn.cli.program import folders_and_options, path, run_program

USAGE = """
usage: uv run scripts/report.py DIR [DIR ...] [out=FOLDER] [metric=top1_last] [baseline=ARM]
       convnn-report DIR ...     the same where convnn is installed

Finds the run folders and sweep folders below each DIR, prints a summary over seeds, and writes results.csv (a row a
run), summary.csv, table.md, pictures (PNG and SVG) and index.html, which says first what won, by how much, if it is
real and what it cost, and holds all of it in one file. Failed, diverged and unfinished runs are listed and never count
in a mean. Of a configuration found twice the newest run counts, with a warning if the results differ. Where there are
two configurations or more, a section has their differences to one of them with intervals, as scripts/compare.py has.
  DIR     a run folder, a sweep folder, or any folder above them
{options}
Exit codes: 0 written, 1 the disk refused, 2 wrong arguments or no runs.
"""


@dataclass
class Options:
    """Arguments of this script besides the folders."""

    out: str | None = path()
    """Folder; null: report/ in the first DIR. Files there that no report wrote stay, and are never replaced."""
    metric: str = "top1_last"
    """What is plotted: top1_last (test accuracy of the last epoch), top5_last, top1_best_on_test (chosen on the test
    set), top1_at_best_val or val_top1_best."""
    baseline: str | None = None
    """Configuration that the others are compared with: its name in the tables, or key=value[,key=value] that hold for
    it alone; null: the one in which no layer is replaced."""


def report(argv: list[str]) -> None:
    """Report and print."""
    folders, options = folders_and_options(Options, argv, USAGE)
    from convnn.report.build import make_report

    out = Path(options.out) if options.out else folders[0] / "report"
    print(make_report(folders, out, options.metric, options.baseline).text())


def main() -> None:
    """Run the program."""
    run_program(report)


if __name__ == "__main__":
    main()
