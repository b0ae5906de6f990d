"""Measure and test on a GPU all that needs one, in stages, and leave tables of it.

usage: uv run scripts/gpu_check.py [minutes=25] [out=DIR] [data=PATH] [stages=NAME,...] [row_epochs=N] [tiny=true]

{options}

Stages, in this order:
{stages}

Each writes OUT/gpu_check_STAGE.csv and a line into OUT/gpu_check.csv: its verdict (pass, fail, or figure where nothing
is right or wrong), what it says, device, versions, commit, seed and date. The same command again goes on: what is done
with the same device, versions, commit and seed is not done again, and a stage that was cut off goes on behind its last
whole part. No stage takes more than 8 minutes. Exit codes: 0 done, 1 something failed or is left.
"""

from __future__ import annotations

import contextlib
import csv
import fnmatch
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from gpu_stages import STAGES
from gpu_units import ROOT, Context, Row, Stage, Unit, read_csv, script

from convnn.cli.program import path, run_program, script_options
from convnn.errors import EXIT_FAILED, ConfigError
from convnn.ops.settings import check_fields, number

LIMIT = 480.0
"""Seconds of a stage at most."""
KEY = ("device", "torch", "triton", "cuda", "driver", "commit", "seed", "tiny")
"""Columns by which a result is known as one of this machine and these versions."""
NOT_DONE = ("cut off", "left")


@dataclass
class Options:
    """The script's keys."""

    minutes: float = number(25.0, 0, above=True)
    """Time that this call may take."""
    out: str = path("docs/results")
    """Folder of the tables."""
    work: str = path("scratch/gpu_check")
    """Folder of what the stages leave otherwise: logs, runs, unpacked images."""
    data: str | None = path()
    """CIFAR-10: the folder that holds cifar-10-batches-py, a folder of train/CLASS and test/CLASS, or an archive of
    either; null: the stages fast and rows are left out."""
    stages: str = "*"
    """Globs of stages, with commas between."""
    row_epochs: int | None = number(None, 1)
    """Epochs of the rows, which are then no comparison; null: as published."""
    device: str = "cuda"
    """cuda, or cpu to try the script itself with tiny=true."""
    tiny: bool = False
    """Sizes that show that everything works, and nothing else."""
    seed: int = number(0, 0)
    """Of all runs."""
    commit: str | None = None
    """Commit to name where this folder is a copy and no checkout; null: asked of git."""


def main(argv: list[str]) -> int:
    """Run the stages; return the exit code."""
    stages = "\n".join(f"  {stage.name:<8}{stage.about}" for stage in STAGES)
    options: Options = script_options(Options, argv, (__doc__ or "").replace("{stages}", stages))
    check_fields(options, "")
    chosen = [s for s in STAGES if any(fnmatch.fnmatchcase(s.name, glob) for glob in options.stages.split(","))]
    if not chosen:
        raise ConfigError(f"stages={options.stages} matches none of {', '.join(s.name for s in STAGES)}")
    if options.device != "cuda" and not options.tiny:
        raise ConfigError(f"device={options.device}: without a GPU the stages run with tiny=true alone")
    if options.data and not Path(options.data).exists():
        raise ConfigError(f"data={options.data}: there is no such file or folder")
    deadline = time.monotonic() + 60 * options.minutes
    check = Check(Path(options.out), Path(options.work).resolve(), _facts(options))
    data = _data(options, check.work)
    context = Context(options.device, check.facts.pop("gpus"), options.tiny, data, options.row_epochs, options.seed)
    print(", ".join(f"{key} {value}" for key, value in check.facts.items()), flush=True)
    for number_, stage in enumerate(chosen):
        share = stage.weight / sum(s.weight for s in chosen[number_:])
        check.carry_out(stage, context, min(LIMIT, share * (deadline - time.monotonic())))
    lines = check.lines()
    bad = [s.name for s in chosen if lines.get(s.name, {}).get("verdict") not in ("pass", "figure")]
    if bad:
        print(f"failed or left: {', '.join(bad)}; the same command goes on")
    return EXIT_FAILED if bad else 0


