"""What a sweep would do, as text: for ``sweep.dry_run`` and for points that cannot work. Imports no torch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from convnn.config.identity import NO_SPECTRUM
from convnn.config.overrides import key_of
from convnn.runs.status import COMPLETE, FAILURES, INTERRUPTED, INVALID, PARTIAL
from convnn.sweep.options import SweepConfig
from convnn.sweep.plan import Plan, Point
from convnn.sweep.state import point_state


def shared_overrides(plan: Plan) -> set[str]:
    """Return the overrides that all points have, if there are several points."""
    every = [set(p.overrides) for p in plan.points] + [set(overrides) for overrides, _ in plan.invalid]
    return set.intersection(*every) if len(every) > 1 else set()


def moved_axes(plan: Plan) -> list[str]:
    """Return a line for each axis that has no effect: a schedule moves what it sets, or an operator has none of it."""
    lines = []
    for name in ("blend", "k", "temperature"):
        axis, equal = f"operator.{name}", "points that differ in it alone are merged"
        if axis not in plan.axes:
            continue
        configs = list(plan.configs.values())
        if name != "k" and any(getattr(c.schedule, name).shape != "constant" for c in configs):  # k builds the layer
            lines.append(f"{axis} is an axis, but a schedule moves it: {equal}")
        foreign = dict.fromkeys(c.operator.name for c in configs if c.operator.target in NO_SPECTRUM)
        if foreign:
            lines.append(f"{axis} is an axis, but operator={','.join(foreign)} has none: {equal}")
    return lines


def invalid_lines(plan: Plan) -> str:
    """Return the points that cannot work, one line each with its reason."""
    shared = shared_overrides(plan)
    return "\n".join(
        f"invalid  {' '.join(o for o in overrides if o not in shared)}: {reason}" for overrides, reason in plan.invalid
    )


def describe_plan(plan: Plan, folder: Path, options: SweepConfig) -> str:
    """Return what a sweep would do, one line a point: done, failed, partial, todo, invalid."""
    lines = []
    counts: Counter[str] = Counter()
    shared = shared_overrides(plan)
    if shared and plan.points:
        lines.append("all points: " + " ".join(o for o in plan.points[0].overrides if o in shared))
    for point in plan.points:
        state = point_state(folder, point)
        word = {COMPLETE: "done", INTERRUPTED: PARTIAL}.get(state.status, state.status)
        counts[word] += 1
        own = " ".join(o for o in point.overrides if o not in shared and not _unused(o, plan, point))
        text = f"{word:<8} {point.name}  {own}"
        lines.append(text + (f"  ({state.reason})" if state.reason and word in FAILURES else ""))
    counts[INVALID] = len(plan.invalid)
    if plan.invalid:
        lines.append(invalid_lines(plan))
    total = ", ".join(f"{n} {word}" for word, n in counts.items() if n)
    if plan.duplicates:
        total += f"; {plan.duplicates} equal in effect merged"
    if any(counts[s] for s in FAILURES) and not options.retry_failed:
        total += "; failed points are left (sweep.retry_failed=false)"
    return "\n".join([*lines, f"{len(plan.points) + len(plan.invalid)} points in {folder}: {total}"])


def _unused(override: str, plan: Plan, point: Point) -> bool:
    """Return whether an override has no effect, as that of an operator where no layer is replaced."""
    plain = not plan.configs[point.fingerprint].swap.effective_rules()
    return plain and key_of(override).partition(".")[0] in ("operator", "schedule")


def cost_line(plan: Plan, folder: Path, timed: bool = False) -> str:
    """Return an estimate of what is left to compute; see ``convnn.sweep.cost``."""
    left = [p for p in plan.points if point_state(folder, p).status != COMPLETE]
    if not left:
        return "nothing is left to compute"
    from convnn.sweep.cost import estimate_cost, estimate_time

    configs = [plan.configs[p.fingerprint] for p in left]
    text = estimate_cost(configs, [folder / p.folder for p in plan.points])
    return f"{text}\n{estimate_time(configs)}" if timed else text
