"""How far sweeps are: what is done, runs, waits and failed, with the numbers of a cluster's jobs."""

from __future__ import annotations

from dataclasses import dataclass

from convnn.cli.program import folders_and_options, run_program
from convnn.errors import ConfigError
from convnn.sweep.overview import overview

USAGE = """
usage: uv run scripts/status.py DIR [DIR ...] [all=true]
       convnn-status DIR ...     the same where convnn is installed

Counts the points of each sweep folder by their states, and lists those that run, wait in a cluster's queue, or ended
without a result, with the job, the node, the reason and the log. Nothing is started or stopped.
  DIR     a sweep folder (sweep.dir)
{options}
Exit codes: 0 all points are complete, 1 some are not, 2 wrong arguments or no sweep folder.
"""


@dataclass
class Options:
    """Arguments of this script besides the folders."""

    all: bool = False
    """List all points; else up to 20 of each state, and none that are complete or not begun."""


def status(argv: list[str]) -> int:
    """Print where each sweep is; return the exit code."""
    folders, options = folders_and_options(Options, argv, USAGE)
    complete = True
    for folder in folders:
        if not (folder / "plan.json").exists():
            raise ConfigError(f"{folder} is not a sweep folder: it has no plan.json")
        lines, done = overview(folder, everything=options.all)
        print("\n".join(lines))
        complete &= done
    return 0 if complete else 1


def main() -> None:
    """Run the program."""
    run_program(status)


if __name__ == "__main__":
    main()