def _facts(options: Options) -> Row:
    """Return what is known of the machine, from a process of its own: this one loads no torch."""
    code = """
import json, sys, torch
from importlib.metadata import PackageNotFoundError, version
from convnn.runs.environment import environment
from convnn.runtime.device import pick_device
device, found = pick_device(sys.argv[1]), environment()
gpu = device.type == "cuda"
try:
    triton = version("triton")
except PackageNotFoundError:
    triton = ""
facts = {"device": torch.cuda.get_device_name() if gpu else found["processor"], "torch": torch.__version__}
facts |= {"triton": triton, "cuda": torch.version.cuda if gpu else "", "gpus": torch.cuda.device_count() if gpu else 0}
print(json.dumps(facts | {"commit": found["git_commit"]}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, options.device], cwd=ROOT, env=_environment(), capture_output=True, text=True
    )
    if done.returncode:
        raise ConfigError((done.stderr.strip().splitlines() or ["torch cannot be loaded"])[-1].rpartition("Error: ")[2])
    facts: Row = json.loads(done.stdout.splitlines()[-1])
    facts["driver"] = _driver() if facts["gpus"] else ""
    facts["commit"] = options.commit or facts["commit"] or "unknown"
    return facts | {"seed": options.seed, "tiny": options.tiny}


def _driver() -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    return "unknown"


def _environment() -> dict[str, str]:
    """Return the environment of child processes: this checkout first, whatever else is installed."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def _data(options: Options, work: Path) -> tuple[str, ...] | None:
    """Return the overrides of train.py that name the images, after unpacking an archive of them."""
    if options.data is None:
        return None
    place = Path(options.data)
    if place.is_file():
        folder = work / "images"
        known = place.name == "cifar-10-python.tar.gz"
        if not folder.exists():
            words = [f"source={place}", f"root={folder}" if known else f"folder={folder}"]
            command = [*script("scripts/prepare_data.py"), *words]
            done = subprocess.run(command, env=_environment(), stderr=subprocess.PIPE, text=True)
            if done.returncode:
                raise ConfigError(f"data={place}: {done.stderr.strip()}")
        place = folder
    if (place / "cifar-10-batches-py").is_dir():
        return "data=cifar10", f"data.root={place.resolve()}", "data.download=false"
    statistics = ("data.mean=[0.4914,0.4822,0.4465]", "data.std=[0.247,0.2435,0.2616]", "data.load_size=32")
    return "data=imagefolder", f"data.root={place.resolve()}", *statistics


