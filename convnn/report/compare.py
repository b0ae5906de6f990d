"""Arms less a baseline: differences with intervals, what they cost, and what to know before believing them.

Imports no torch, scipy only where something is computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from convnn.errors import ConfigError
from convnn.ops.settings import check_fields
from convnn.report.arms import Arm, arms_of, baseline_of, differing, differing_settings, other_test_images
from convnn.report.correctness import OTHER_IMAGES, Predictions
from convnn.report.results import FoundRuns, tidy
from convnn.report.settings import CompareSettings
from convnn.report.tuning import Trials, count_trials
from convnn.runs.status import COMPLETE
from convnn.stats.bootstrap import Crossed, crossed_bootstrap
from convnn.stats.families import holm
from convnn.stats.paired import LEAST_SEEDS, Paired, common_seeds, paired
from convnn.stats.pareto import best_at_cost, pareto_front
from convnn.stats.power import seeds_needed
from convnn.text import Score, show

if TYPE_CHECKING:
    import pandas as pd

COSTS = {"seconds": "seconds", "gflops": "GFLOPs"}
"""Costs that arms are matched at, and what they are called."""
SLACK = 0.05
"""Share by which an arm of equal cost may be dearer."""
_MACHINE = ("gpu", "device", "processor", "cores", "threads")


@dataclass
class Comparison:
    """An arm less the baseline."""

    arm: Arm
    seeds: list[int]
    """Common ones."""
    unpaired: list[int]
    """Of the arm, without a counterpart."""
    missing: list[int]
    """Of the baseline, without a counterpart."""
    paired: Paired
    """In points."""
    p: float | None = None
    """Adjusted by Holm's correction."""
    bootstrap: Crossed | None = None
    """As a share of 1."""
    no_bootstrap: str | None = None
    """Why there is none."""
    needed: int | None = None
    """Seeds that the effect needs; None: unknown, or more than are counted."""
    differs: list[str] = field(default_factory=list)
    """Keys, those of ``optim`` aside."""
    settings: list[str] = field(default_factory=list)
    """Of ``optim``, such as ``optim.lr=0.01 instead of 0.003``."""


@dataclass
class Differences:
    """What comes of comparing the arms with one of them."""

    settings: CompareSettings
    arms: list[Arm]
    baseline: Arm
    comparisons: list[Comparison]
    family: int
    trials: dict[str, Trials] | None
    """Settings tried, by arm; None: not recorded."""
    warnings: list[str]
    notes: list[str]

    def score(self, arm: Arm) -> Score:
        """Return the accuracy of an arm over all its seeds."""
        return Score.of(list(arm.scores.values()))

    def front(self, cost: str) -> list[bool]:
        """Return which arms are on the Pareto front of mean accuracy and a cost."""
        return pareto_front([arm.cost(cost) for arm in self.arms], [self.score(arm).mean for arm in self.arms])

    def matched(self, cost: str) -> list[int | None]:
        """Return for each arm the place of the best other one of at most its cost."""
        return best_at_cost([a.cost(cost) for a in self.arms], [self.score(a).mean for a in self.arms], SLACK)

    def verdicts(self) -> tuple[list[str], list[str], list[str]]:
        """Return the names of the arms above the baseline beyond chance, of those below, and of the others."""
        alpha = 1 - self.settings.level
        found: tuple[list[str], list[str], list[str]] = ([], [], [])
        for one in self.comparisons:
            decided = one.p is not None and one.p < alpha
            found[2 if not decided else 0 if one.paired.mean > 0 else 1].append(one.arm.name)
        return found


def compare_arms(
    found: FoundRuns, frame: pd.DataFrame, summary: pd.DataFrame, settings: CompareSettings
) -> Differences:
    """Compare the arms among some runs with the baseline.

    Args:
        found: the runs.
        frame: of the same, see ``convnn.report.tables.runs_frame``.
        summary: of the frame, see ``convnn.report.tables.summarize``.
        settings: see ``CompareSettings``.

    Raises:
        ConfigError: if there are fewer than two arms with complete runs, or no baseline is meant.
    """
    check_fields(settings, "")
    every = arms_of(found, frame, summary, settings.metric)
    arms = [arm for arm in every if arm.scores]
    if len(arms) < 2:
        names = "; ".join(arm.name for arm in arms) or "none"
        raise ConfigError(f"needs two arms with complete runs that have {settings.metric}; there is: {names}")
    base = baseline_of(arms, settings.baseline)
    predictions = Predictions(settings.metric)
    comparisons = [_compared(arm, base, predictions, settings) for arm in arms if arm is not base]
    family = len(comparisons) if settings.family is None else settings.family
    if family < len(comparisons):
        raise ConfigError(f"family={family} is fewer than the {len(comparisons)} comparisons that are shown")
    for one, p in zip(comparisons, holm([c.paired.p for c in comparisons], family), strict=True):
        one.p = p
    trials = count_trials(arms, settings.tuning_folders()) if settings.tuning else None
    made = Differences(settings, arms, base, comparisons, family, trials, [], [])
    made.warnings = [*_warnings(made, every), *_not_counted(found), *predictions.problems, *found.conflicts]
    made.notes = _notes(made, predictions, found)
    return made


