"""Run the rows of a paper table and print published and measured figures side by side."""

from __future__ import annotations

import fnmatch
import textwrap
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from convnn.cli.folders import take_config_folders
from convnn.cli.program import called_as, path, run_program, script_options
from convnn.errors import EXIT_FAILED, ConfigError
from convnn.paper.compare import (
    compare,
    comparison_table,
    explanation,
    parse_seeds,
    select_rows,
    sweep_of,
    write_comparison,
)
from convnn.paper.published import PaperRow, PaperTable, load_table, table_names
from convnn.sweep.sweep import carry_out
from convnn.sweep.times import budget_seconds
from convnn.text import aligned, command_line

USAGE = """
Run the rows of a paper table and print published and measured figures side by side.

usage: uv run scripts/reproduce.py table=NAME [rows=GLOB,...] [careful=true] [seeds=0,1,...] [dry_run=true]
                                   [dir=DIR] [budget=TIME] [key=value ...]
       convnn-reproduce table=NAME ...     the same where convnn is installed

{options}
{tables}
Besides these any override of train.py (train.epochs=3, device=cuda) or of Hydra (hydra/launcher=joblib); whatever
changes the experiment is named in the table, and the row is then no comparison; options of your own: --config-dir DIR

The same command again goes on where it stopped. Exit codes: as sweep.py; 1 too if a parameter count differs in dry_run.
"""


def _tables() -> str:
    return textwrap.fill(f"Tables: {', '.join(table_names())}.", 120)


@dataclass
class Options:
    """The script's own keys."""

    table: str = MISSING
    """Name of a table; with ``dry_run=true`` also several: ``table='vgg11_*,vit_tiny_*'``."""
    rows: str | None = None
    """Globs of the rows to run, with commas between; their names are in conf/table/NAME.csv. Null: all."""
    careful: bool = False
    """The careful variant: augmentation, a validation split, three seeds."""
    seeds: str | None = None
    """These seeds, with commas between, in place of the published one."""
    dry_run: bool = False
    """Train nothing: list the rows with published figures and parameter counts, and check the counts."""
    dir: str | None = path()
    """Folder of the runs and the table; null: reproductions/NAME."""
    budget: str | None = None
    """Time that this call may take, such as 30m, see ``sweep.budget``; null: no limit."""


_OWN = tuple(f"{name}=" for name in ("table", "rows", "careful", "seeds", "dry_run", "dir", "budget"))


def check_counts(table: PaperTable, rows: list[PaperRow], given: list[str], careful: bool) -> int:
    """List the rows with published figures, and parameters and operations of both; return the exit code."""
    from convnn.config.composer import Composer
    from convnn.paper.counts import model_cost

    composer, lines, different = Composer(), [], 0
    for row in rows:
        found = model_cost(composer(table.overrides(row, careful=careful, extra=given)))
        equal = row.params is None or found.params == row.params
        different += not equal
        lines.append(
            [
                row.row,
                *("–" if v is None else f"{v:.2f}" for v in (row.top1_best, row.top1_last, row.top1_last5_mean)),
                "–" if row.params is None else f"{row.params:,}",
                f"{found.params:,}",
                "–" if row.params is None else "equal" if equal else f"{found.params - row.params:+,}",
                "–" if row.gflops is None else f"{row.gflops:.8g}",
                "–" if found.gflops_profiler is None else f"{found.gflops_profiler:.8g}",
                f"{found.gflops:.6g}",
                row.function or "not checked",
                row.note,
            ]
        )
    header = ["row", "best", "last", "last five", "params published", "ours", "", "GFLOPs published"]
    print(aligned([*header, "profiler's way", "honest", "function", "note"], lines))
    counts = f"{len(rows) - different} equal or unpublished, {different} different"
    same = sum(row.function == "equal" for row in rows)
    known = sum(bool(row.function) for row in rows)
    print(f"{table.name}: {len(rows)} rows; parameter counts: {counts}.")
    print(f"Function: {same} equal, {known - same} differ as said, {len(rows) - known} not checked.")
    print(f"Published figures: the authors' result files, see the column source in conf/table/{table.published.name}.")
    if table.needs:
        print(table.needs)
    return EXIT_FAILED if different else 0


def reproduce(argv: list[str]) -> int:
    """Run the rows and compare; return the exit code."""
    arguments = take_config_folders(argv)
    own = [a for a in arguments if a.startswith(_OWN) or a in ("-h", "--help")]
    rest = [a for a in arguments if a not in own]
    options: Options = script_options(Options, own, USAGE.replace("{tables}", _tables()))
    names = [n for p in options.table.split(",") for n in fnmatch.filter(table_names(), p) or [p]]
    launcher = [o for o in rest if o.startswith(("hydra/", "hydra."))]
    given = [o for o in rest if o not in launcher]
    if options.dry_run:
        tables = [load_table(name) for name in names]
        return max([check_counts(t, select_rows(t, options.rows), given, options.careful) for t in tables])
    if len(names) > 1:
        raise ConfigError(f"table={options.table}: several tables only with dry_run=true")
    table = load_table(options.table)
    rows = select_rows(table, options.rows)
    seeds = parse_seeds(options.seeds, options.careful)
    folder = options.dir or f"reproductions/{table.name}{'-careful' if options.careful else ''}"
    budget_seconds(options.budget, "budget")
    sweep = sweep_of(table, rows, folder, careful=options.careful, seeds=seeds)
    sweep.budget = options.budget
    command = [called_as("scripts/reproduce.py"), *argv]
    code = carry_out(sweep, given, launcher, command)
    found = compare(table, rows, sweep, given)
    print(f"\n{table.title}\n\n{aligned(*comparison_table(table, found))}\n")
    print("\n".join(explanation(table, found, command_line(command))))
    paths = write_comparison(table, found, Path(folder), command_line(command))
    print("written: " + ", ".join(map(str, paths)))
    return code


def main() -> None:
    """Run the program."""
    run_program(reproduce, debug=True)


if __name__ == "__main__":
    main()
