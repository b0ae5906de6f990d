"""The first thing a report says: what won, by how much, whether it is real, what it cost. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from convnn.report.arms import Arm, few
from convnn.report.compare import Comparison, Differences
from convnn.report.content import Report
from convnn.report.differences import p_text
from convnn.report.tables import METRICS, labels_of, main_keys, name_moving, score_of
from convnn.runs.metrics import is_number
from convnn.runs.status import COMPLETE
from convnn.stats.paired import LEAST_SEEDS
from convnn.text import Score, show, size

COSTS = {
    "seconds": "training time",
    "gflops": "forward pass of one image",
    "peak_memory_bytes": "peak memory",
    "params": "parameters",
}
"""Costs that a first screen has, by their name in result.json."""
_SHORT = {"seconds": "time", "gflops": "GFLOPs", "peak_memory_bytes": "memory", "params": "parameters"}
MANY = 5
"""Untested arms from which on the highest mean is told to be partly luck."""


@dataclass(frozen=True)
class Fact:
    """One of the four questions with its answer."""

    question: str
    answer: str
    note: str = ""


@dataclass
class Answer:
    """What a page says before all else."""

    headline: str
    text: str
    facts: list[Fact]
    cost_header: list[str] = field(default_factory=list)
    costs: list[list[str]] = field(default_factory=list)
    """Rows: what, of the arm, and with a second arm of that one and the ratio."""
    cautions: list[str] = field(default_factory=list)


def answer_of(report: Report) -> Answer:
    """Return what the runs of a report say."""
    if report.differences is not None:
        return _compared(report.differences)
    return _not_compared(report)


# --------------------------------------------------------------------------------------------- against a baseline


def _compared(made: Differences) -> Answer:
    known = [one for one in made.comparisons if one.paired.n]
    if not known:
        return _no_common_seed(made)
    best = max(known, key=lambda one: one.paired.mean)
    apart = [one.arm.name for one in made.comparisons if not one.paired.n]
    above = [one for one in known if _decided(one, made) and one.paired.mean > 0]
    if above:
        answer = _won(made, max(above, key=lambda one: one.paired.mean), above)
    elif best.paired.mean > 0:
        answer = _undecided(made, best)
    else:
        answer = _baseline_first(made, best)
    if apart:
        answer.text += f" {few(apart)}: no seed in common with {made.baseline.name}, and not compared."
    answer.cautions += _doubts(made, best, above)
    return answer


def _of_arms(made: Differences) -> str:
    """Say among how many arms the baseline and those compared with it are."""
    compared = 1 + sum(one.paired.n > 0 for one in made.comparisons)
    return f"{len(made.arms)} arms" if compared == len(made.arms) else f"{compared} compared arms"


def _decided(one: Comparison, made: Differences) -> bool:
    return one.p is not None and one.p < 1 - made.settings.level


def _won(made: Differences, one: Comparison, above: Sequence[Comparison]) -> Answer:
    base = made.baseline.name
    text = f"{one.arm.name} has {_measured(one, made)} A difference like this is hardly chance{_p_words(one, made)}."
    others = [other.arm.name for other in above if other is not one]
    if others:
        text += f" Also above {base} beyond chance: {few(others)}; which of them is best was not tested."
    return _answer(
        made,
        one,
        f"{one.arm.name} beats {base} by {one.paired.mean:.2f} points, beyond chance",
        text,
        Fact("What won?", one.arm.name, f"of {len(made.arms)} arms; baseline: {base}"),
        Fact("Is it real?", "Yes, beyond chance", _real_note(one, made)),
    )


def _undecided(made: Differences, best: Comparison) -> Answer:
    base = made.baseline.name
    text = f"The highest mean difference is that of {best.arm.name}, {_measured(best, made)} "
    facts = (
        Fact("What won?", "Nothing so far", f"highest mean difference of {_of_arms(made)}: {best.arm.name}"),
        Fact("Is it real?", *_unreal(best, made)),
    )
    headline = f"No arm beats {base} beyond chance"
    if best.p is None:
        headline = f"Too few seeds to say whether any arm beats {base}"
        if best.paired.n >= LEAST_SEEDS:
            headline = f"No test says whether any arm beats {base}"
    return _answer(made, best, headline, text + _more_seeds(best, made), *facts)


def _baseline_first(made: Differences, nearest: Comparison) -> Answer:
    base = made.baseline.name
    rest = [one for one in made.comparisons if one.paired.n and not _decided(one, made)]
    highest = nearest.paired.mean < 0 and max(made.arms, key=lambda arm: made.score(arm).mean) is made.baseline
    text = f"Nearest to {base} comes {nearest.arm.name} with {_measured(nearest, made)} "
    if not rest:
        compared = [one for one in made.comparisons if one.paired.n]
        headline = f"{base}, the baseline, beats all {len(compared)} other arms beyond chance"
        if len(compared) == 1:
            headline = f"{base}, the baseline, beats {nearest.arm.name} beyond chance"
        won = Fact("What won?", base, f"the baseline, of {len(made.arms)} arms")
        text += f"It is below {base} beyond chance{_p_words(nearest, made)}."
        real = Fact("Is it real?", "Yes, beyond chance", _real_note(nearest, made))
    else:
        headline = f"No arm beats {base}, the baseline" + (", which has the highest mean" if highest else "")
        won = Fact("What won?", "Nothing so far", f"best of {_of_arms(made)} by common seeds: {base}")
        decided = sum(one.paired.n > 0 for one in made.comparisons) - len(rest)
        text += f"{decided} of {len(made.comparisons)} arms are below {base} beyond chance. " if decided else ""
        text += "" if _decided(nearest, made) else _more_seeds(nearest, made)
        real = Fact("Is it real?", *_unreal(nearest, made))
        if _decided(nearest, made):
            real = Fact("Is it real?", "Not for all", f"not decided: {few([one.arm.name for one in rest])}")
    return _answer(made, nearest, headline, text, won, real)


def _no_common_seed(made: Differences) -> Answer:
    best = max(made.arms, key=lambda arm: made.score(arm).mean)
    text = f"The highest mean is that of {best.name}, {made.score(best)}. No arm has a seed in common with "
    text += f"{made.baseline.name}, {made.score(made.baseline)}, so nothing is paired and nothing is tested."
    other = made.baseline if best is not made.baseline else None
    facts = [
        Fact("What won?", "Cannot be told", f"highest mean of {len(made.arms)} arms: {best.name}"),
        Fact("By how much?", "–", "no common seeds"),
        Fact("Is it real?", "Cannot be told", f"run the same {LEAST_SEEDS} or more seeds of both"),
        _cost_fact(best, other),
    ]
    header, costs = _cost_rows(best, other)
    headline = f"No seed in common with {made.baseline.name}: nothing can be compared"
    return Answer(headline, text, facts, header, costs, _doubts(made, None, []))


def _answer(made: Differences, one: Comparison, headline: str, text: str, won: Fact, real: Fact) -> Answer:
    test = one.paired
    between = f"{one.arm.name} less {made.baseline.name}"
    note = f"{between}, {_seeds(test.n)}"
    if test.low is not None and test.high is not None:
        level = f"{100 * made.settings.level:g} %"
        note = f"{level} interval {test.low:+.2f} to {test.high:+.2f}; {note}"
    header, costs = _cost_rows(one.arm, made.baseline)
    much = Fact("By how much?", f"{test.mean:+.2f} points", note)
    return Answer(headline, text.strip(), [won, much, real, _cost_fact(one.arm, made.baseline)], header, costs)


def _measured(one: Comparison, made: Differences) -> str:
    own, base = (Score.of([arm.scores[seed] for seed in one.seeds]).mean for arm in (one.arm, made.baseline))
    test = one.paired
    told = f"{own:.2f} % against {base:.2f} % of {made.baseline.name} over {_seeds(test.n)}: {test.mean:+.2f} points"
    if test.low is None or test.high is None:
        return f"{told}, without an interval."
    return f"{told} ({100 * made.settings.level:g} % interval {test.low:+.2f} to {test.high:+.2f})."


def _seeds(n: int) -> str:
    return f"{n} common seed{'s' * (n != 1)}"


def _p_words(one: Comparison, made: Differences) -> str:
    corrected = f", corrected for {made.family} comparisons" if made.family > 1 else ""
    p = p_text(one.p)
    return f" (p {p if p.startswith('<') else f'= {p}'}{corrected})"


def _real_note(one: Comparison, made: Differences) -> str:
    return _p_words(one, made).strip(" ()")


def _unreal(one: Comparison, made: Differences) -> tuple[str, str]:
    if one.p is not None:
        return "Not decided", _real_note(one, made)
    if one.paired.n < LEAST_SEEDS:
        return "Cannot be told", f"{_seeds(one.paired.n)}; a test needs {LEAST_SEEDS}"
    return "Cannot be told", f"no test: {one.paired.why_no_test}"


def _more_seeds(one: Comparison, made: Differences) -> str:
    """Say why a difference decides nothing, and what would."""
    if one.p is None and one.paired.n < LEAST_SEEDS:
        return f"With fewer than {LEAST_SEEDS} common seeds chance cannot be told from a difference: run more seeds."
    if one.p is None:
        return f"There is no test: {one.paired.why_no_test}."
    told = f"That may be chance{_p_words(one, made)}."
    if one.needed is not None and one.needed > one.paired.n:
        effect = f"{made.settings.effect:g} point{'s' * (made.settings.effect != 1)}"
        told += f" By their spread, a true difference of {effect} would need about {one.needed} seeds to show."
    return told


def _doubts(made: Differences, best: Comparison | None, above: Sequence[Comparison]) -> list[str]:
    """Return what speaks against believing the answer at once; the section of differences has all warnings."""
    lines = []
    if above and best is not None and best not in above:
        lines.append(f"{best.arm.name} has a higher mean difference, {best.paired.mean:+.2f}, which is not decided.")
    for one in above:
        if one.bootstrap is not None and one.bootstrap.low <= 0:
            low, high = 100 * one.bootstrap.low, 100 * one.bootstrap.high
            lines.append(f"{one.arm.name}: on other test images it may vanish: [{low:+.2f}, {high:+.2f}] contains 0.")
    untested = sum(one.p is None for one in made.comparisons)
    if untested >= MANY:
        lines.append(f"{untested} arms are untested: the highest of so many means is partly luck.")
    return [*lines, *made.warnings]


# ------------------------------------------------------------------------------------------------ without a baseline


def _not_compared(report: Report) -> Answer:
    rows = [name_moving(row) for row in report.summary.to_dict("records")]
    rows = [row for row in rows if score_of(row, report.metric).n]
    if not rows:
        return _nothing(report)
    names = labels_of(rows, main_keys(report.summary))
    best = max(range(len(rows)), key=lambda i: score_of(rows[i], report.metric).mean)
    score, name = score_of(rows[best], report.metric), names[best]
    header, costs = ["what it cost", name], _costs_of_row(rows[best])
    cost = Fact("What did it cost?", costs[0][1] if costs else "not known", "no baseline to compare with")
    if len(rows) == 1:
        text = f"{name}: {score}, {METRICS[report.metric]}. There is nothing to compare it with."
        facts = [
            Fact("What won?", "One configuration", name),
            Fact("By how much?", "–", "nothing to compare with"),
            Fact("Is it real?", "Not asked", f"mean over {score.n} seed{'s' * (score.n != 1)}"),
            cost,
        ]
        return Answer(f"One configuration: {score}", text, facts, header, costs, list(report.conflicts))
    second = max((i for i in range(len(rows)) if i != best), key=lambda i: score_of(rows[i], report.metric).mean)
    next_score = score_of(rows[second], report.metric)
    equal = next_score.mean == score.mean
    text = f"{name} has {score}, {names[second]} {next_score}." if equal else ""
    text = text or f"{name} has the highest mean, {score}; next comes {names[second]}, {next_score}."
    facts = [
        Fact("What won?", "Not tested", f"highest mean of {len(rows)}: {name}"),
        Fact("By how much?", f"{score.mean - next_score.mean:+.2f} points", f"against the next, {names[second]}"),
        Fact("Is it real?", "Not tested", "no arm is the baseline; baseline=ARM names one"),
        cost,
    ]
    headline = f"{name} has the highest mean; whether it is real was not tested"
    if equal:
        headline = "No single configuration has the highest mean, and none was tested"
    text += " No arm is the baseline, so none was tested: baseline=ARM names one."
    return Answer(headline, text, facts, header, costs, list(report.conflicts))


def _nothing(report: Report) -> Answer:
    complete = bool((report.runs["status"] == COMPLETE).any())
    why = f"No run has {report.metric}" if complete else "No run is complete"
    facts = [
        Fact("What won?", "Nothing yet", report.counts()),
        Fact("By how much?", "–"),
        Fact("Is it real?", "–"),
        Fact("What did it cost?", "–"),
    ]
    return Answer(why, f"{report.counts()}. {why}, so there is no result to show.", facts)


# ------------------------------------------------------------------------------------------------------------ costs


def _cost(name: str, value: float) -> str:
    if not math.isfinite(value):
        return "–"
    if name == "peak_memory_bytes":
        return size(value)
    if name == "params":
        return f"{value / 1e6:.4g} M"
    return f"{show(float(f'{value:.4g}'))} {'s' if name == 'seconds' else 'GFLOPs'}"


def _costs_of_row(row: Mapping[str, Any]) -> list[list[str]]:
    known = {name: row[name] for name in COSTS if is_number(row.get(name)) and math.isfinite(row[name])}
    return [[COSTS[name], _cost(name, float(value))] for name, value in known.items()]


def _cost_rows(arm: Arm, other: Arm | None) -> tuple[list[str], list[list[str]]]:
    header = ["what it cost", arm.name, *([other.name, "ratio"] if other else [])]
    rows = []
    for name, word in COSTS.items():
        if math.isfinite(arm.cost(name)):
            more = [_cost(name, other.cost(name)), _ratio(arm, other, name) or "–"] if other else []
            rows.append([word, _cost(name, arm.cost(name)), *more])
    return header, rows


def _ratio(arm: Arm, other: Arm, name: str) -> str | None:
    own, base = arm.cost(name), other.cost(name)
    return f"{own / base:.2f}×" if math.isfinite(own) and math.isfinite(base) and base > 0 else None


def _cost_fact(arm: Arm, other: Arm | None) -> Fact:
    question = "What did it cost?"
    if other is None:
        return Fact(question, _cost("seconds", arm.cost("seconds")), arm.name)
    ratios = {name: ratio for name in COSTS if (ratio := _ratio(arm, other, name))}
    if not ratios:
        return Fact(question, "not known")
    parts = [f"{ratio} {_SHORT[name]}" for name, ratio in ratios.items()]
    return Fact(question, parts[0], f"{', '.join(parts[1:])}; {arm.name} against {other.name}".removeprefix("; "))