@dataclass
class Check:
    """The tables, and what their lines have in common."""

    out: Path
    work: Path
    facts: Row

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(parents=True, exist_ok=True)

    def lines(self) -> dict[str, Row]:
        """Return the lines of gpu_check.csv that are of this machine and these versions, by stage."""
        return {row["stage"]: row for row in read_csv(self.out / "gpu_check.csv") if self._ours(row)}

    def carry_out(self, stage: Stage, context: Context, limit: float) -> None:
        """Do what a stage lacks within so many seconds, and write what came of it."""
        units = stage.units(context)
        line = self.lines().get(stage.name, {})
        done = [u.name for u in units if u.name in (line.get("done") or "").split("; ")]
        if not units:
            self._write_line(stage, "left", "give data=PATH", [], 0.0)
            return
        if len(done) == len(units):
            print(f"{stage.name}: done before: {line['verdict']}, {line['says']}")
            return
        begin, failed, begun = time.monotonic(), [], False
        for place, unit in enumerate(units):
            left = limit - (time.monotonic() - begin)
            if unit.name in done or left < unit.least:
                continue
            begun = True
            others = sum(later.name not in done for later in units[place + 1 :])
            ended, rows = self._run(stage, unit, left, max(unit.least, left / (1 + others)))
            self._keep_rows(stage, unit, rows)
            if ended is True:
                done.append(unit.name)
            elif ended is False:
                failed.append(unit.name)
            taken = time.monotonic() - begin
            self._sum_up(stage, units, done, failed, float(line.get("seconds") or 0) + taken)
        if not (done or failed or begun):
            self._write_line(stage, "left", f"{limit:.0f} s are too few", done, 0.0)
        line = self.lines()[stage.name]
        print(
            f"{stage.name}: {line['verdict']}, {line['says']} ({time.monotonic() - begin:.0f} of {limit:.0f} s)",
            flush=True,
        )

    def _run(self, stage: Stage, unit: Unit, limit: float, share: float) -> tuple[bool | None, list[Row]]:
        """Run a unit; return whether it came to its end (None: it was cut off) and its rows.

        Args:
            stage: that it is a part of.
            unit: what to run.
            limit: seconds after which it is cut off.
            share: seconds that it is told to take, so that those behind it get theirs.
        """
        folder = self.work / stage.name / "".join(c if c.isalnum() else "-" for c in unit.name)
        if stage.name not in ("rows", "fast"):  # whose runs go on where they stopped
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + limit
        ended: bool | None = True
        with (folder / "log").open("w") as log:
            for command in unit.commands(folder, share):
                code = _call(command, log, unit.environment, deadline)
                if code not in unit.ends:
                    stopped = code is None or (stage.name == "rows" and code == EXIT_FAILED)
                    ended = None if stopped else False
                    break
        if ended is False:
            print(f"{stage.name}, {unit.name}: failed, see {folder / 'log'}", flush=True)
            print("".join((folder / "log").read_text(errors="replace").splitlines(keepends=True)[-12:]), flush=True)
        return ended, unit.read(folder)

    def _sum_up(self, stage: Stage, units: Sequence[Unit], done: list[str], failed: list[str], seconds: float) -> None:
        kept = [row for row in read_csv(self._table(stage)) if self._ours(row)]
        verdict, says = stage.judge(kept) if kept else ("fail" if done else "cut off", "nothing was measured")
        left = [unit.name for unit in units if unit.name not in (*done, *failed)]
        if failed:
            verdict, says = "fail", f"{says}; failed: {', '.join(failed)}"
        if left:
            verdict, says = ("cut off" if verdict != "fail" else verdict), f"{says}; left: {', '.join(left)}"
        self._write_line(stage, verdict, says, done, seconds)

    def _table(self, stage: Stage) -> Path:
        return self.out / f"gpu_check_{stage.name}.csv"

    def _ours(self, row: Mapping[str, str]) -> bool:
        return all(row.get(key, "") == str(self.facts[key]) for key in KEY)

    def _known_by(self) -> Row:
        return {key: self.facts[key] for key in KEY} | {"date": time.strftime("%Y-%m-%d %H:%M")}

    def _keep_rows(self, stage: Stage, unit: Unit, rows: list[Row]) -> None:
        others = [r for r in read_csv(self._table(stage)) if r["unit"] != unit.name or not self._ours(r)]
        write_csv(self._table(stage), [*others, *({"unit": unit.name} | row | self._known_by() for row in rows)])

    def _write_line(self, stage: Stage, verdict: str, says: str, done: list[str], seconds: float) -> None:
        table = self.out / "gpu_check.csv"
        others = [row for row in read_csv(table) if row["stage"] != stage.name or not self._ours(row)]
        line = {
            "stage": stage.name,
            "verdict": verdict,
            "says": says,
            "seconds": round(seconds),
            "done": "; ".join(done),
        }
        write_csv(table, [*others, line | self._known_by()])


def write_csv(table: Path, rows: Sequence[Row]) -> None:
    """Write rows with all their columns, those of ``KEY`` last; whole or not at all."""
    if not rows:
        return
    last = (*KEY, "date")
    columns = [name for name in dict.fromkeys(key for row in rows for key in row) if name not in last]
    aside = table.with_name(f".{table.name}.new")
    with aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*columns, *last], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    aside.replace(table)


def _call(command: Sequence[str], log: IO[str], extra: dict[str, str], deadline: float) -> int | None:
    """Run a command until a deadline; return its exit code, or None if it was stopped, with all that it started."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=_environment() | extra, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None
    finally:
        for signum, grace in ((signal.SIGTERM, 10), (signal.SIGKILL, 5)):
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signum)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(grace)


if __name__ == "__main__":
    run_program(main)
