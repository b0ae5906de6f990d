"""How far a sweep is, from its folder and, where its points are jobs, from the scheduler. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from convnn.runs.status import CANCELLED, COMPLETE, FAILURES, INTERRUPTED, PARTIAL, PRUNED, QUEUED, RUNNING, TODO
from convnn.runtime.scheduler import Scheduler, SchedulerError, Slurm
from convnn.sweep.cluster import Cluster
from convnn.sweep.plan import Point, read_plan, to_point
from convnn.sweep.state import PointState, log_of, point_state
from convnn.sweep.submission import read_submissions

MOST = 20
"""Points of a state that are listed."""
_ORDER = (COMPLETE, RUNNING, QUEUED, INTERRUPTED, PRUNED, PARTIAL, TODO, CANCELLED, *FAILURES)


def overview(
    folder: Path, points: Sequence[Point] | None = None, *, everything: bool = False, scheduler: Scheduler | None = None
) -> tuple[list[str], bool]:
    """Return the lines that say where a sweep's points are, and whether all of them are complete.

    Args:
        folder: of the sweep.
        points: which ones; None: all that its plan.json has.
        everything: list the points that are complete or not begun too.
        scheduler: asked about jobs, where the folder has some; None: SLURM.
    """
    if points is None:
        points = [to_point(p) for p in read_plan(folder).get("points", [])]
    lines = []
    cluster = Cluster(folder, points, scheduler or Slurm(), "", records=False)
    try:
        states = cluster.look()
    except SchedulerError as error:
        lines.append(f"warning: {error}; jobs that are queued or run are not known")
        states = {p.fingerprint: point_state(folder, p) for p in points}
    order = {status: place for place, status in enumerate(_ORDER)}
    counts = Counter(state.status for state in states.values())
    for status in sorted(counts, key=lambda s: order.get(s, len(order))):
        of_it = [p for p in points if states[p.fingerprint].status == status]
        shown = of_it if everything else [] if status in (COMPLETE, TODO) else of_it[:MOST]
        lines += [_line(folder, p, states[p.fingerprint]) for p in shown]
        if shown and len(shown) < len(of_it):
            lines.append(f"{status:<11} {len(of_it) - len(shown)} more; all=true lists them")
    summary = ", ".join(f"{counts[status]} {status}" for status in sorted(counts, key=lambda s: order.get(s, 99)))
    lines.append(f"sweep {folder}: {len(points)} points: {summary or 'none'}")
    ends = [s for s in read_submissions(folder) if not s.points and s.job is not None]
    try:
        waiting = [s.job for s in ends if any(j.alive for j in cluster.scheduler.jobs([s.name]).values())]
    except SchedulerError:
        waiting = []
    if waiting:
        lines.append(f"job {waiting[-1]} sums up when all jobs before it have ended")
    return lines, set(counts) <= {COMPLETE}


def _line(folder: Path, point: Point, state: PointState) -> str:
    text = f"{state.status:<11} {point.name}"
    if state.top1 is not None:
        text += f"  top-1 {state.top1:.2f} %"
    if state.reason:
        text += f"  {state.reason}"
    return text + (log_of(folder, point) if state.status in FAILURES else "")
