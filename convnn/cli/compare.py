"""Compare the arms among some runs with a baseline: differences with intervals, p values, costs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from convnn.cli.program import path, run_program, script_options
from convnn.config.load import expanded
from convnn.errors import ConfigError

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
class Options:
    """Arguments of this script besides the folders."""

    baseline: str | None = None
    """Arm that the others are compared with: its name, or key=value[,key=value] that hold for it alone; null: the one
    arm in which no layer is replaced."""
    metric: str = "top1_last"
    """What is compared: top1_last (test accuracy of the last epoch), top5_last, top1_best_on_test (chosen on the test
    set), top1_at_best_val or val_top1_best."""
    family: int | None = None
    """Comparisons that were declared, if more than are shown; p values are corrected for that many."""
    effect: float = 1.0
    """Difference in points that the seeds needed are counted for."""
    power: float = 0.8
    """Chance to find it."""
    level: float = 0.95
    """Of the intervals; an arm differs where p is below 1 - level."""
    resamples: int = 4000
    """Draws of the bootstrap."""
    seed: int = 0
    """Of these draws."""
    tuning: str | None = None
    """Folders, separated by commas, with the sweeps in which settings of the optimizer were tuned."""
    out: str | None = path()
    """Folder for differences.csv, matched.csv, comparison.md and pictures; null: none is written."""


def compare(argv: list[str]) -> None:
    """Compare and print."""
    folders = [Path(arg) for arg in argv if not arg.startswith("-") and ("=" not in arg or Path(arg).is_dir())]
    options: Options = script_options(Options, [arg for arg in argv if Path(arg) not in folders], USAGE)
    folders = [Path(expanded(str(folder), "DIR")) for folder in folders]
    if not folders:
        raise ConfigError("name a folder that holds runs; see --help")
    from convnn.report.compare import CompareSettings
    from convnn.report.comparison import read_differences
    from convnn.report.differences import difference_text

    tuning = [part for part in (options.tuning or "").split(",") if part]
    settings = CompareSettings(
        metric=options.metric,
        baseline=options.baseline,
        family=options.family,
        effect=options.effect,
        power=options.power,
        level=options.level,
        resamples=options.resamples,
        seed=options.seed,
        tuning=tuple(Path(expanded(part, "tuning")) for part in tuning),
    )
    out = Path(options.out) if options.out else None
    print(difference_text(read_differences(folders, settings, out)))
    if out:
        print(f"{out}: {', '.join(sorted(file.name for file in out.iterdir() if not file.name.startswith('.')))}")


def main() -> None:
    """Run the program."""
    run_program(compare)


if __name__ == "__main__":
    main()
