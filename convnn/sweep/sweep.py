"""A whole sweep: plan it, hand the points to a Hydra launcher, show how far it is, and sum it up. Imports no torch."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path

from convnn.config.overrides import is_hydra, is_sweep, key_of, merge_overrides, sweep_text
from convnn.errors import EXIT_CONFIG, EXIT_FAILED, ConfigError
from convnn.runs.status import COMPLETE
from convnn.runtime.files import read_json
from convnn.runtime.signals import StopSignals
from convnn.sweep.budget import Budget
from convnn.sweep.call import Sweep
from convnn.sweep.describe import cost_line, describe_plan, invalid_lines, moved_axes
from convnn.sweep.job import job_options, launch
from convnn.sweep.on_cluster import ClusterSweep
from convnn.sweep.options import SweepConfig, sweep_options
from convnn.sweep.overview import overview
from convnn.sweep.plan import keep_known_names, make_plan
from convnn.sweep.same_data import check_points
from convnn.sweep.sbatch import read_settings
from convnn.sweep.search import run_search
from convnn.sweep.state import stop_file

_REFUSED = {
    "run.dir": "the points' folders are made by sweep.py; set sweep.dir",
    "run.if_exists": "points are always continued; remove a point's folder to run it anew",
    "resume": "the same command again continues a sweep; train.py resume=DIR continues one run",
    "from_run": "train.py from_run=DIR begins one run",
    "sweep.point": "it is set by sweep.py",
    "sweep.token": "it is set by sweep.py",
    "sweep.deadline": "it is set by sweep.py; sweep.budget=30m is a time from now",
    "hydra.mode": "sweep.py is always a multirun",
    "hydra.job.chdir": "jobs stay in the folder where sweep.py was called",
}

_YEAR = 365 * 24 * 60
"""In minutes."""
_PLUGINS = {"joblib": ("hydra_joblib_launcher", "parallel"), "submitit": ("hydra_submitit_launcher", "slurm")}


def run_sweep(argv: Sequence[str], command: Sequence[str] | None = None) -> int:
    """Carry out the sweep of a command line and return its exit code.

    Args:
        argv: command line of sweep.py.
        command: what the user called, for the records.

    Raises:
        ConfigError: one line, naming the key and the way out; nothing has run then.
    """
    own: list[str] = []
    launcher: list[str] = []
    given: list[str] = []
    for arg in argv:
        (own if is_sweep(arg) else launcher if is_hydra(arg) else given).append(arg)
    for arg in argv:
        if key_of(arg) in _REFUSED:
            raise ConfigError(f"{arg}: {_REFUSED[key_of(arg)]}")
    more = _check_launcher(launcher)
    options = sweep_options(own, launcher)
    if "hydra/sweeper=optuna" in launcher:
        return run_search(options, given, [*launcher, *more], command or ["sweep.py", *argv])
    if any(key_of(o) == "hydra/sweeper" for o in launcher):
        return _sweep_with_other_sweeper(options, given, launcher)
    return carry_out(options, given, launcher, command or ["sweep.py", *argv])


def carry_out(
    options: SweepConfig,
    given: Sequence[str],
    launcher: Sequence[str],
    command: Sequence[str],
) -> int:
    """Carry out a sweep and return its exit code: 0 all complete, 1 some failed or left, 128 + signal when stopped.

    Args:
        options: what to run.
        given: overrides of the points, which count more than the options'.
        launcher: overrides for Hydra, such as the launcher.
        command: what the user called, for the records.

    Raises:
        ConfigError: one line, naming the key and the way out; nothing has run then.
    """
    launcher = [*launcher, *_check_launcher(launcher)]
    on_slurm = _chosen(launcher) == "submitit_slurm"
    if options.detach and not on_slurm:
        raise ConfigError("sweep.detach=true leaves the work to a cluster: it needs hydra/launcher=submitit_slurm")
    if options.detach and options.budget:
        raise ConfigError("sweep.detach=true does not go with sweep.budget, the time of a call; set one of them")
    folder = Path(options.dir)
    budget = Budget.from_now(folder, options.budget)
    token = f"{platform.node()}-{os.getpid()}"
    if not (given or options.axes or options.points):
        raise ConfigError("the sweep has no points; give it values (operator.k=1,4,9) or a grid (grid=spectrum)")
    plan = make_plan(options, given)
    keep_known_names(plan, folder)
    check_points(plan, folder)
    for line in moved_axes(plan):
        print(f"warning: {line}")
    if options.dry_run != "false":
        print(describe_plan(plan, folder, options))
        print(cost_line(plan, folder, timed=options.dry_run == "timed"))
        return EXIT_CONFIG if plan.invalid and options.on_invalid == "fail" else 0
    if options.status:
        lines, complete = overview(folder, plan.points, everything=True)
        print("\n".join(lines))
        return 0 if complete else EXIT_FAILED
    if plan.invalid:
        print(invalid_lines(plan))
        if options.on_invalid == "fail":
            raise ConfigError(f"{len(plan.invalid)} points cannot work; change them, or set sweep.on_invalid=skip")
    if on_slurm:
        settings = read_settings(launcher)
        return ClusterSweep(plan, folder, options, token, list(command), budget, settings=settings).run(list(launcher))
    return Sweep(plan, folder, options, token, list(command), budget).run(list(launcher))


def _chosen(launcher: Sequence[str]) -> str:
    return next((o.split("=", 1)[1] for o in launcher if key_of(o) == "hydra/launcher"), "basic")


def _check_launcher(launcher: Sequence[str]) -> list[str]:
    """Return more overrides that a launcher needs; raise ConfigError for one that is not installed."""
    chosen = _chosen(launcher)
    package, extra = next((v for k, v in _PLUGINS.items() if chosen.startswith(k)), ("", ""))
    if (package and importlib.util.find_spec("hydra_plugins") is None) or (
        package and importlib.util.find_spec(f"hydra_plugins.{package}") is None
    ):
        raise ConfigError(f"hydra/launcher={chosen} needs a plugin; install it with: uv sync --extra {extra}")
    if chosen == "submitit_local" and not any(key_of(o) == "hydra.launcher.timeout_min" for o in launcher):
        return [f"hydra.launcher.timeout_min={_YEAR}"]  # else it ends a point after an hour
    if chosen == "submitit_slurm":
        if shutil.which("srun") is None:
            raise ConfigError(
                "hydra/launcher=submitit_slurm: there is no srun here; run it on a machine of the cluster, or use "
                "hydra/launcher=submitit_local"
            )
        if not any(key_of(o) == "hydra.launcher.max_num_timeout" for o in launcher):
            return ["hydra.launcher.max_num_timeout=100"]  # a job at its time limit is requeued, and resumes
    return []


def _sweep_with_other_sweeper(options: SweepConfig, given: Sequence[str], launcher: Sequence[str]) -> int:
    """Let another of Hydra's sweepers choose the points one by one; each is skipped, resumed and recorded as ever."""
    if options.points or options.dry_run != "false":
        raise ConfigError("hydra/sweeper: sweep.points and sweep.dry_run need the default sweeper")
    axes = [f"{key}={sweep_text(values)}" for key, values in options.axes.items()]
    overrides = merge_overrides(options.base, axes, given)
    token = f"{platform.node()}-{os.getpid()}"
    stop = stop_file(Path(options.dir), token)
    Path(options.dir).mkdir(parents=True, exist_ok=True)
    budget = Budget.from_now(Path(options.dir), options.budget)
    try:
        with StopSignals(lambda _: stop.touch()) as signals, contextlib.suppress(SystemExit):
            launch([*overrides, *job_options(options, token, budget), *launcher, *_check_launcher(launcher)])
    finally:
        stop.unlink(missing_ok=True)
    records = [r for path in Path(options.dir).glob("status/*.json") if (r := read_json(path))]
    bad = [r for r in records if r.get("token") == token and r["status"] != COMPLETE]
    for record in bad:
        print(f"{record['status']}: {record['name']}: {record['reason']}; log {record['log']}")
    if signals.seen is not None:
        return 128 + signals.seen
    if budget.spent():
        print(f"sweep.budget={options.budget} is spent")
    return EXIT_FAILED if bad or budget.spent() else 0