def _compared(arm: Arm, base: Arm, predictions: Predictions, settings: CompareSettings) -> Comparison:
    seeds, unpaired, missing = common_seeds(arm.scores, base.scores)
    test = paired([arm.scores[s] for s in seeds], [base.scores[s] for s in seeds], settings.level)
    one = Comparison(arm, seeds, unpaired, missing, test, differs=differing(arm, base))
    one.settings = [
        f"{key}={show(own)} instead of {show(other)}" for key, (own, other) in differing_settings(arm, base).items()
    ]
    one.needed = seeds_needed(settings.effect, test.std, settings.power, 1 - settings.level) if test.n > 2 else None
    if len(seeds) < LEAST_SEEDS:
        one.no_bootstrap = test.why_no_test
        return one
    matrices = OTHER_IMAGES if other_test_images(arm, base) else predictions.matrices(arm, base, seeds)
    if isinstance(matrices, str):
        one.no_bootstrap = matrices
    elif len(matrices[2]) < LEAST_SEEDS:
        one.no_bootstrap = f"predictions of {len(matrices[2])} common seeds"
    elif matrices[0].shape[1] < 2:
        one.no_bootstrap = "one test image"
    else:
        one.bootstrap = crossed_bootstrap(*matrices[:2], settings.level, settings.resamples, settings.seed)
    return one


def _warnings(made: Differences, every: Sequence[Arm]) -> list[str]:
    lines = []
    if made.settings.metric == "top1_best_on_test":
        lines.append("top1_best_on_test is chosen on the test set: it is too high, more so for arms that vary more")
    for arm in made.arms:
        if arm.repeated:
            lines.append(f"{arm.name}: further runs of seed {_listed(arm.repeated)} are left out")
    without = [arm.name for arm in every if not arm.scores]
    if without:
        lines.append(f"without {made.settings.metric}, left out: {'; '.join(without)}")
    for one in made.comparisons:
        parts = [f"seed {_listed(one.unpaired)} only here"] * bool(one.unpaired)
        parts += [f"seed {_listed(one.missing)} only in {made.baseline.name}"] * bool(one.missing)
        if parts:
            lines.append(f"{one.arm.name}: not paired: {', '.join(parts)}")
        if other_test_images(one.arm, made.baseline):
            lines.append(f"{one.arm.name}: its test images are not those of {made.baseline.name}, by equal settings")
    machines = _machines(made.arms)
    if len(machines) > 1:
        lines.append(f"seconds were measured on {len(machines)} machines and do not compare: {'; '.join(machines)}")
    if made.trials is not None:
        counts = ", ".join(f"{name} {trials.count}" for name, trials in made.trials.items())
        if len({trials.count for trials in made.trials.values()}) > 1:
            lines.append(f"arms were not tuned alike; settings tried: {counts}")
        for name, trials in made.trials.items():
            if not trials.count:
                lines.append(
                    f"{name}: no run in tuning is a trial of it; the nearest differs in {_some(trials.nearest)}"
                )
    return lines


def _not_counted(found: FoundRuns) -> list[str]:
    """Say how many runs do not count: an arm whose seeds diverge looks better by those that are left."""
    counts = Counter(run.status for run in found.runs if run.status != COMPLETE)
    told = ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
    return [f"runs that are not complete and do not count: {told}"] if counts else []


def _machines(arms: Sequence[Arm]) -> list[str]:
    """Return what the runs computed on, each different machine once."""
    told: dict[str, None] = {}
    for arm in arms:
        for run in arm.runs.values():
            values = {name: run.environment.get(name) for name in _MACHINE}
            device = values["device"] or run.result.get("device")
            values["device"] = None if device is None else str(device).partition(":")[0]
            told[", ".join(tidy(f"{show(v)} {k}" if k in ("cores", "threads") else show(v))
                           for k, v in values.items() if v is not None)] = None  # fmt: skip
    return list(told)


def _notes(made: Differences, predictions: Predictions, found: FoundRuns) -> list[str]:
    lines = []
    for one in made.comparisons:
        parts = [f"in {len(one.differs)} keys: {_some(one.differs)}"] if len(one.differs) > 1 else []
        parts += [f"in settings of the optimizer: {_some(one.settings)}"] if one.settings else []
        if parts:
            lines.append(f"{one.arm.name} differs from {made.baseline.name} {'; and '.join(parts)}")
    if made.trials is None:
        lines.append("settings tried for each arm: not recorded (tuning=DIR names the sweeps in which they were tuned)")
    missing = predictions.missing
    if missing:
        first = found.relative(missing[0].folder)
        lines.append(
            f"no bootstrap where predictions.npz is missing ({len(missing)} runs, the first {first}); it is made by: "
            "uv run scripts/evaluate.py run=DIR"
        )
    return lines


def _some(parts: Sequence[str], most: int = 6) -> str:
    rest = f" and {len(parts) - most} more" if len(parts) > most else ""
    return ", ".join(parts[:most]) + rest


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))
