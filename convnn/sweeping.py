"""A whole sweep: plan it, hand the points to a Hydra launcher, show how far it is, and sum it up. Imports no torch."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import shlex
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from convnn.checks import nearest
from convnn.cli import CONF_DIR, EXIT_CONFIG, EXIT_FAILED, from_hydra
from convnn.config import ConfigError, fingerprint, run_name
from convnn.files import lock
from convnn.grid import (
    Plan,
    Point,
    SweepConfig,
    key_of,
    load_point,
    make_plan,
    merge_overrides,
    save_plan,
    sweep_options,
    sweep_text,
)
from convnn.points import FAILED, PointState, StopSignals, lock_file, point_state, run_point, stop_file
from convnn.progress import Progress
from convnn.reporting import Report, make_report

_PLUGINS = {"joblib": ("hydra_joblib_launcher", "parallel"), "submitit": ("hydra_submitit_launcher", "slurm")}


# ---------------------------------------------------------------------------------------------- one job


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="sweep")
def main(values: DictConfig) -> float | str | None:
    """Run the point that Hydra composed in a process of its own; return top-1 in percent, else the status.

    It never raises: a launcher would give up the other jobs.
    """
    from hydra.core.hydra_config import HydraConfig

    sweep = values.sweep
    folder = Path(sweep.dir)
    try:
        point = load_point(folder, sweep.point[1:]) if sweep.point else _free_point(values)
    except ConfigError as error:  # only where another sweeper than ours chose the point
        print(f"error: {error}", file=sys.stderr)
        return "invalid"
    more = tuple(o for o in (f"tracker.group={sweep.name}",) if "tracker.group" not in map(key_of, point.overrides))
    parallel = int(HydraConfig.get().launcher.get("n_jobs") or 1)
    status = run_point(
        folder,
        point,
        token=sweep.token,
        more=more,
        device=values.device if not sweep.point else _device(point),
        jobs_per_device=sweep.jobs_per_device,
        parallel=parallel,
    )
    return point_state(folder, point).top1 if status == "complete" else status


def _device(point: Point) -> str:
    return next((o.split("=", 1)[1] for o in point.overrides if key_of(o) == "device"), "auto")


def _free_point(values: DictConfig) -> Point:
    """Return the point that a sweeper other than ours asked for."""
    from hydra.core.hydra_config import HydraConfig

    plain = OmegaConf.to_container(values, resolve=True)
    assert isinstance(plain, dict)
    plain.pop("sweep")
    config = from_hydra(OmegaConf.create(plain))
    overrides = tuple(o for o in HydraConfig.get().overrides.task if not _is_sweep(o))
    print_ = fingerprint(config)
    return Point(f"{run_name(config)}-{print_[:8]}", print_, overrides)


def _is_sweep(override: str) -> bool:
    return key_of(override) == "grid" or key_of(override).startswith("sweep.")


def _is_hydra(override: str) -> bool:
    return key_of(override).startswith(("hydra.", "hydra/"))


def launch(argv: list[str]) -> None:
    """Hand a command line to Hydra, which calls ``main`` for every job through its launcher."""
    sys.argv[1:] = argv
    main()


# -------------------------------------------------------------------------------------------- the sweep


def run_sweep(argv: Sequence[str]) -> int:
    """Carry out the sweep of a command line and return its exit code.

    Args:
        argv: command line of sweep.py.

    Raises:
        ConfigError: one line, naming the key and the way out; nothing has run then.
    """
    own: list[str] = []
    launcher: list[str] = []
    given: list[str] = []
    for arg in argv:
        (own if _is_sweep(arg) else launcher if _is_hydra(arg) else given).append(arg)
    options = sweep_options(own)
    if any(key_of(o) == "hydra/sweeper" for o in launcher):
        return _foreign_sweep(options, given, launcher)
    return carry_out(options, given, launcher, ["sweep.py", *argv])


def carry_out(
    options: SweepConfig,
    given: Sequence[str],
    launcher: Sequence[str],
    command: Sequence[str],
) -> int:
    """Carry out a sweep and return its exit code: 0 all complete, 1 some failed, 128 + signal stopped by a signal.

    Args:
        options: what to run.
        given: overrides of the points, which count more than the options'.
        launcher: overrides for Hydra, such as the launcher.
        command: what the user called, for the records.

    Raises:
        ConfigError: one line, naming the key and the way out; nothing has run then.
    """
    launcher = [*launcher, *_check_launcher(launcher)]
    folder = Path(options.dir)
    if not (given or options.axes or options.points):
        raise ConfigError("the sweep has no points; give it values (operator.k=1,4,9) or a grid (grid=spectrum)")
    plan = make_plan(options, given)
    if options.dry_run:
        print(describe(plan, folder, options))
        print(_cost(plan, folder))
        return EXIT_CONFIG if plan.invalid and options.on_invalid == "fail" else 0
    if plan.invalid:
        print(_invalid_lines(plan))
        if options.on_invalid == "fail":
            raise ConfigError(f"{len(plan.invalid)} points cannot work; change them, or set sweep.on_invalid=skip")
    sweep = Sweep(plan, folder, options, f"{platform.node()}-{os.getpid()}", list(command))
    return sweep.run(list(launcher))


def _job_options(options: SweepConfig, token: str) -> list[str]:
    """Return what a job has to know of the sweep."""
    return [
        f"sweep.dir={_quoted(options.dir)}",
        f"sweep.name={_quoted(options.name)}",
        f"sweep.jobs_per_device={options.jobs_per_device}",
        f"sweep.token={_quoted(token)}",
    ]


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _check_launcher(launcher: Sequence[str]) -> list[str]:
    """Return more overrides that a launcher needs; raise ConfigError for one that is not installed."""
    chosen = next((o.split("=", 1)[1] for o in launcher if key_of(o) == "hydra/launcher"), "basic")
    known = ["basic", "joblib", "submitit_local", "submitit_slurm"]
    package, extra = next((v for k, v in _PLUGINS.items() if chosen.startswith(k)), ("", ""))
    if (package and importlib.util.find_spec("hydra_plugins") is None) or (
        package and importlib.util.find_spec(f"hydra_plugins.{package}") is None
    ):
        raise ConfigError(f"hydra/launcher={chosen} needs a plugin; install it with: uv sync --extra {extra}")
    if not package and chosen not in known and chosen.startswith(("job", "sub", "bas")):
        raise ConfigError(f"hydra/launcher={chosen} is unknown{nearest(chosen, known)}")
    if chosen == "submitit_slurm":
        if shutil.which("srun") is None:
            raise ConfigError(
                "hydra/launcher=submitit_slurm: there is no srun here; run it on a machine of the cluster, or use "
                "hydra/launcher=submitit_local"
            )
        if not any(key_of(o) == "hydra.launcher.max_num_timeout" for o in launcher):
            return ["hydra.launcher.max_num_timeout=100"]  # a job at its time limit is requeued, and resumes
    return []


def _foreign_sweep(options: SweepConfig, given: Sequence[str], launcher: Sequence[str]) -> int:
    """Let another sweeper choose the points one by one; each is still skipped, resumed and recorded as ever."""
    if options.points:
        raise ConfigError("hydra/sweeper: sweep.points belong to the default sweeper; give keys instead")
    axes = [f"{key}={sweep_text(values)}" for key, values in options.axes.items()]
    overrides = merge_overrides(options.base, axes, given)
    own = _job_options(options, f"{platform.node()}-{os.getpid()}")
    launch([*overrides, *own, *launcher, *_check_launcher(launcher)])
    return 0


@dataclass
class Sweep:
    """A planned sweep in its folder."""

    plan: Plan
    folder: Path
    options: SweepConfig
    token: str
    command: list[str]

    def states(self) -> dict[str, PointState]:
        """Return the state of every point, by fingerprint."""
        return {p.fingerprint: point_state(self.folder, p) for p in self.plan.points}

    def todo(self) -> list[Point]:
        """Return the points that are to be run."""
        states = self.states()
        skip = ("complete", *(FAILED if not self.options.retry_failed else ()))
        return [p for p in self.plan.points if states[p.fingerprint].status not in skip]

    def run(self, launcher: list[str]) -> int:
        """Run what is to be run, and sum up; return the exit code."""
        self._prepare()
        own = [*_job_options(self.options, self.token), *launcher]
        stop = stop_file(self.folder, self.token)
        stop.unlink(missing_ok=True)
        todo = self.todo()
        print(self._opening(todo), flush=True)
        try:
            with StopSignals(lambda _: stop.touch()) as signals, Progress(self.folder, self.options.name, todo):
                while todo and signals.seen is None:
                    with contextlib.suppress(SystemExit):  # a launcher's own failure: the points' states tell
                        launch([*own, "sweep.point=" + ",".join(f"p{p.fingerprint}" for p in todo)])
                    todo = self._left_by_others(signals)
        finally:
            stop.unlink(missing_ok=True)
        reported = signals.seen is None and self._report()
        print(self._closing(failures=not reported))
        if signals.seen is not None:
            return 128 + signals.seen
        return EXIT_FAILED if any(s.status != "complete" for s in self.states().values()) else 0

    def _prepare(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(lock(self.folder / ".plan.lock", wait=True)):  # type: ignore[type-var]
                save_plan(self.plan, self.folder, self.command)
        except OSError as error:
            raise ConfigError(f"sweep.dir={self.folder} cannot be written: {error.strerror}") from error

    def _left_by_others(self, signals: StopSignals) -> list[Point]:
        """Wait for the points that another sweep runs at this moment; return those that it did not complete."""
        left = []
        for point in self.plan.points:
            if point_state(self.folder, point).status != "running":
                continue
            while signals.seen is None:
                held = lock(lock_file(self.folder, point))
                if held is not None:
                    held.close()
                    break
                time.sleep(0.5)
            if point_state(self.folder, point).status == "interrupted":
                left.append(point)
        return left

    def _opening(self, todo: Sequence[Point]) -> str:
        counts = Counter(s.status for s in self.states().values())
        parts = [f"{n} {status}" for status, n in sorted(counts.items())]
        extra = f", {self.plan.duplicates} duplicates merged" if self.plan.duplicates else ""
        return f"sweep {self.folder}: {len(self.plan.points)} points ({', '.join(parts)}{extra}), {len(todo)} to run"

    def _report(self) -> bool:
        """Write tables and plots, and show the table; return whether that was done."""
        if not self.options.report:
            return False
        try:
            report = make_report([self.folder], self.folder / "report")
        except ConfigError as error:  # nothing to report, or a package is missing
            print(f"no report: {error}")
            return False
        print(report.text())
        self._publish(report)
        return True

    def _publish(self, report: Report) -> None:
        """Give the group's report run in W&B the table and the plots."""
        configs = [c for c in self.plan.configs.values() if c.tracker.name == "wandb" and c.tracker.mode != "disabled"]
        if configs:
            from convnn.tracking import publish_report

            rows = json.loads(report.summary.to_json(orient="records"))
            images = {p.png.stem: p.png for p in report.pictures}
            publish_report(configs[0].tracker, self.folder, self.options.name, rows, images)
            print(f"upload all runs with: wandb sync {self.folder}/points/*/wandb/offline-run-* "
                  f"{self.folder}/wandb/offline-run-*")  # fmt: skip

    def _closing(self, failures: bool) -> str:
        states = self.states()
        lines = []
        for point in self.plan.points:
            state = states[point.fingerprint]
            if failures and state.status in FAILED:
                lines.append(f"{state.status}: {point.name}: {state.reason}; log {self.folder / point.log}")
        counts = Counter(s.status for s in states.values())
        summary = ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
        lines.append(f"sweep {self.folder}: {summary}")
        if any(s.status != "complete" for s in states.values()):
            lines.append("the same command goes on from here: " + shlex.join(self.command))
        return "\n".join(lines)


