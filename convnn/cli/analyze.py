"""Analyse the networks of finished runs, averaged over seeds and along the spectrum."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

from convnn.analysis.registry import ANALYSES, chosen
from convnn.cli.program import folders_and_options, path, run_program
from convnn.errors import EXIT_FAILED, ConfigError
from convnn.ops.settings import check_fields, choice, number
from convnn.runs.contents import ANALYSES as FOLDER
from convnn.runs.status import COMPLETE
from convnn.text import aligned, show

if TYPE_CHECKING:
    from convnn.report.arms import Arm

USAGE = """
usage: uv run scripts/analyze.py DIR [DIR ...] [analyses=[NAME,...]] [images=N] [out=FOLDER] [key=value ...]
       convnn-analyze DIR ...     the same where convnn is installed

Looks into the networks of the finished runs below each DIR, and draws each analysis over all of them, averaged over
seeds with 95 % intervals:
{analyses}
A result is kept in RUN/analyses/NAME.json and taken from there the next time, unless the checkpoint or the settings
are others. Writes NAME.png, NAME.svg and NAME.csv (mean, interval and seeds of each number); scripts/report.py shows
them. docs/analyses.md says what each means.
  DIR     a run folder, a sweep folder, or any folder above them; the runs of all are taken together
{options}
Exit codes: 0 done, 1 a run or an analysis of it failed, or the disk refused, 2 wrong arguments or no finished run.
"""


@dataclass
class Options:
    """Arguments of this script besides the folders."""

    analyses: list[str] | None = field(default=None)
    """Names from above, as [NAME,NAME]; null: all."""
    images: int | None = number(None, 1)
    """Test images that each takes, evenly over the classes; null: as many as suit it."""
    out: str | None = path()
    """Folder for pictures and tables; null: analyses/ in the first DIR. Other files there are never replaced."""
    checkpoint: str = choice("last", "best")
    """Which of the runs' checkpoints."""
    data_root: str | None = path()
    """Where the data is now, if it moved, or other images of the same classes."""
    device: str = "auto"
    """What to compute on, as ``device=`` of train.py."""


def analyze(argv: list[str]) -> int:
    """Analyse, write pictures and tables, and print a summary; return the exit code."""
    listed = "\n".join(f"  {name:14}{about}" for name, about in ANALYSES.items())
    argv = [_as_list(arg) for arg in argv]
    folders, options = folders_and_options(Options, argv, USAGE.replace("{analyses}", listed))
    check_fields(options, "")
    names = chosen(options.analyses)
    arms, left_out = _arms(folders)
    out = Path(options.out) if options.out else folders[0] / FOLDER
    _check_writable(out)
    if left_out:
        print(f"left out: {left_out}", file=sys.stderr)
    from convnn.analysis.files import write_analysis
    from convnn.analysis.measuring import ArmRuns, Asked, measure_arms
    from convnn.analysis.registry import load_analysis

    asked = Asked(names, options.checkpoint, options.images, options.device, options.data_root)
    differing = _differing(arms)
    runs = [
        ArmRuns(
            arm.name,
            {key: arm.values.get(key) for key in differing},
            {seed: run.folder for seed, run in arm.runs.items()},
        )
        for arm in arms
    ]
    found = measure_arms(runs, asked, lambda line: print(line, file=sys.stderr, flush=True))
    lines = []
    for name, results in found.arms.items():
        reasons = "; ".join(found.left_out.get(name, []))
        if results:
            write_analysis(out, name, load_analysis(name), results)
            count = sum(len(arm.results) for arm in results)
            lines.append([name, str(len(results)), str(count), str(out / f"{name}.png"), reasons])
        else:
            lines.append([name, "0", "0", "-", reasons])
    print(aligned(["analysis", "arms", "runs", "picture", "does not apply to some runs"], lines))
    print(f"{found.measured} measured, {found.kept} kept, {len(found.failed_runs)} runs failed")
    for failure in found.failed:
        print(f"failed: {failure}", file=sys.stderr)
    return EXIT_FAILED if found.failed else 0


def _check_writable(out: Path) -> None:
    """Raise ConfigError if nothing can be written into a folder, before there is anything to write."""
    made = [place for place in (out, *out.parents) if not place.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ConfigError(
            f"out={out} cannot be written: {error.strerror}; name another folder by out=FOLDER"
        ) from error
    finally:
        for place in made:
            with suppress(OSError):
                place.rmdir()


def _as_list(arg: str) -> str:
    """Let ``analyses=erf,cka`` mean the list that it looks like."""
    key, _, value = arg.partition("=")
    return f"{key}=[{value}]" if key == "analyses" and value and value[0] != "[" and value != "null" else arg


def _arms(folders: list[Path]) -> tuple[list[Arm], str]:
    """Return the arms of the finished runs, and which runs are none.

    Raises:
        ConfigError: if there is no finished run.
    """
    from convnn.report.arms import arms_of
    from convnn.report.results import find_results
    from convnn.report.tables import import_pandas, runs_frame, summarize

    import_pandas()  # whose extra brings matplotlib too
    found = find_results(folders)
    others: dict[str, list[str]] = {}
    for run in found.runs:
        if run.status != COMPLETE:
            others.setdefault(run.status, []).append(run.name)
    left_out = "; ".join(
        f"{len(names)} {status} ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})"
        for status, names in others.items()
    )
    finished = replace(found, runs=[run for run in found.runs if run.status == COMPLETE])
    frame = runs_frame(finished)  # so that arms bear what tells them from each other, not from runs left out
    arms = arms_of(finished, frame, summarize(frame), "top1_last")
    if not arms:
        raise ConfigError(f"no finished run in {', '.join(map(str, folders))}: {left_out}")
    return arms, left_out


def _differing(arms: Sequence[Arm]) -> list[str]:
    """Return the keys of the configuration in which the arms differ."""
    keys = dict.fromkeys(key for arm in arms for key in arm.values if "." in key)
    return [key for key in keys if len({show(arm.values.get(key)) for arm in arms}) > 1]


def main() -> None:
    """Run the program."""
    run_program(analyze)


if __name__ == "__main__":
    main()
