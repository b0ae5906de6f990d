"""Compare the arms among some runs with a baseline: differences with intervals, p values, costs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from convnn.cli.program import folders_and_options, path, run_program
from convnn.report.settings import CompareSettings

USAGE = """
usage: uv run scripts/compare.py DIR [DIR ...] [baseline=ARM] [out=FOLDER] [key=value ...]
       convnn-compare DIR ...     the same where convnn is installed

Runs that differ in their seed alone are an arm. Prints for each arm the difference to the baseline over common seeds
with its interval, p values corrected for their number, a bootstrap over seeds and test images, the seeds that a
difference needs, and costs; docs/evidence.md says what each means.
  DIR     a run folder, a sweep folder, or any folder above them; the runs of all are taken together
{options}
Exit codes: 0 compared, 1 the disk refused, 2 wrong arguments, no runs, or no baseline.
"""


@dataclass
class Options(CompareSettings):
    """Arguments of this script besides the folders."""

    out: str | None = path()
    """Folder for differences.csv, matched.csv, comparison.md and pictures; null: none is written."""


def compare(argv: list[str]) -> None:
    """Compare and print."""
    folders, options = folders_and_options(Options, argv, USAGE)
    from convnn.report.comparison import read_differences
    from convnn.report.differences import difference_text

    out = Path(options.out) if options.out else None
    print(difference_text(read_differences(folders, options, out)))
    if out:
        print(f"{out}: {', '.join(sorted(file.name for file in out.iterdir() if not file.name.startswith('.')))}")


def main() -> None:
    """Run the program."""
    run_program(compare)


if __name__ == "__main__":
    main()