def _shared(plan: Plan) -> set[str]:
    """Return the overrides that all points have, if there are several points."""
    every = [set(p.overrides) for p in plan.points] + [set(overrides) for overrides, _ in plan.invalid]
    return set.intersection(*every) if len(every) > 1 else set()


def _invalid_lines(plan: Plan) -> str:
    shared = _shared(plan)
    return "\n".join(
        f"invalid  {' '.join(o for o in overrides if o not in shared)}: {reason}" for overrides, reason in plan.invalid
    )


def describe(plan: Plan, folder: Path, options: SweepConfig) -> str:
    """Return what a sweep would do, one line a point: done, failed, partial, todo, invalid."""
    lines = []
    counts: Counter[str] = Counter()
    shared = _shared(plan)
    if shared and plan.points:
        lines.append("all points: " + " ".join(o for o in plan.points[0].overrides if o in shared))
    for point in plan.points:
        state = point_state(folder, point)
        word = "done" if state.status == "complete" else "partial" if state.status == "interrupted" else state.status
        counts[word] += 1
        own = " ".join(o for o in point.overrides if o not in shared)
        text = f"{word:<8} {point.name}  {own}"
        lines.append(text + (f"  ({state.reason})" if state.reason and word in FAILED else ""))
    counts["invalid"] = len(plan.invalid)
    if plan.invalid:
        lines.append(_invalid_lines(plan))
    total = ", ".join(f"{n} {word}" for word, n in counts.items() if n)
    if plan.duplicates:
        total += f"; {plan.duplicates} duplicates merged"
    if any(counts[s] for s in FAILED) and not options.retry_failed:
        total += "; failed points are left (sweep.retry_failed=false)"
    return "\n".join([*lines, f"{len(plan.points) + len(plan.invalid)} points in {folder}: {total}"])


def _cost(plan: Plan, folder: Path) -> str:
    """Return an estimate of what is left to compute; see ``convnn.costs``."""
    left = [p for p in plan.points if point_state(folder, p).status != "complete"]
    if not left:
        return "nothing is left to compute"
    from convnn.costs import estimate

    return estimate([plan.configs[p.fingerprint] for p in left], [folder / p.folder for p in plan.points])
