"""Differences as tables, lines and files. Imports no torch."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convnn.report.arms import few
from convnn.report.compare import COSTS, SLACK, Comparison, Differences
from convnn.report.content import Table
from convnn.report.tables import METRICS, import_pandas
from convnn.stats.power import MOST_SEEDS
from convnn.text import aligned

if TYPE_CHECKING:
    import pandas as pd

MAX_TEXT_LINES = 12
"""Warnings, and notes, that the terminal shows."""


def difference_table(made: Differences) -> Table:
    """Return a row for each arm: the baseline first, then its competitors in their order."""
    level = f"{100 * made.settings.level:g} %"
    header = ["arm", "seeds", "accuracy", f"difference [{level} t]", "p (Holm)", f"bootstrap [{level}]"]
    header += ["P(beats)", f"seeds for {made.settings.effect:g}"]
    header += ["tried"] * (made.trials is not None) + [*COSTS.values(), "on the front"]
    fronts = {cost: dict(zip(_names(made), made.front(cost), strict=True)) for cost in COSTS}
    by_name = {one.arm.name: one for one in made.comparisons}
    rows = []
    for arm in [made.baseline, *(arm for arm in made.arms if arm is not made.baseline)]:
        score = made.score(arm)
        own = f"{score.mean:.2f}" + (f" ± {score.std:.2f}" if score.n > 1 else "")
        one = by_name.get(arm.name)
        cells = _compared(one, made) if one else ["baseline", "–", "–", "–", "–"]
        row = [arm.name, str(len(one.seeds) if one else score.n), own, *cells]
        row += [str(made.trials[arm.name].count)] if made.trials is not None else []
        row += [_cost(arm.cost(cost)) for cost in COSTS]
        rows.append([*row, ", ".join(word for cost, word in COSTS.items() if fronts[cost][arm.name]) or "–"])
    return header, rows


def _names(made: Differences) -> list[str]:
    return [arm.name for arm in made.arms]


def _compared(one: Comparison, made: Differences) -> list[str]:
    test, boot = one.paired, one.bootstrap
    if test.low is None or test.high is None:
        told, p = f"{test.mean:+.2f} (no test: {test.why_no_test})" if test.n else "–", "–"
    else:
        told, p = f"{test.mean:+.2f} [{test.low:+.2f}, {test.high:+.2f}]", p_text(one.p)
    interval, beats = "–", "–"
    if boot is not None:
        interval = f"[{100 * boot.low:+.2f}, {100 * boot.high:+.2f}]"
        beats = "> 0.999" if boot.beats > 0.999 else "< 0.001" if boot.beats < 0.001 else f"{boot.beats:.3f}"
        if boot.seeds < test.n:
            interval += f" ({boot.seeds} seeds)"
    elif one.no_bootstrap and one.no_bootstrap != test.why_no_test:
        interval = one.no_bootstrap
    needed = "–" if test.n < 3 or not test.std > 0 else f"> {MOST_SEEDS}" if one.needed is None else str(one.needed)
    return [told, p, interval, beats, needed]


def difference_words(one: Comparison) -> str:
    """Say a difference in a line: ``k_9: +2.10 points [+1.20, +3.00], p 0.003, 5 common seeds``."""
    test = one.paired
    if not test.n:
        return f"{one.arm.name}: {test.why_no_test}"
    if test.low is None or test.high is None:
        return f"{one.arm.name}: {test.mean:+.2f} points, no test: {test.why_no_test}"
    told = f"{one.arm.name}: {test.mean:+.2f} points [{test.low:+.2f}, {test.high:+.2f}]"
    return f"{told}, p {p_text(one.p)}, {test.n} common seeds"


def p_text(p: float | None) -> str:
    """Return a p value as text."""
    return "–" if p is None else "< 0.0001" if p < 0.0001 else f"{p:.4f}" if p < 0.001 else f"{p:.3f}"


def _cost(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4g}" if value < 1000 else f"{value:.0f}"


def matched_table(made: Differences) -> Table:
    """Return for each arm and each cost the best other arm of at most its cost, and that one's lead in points."""
    header = ["arm", "accuracy"]
    for word in COSTS.values():
        header += [word, f"best other in {word} + {100 * SLACK:g} %", "its lead"]
    matches = {cost: made.matched(cost) for cost in COSTS}
    rows = []
    for i, arm in enumerate(made.arms):
        mean = made.score(arm).mean
        row = [arm.name, f"{mean:.2f}"]
        for cost in COSTS:
            j = matches[cost][i]
            found = ["none", "–"] if j is None else [made.arms[j].name, f"{made.score(made.arms[j]).mean - mean:+.2f}"]
            row += [_cost(arm.cost(cost)), *found]
        rows.append(row)
    return header, rows


def verdict(made: Differences) -> str:
    """Say in a sentence which arms differ from the baseline beyond chance."""
    above, below, rest = made.verdicts()
    groups = {"above it": above, "below it": below, "not decided": rest}
    told = [f"{name}: {few(arms)}" for name, arms in groups.items() if arms]
    none = "" if above or below else "no arm differs beyond chance; "
    return f"Against {made.baseline.name} (p < {1 - made.settings.level:.2g} after Holm): {none}{'. '.join(told)}."


def about(made: Differences) -> str:
    """Say what the columns are."""
    s = made.settings
    return (
        f"{METRICS[s.metric]}, arm less {made.baseline.name} in points over common seeds. t: paired t interval, new "
        f"seeds on these test images. p: paired t test, Holm over a family of {made.family}. Bootstrap: images as a "
        "sample too. P(beats): share of its draws above 0. Seeds for "
        f"{s.effect:g}: seeds that find a difference of {s.effect:g} points with {100 * s.power:g} % power in one "
        "comparison. On the front: no other arm is as cheap and better, by the means."
    )


def difference_text(made: Differences) -> str:
    """Return everything for a terminal."""
    lines = [aligned(*difference_table(made)), "", verdict(made)]
    lines += _shown("warning: ", made.warnings) + _shown("", made.notes)
    lines += ["", aligned(*matched_table(made)), "", about(made)]
    return "\n".join(textwrap.fill(line, 150) if not line.count("\n") else line for line in lines)


def _shown(prefix: str, lines: Sequence[str]) -> list[str]:
    rest = [f"... and {len(lines) - MAX_TEXT_LINES} more"] if len(lines) > MAX_TEXT_LINES else []
    return [*(f"{prefix}{line}" for line in lines[:MAX_TEXT_LINES]), *rest]


def difference_frame(made: Differences) -> pd.DataFrame:
    """Return all numbers unrounded, a row for each arm; differences and intervals in points."""
    fronts = {cost: dict(zip(_names(made), made.front(cost), strict=True)) for cost in COSTS}
    by_name = {one.arm.name: one for one in made.comparisons}
    rows = []
    for arm in made.arms:
        score, one = made.score(arm), by_name.get(arm.name)
        row: dict[str, Any] = {"arm": arm.name, "baseline": made.baseline.name, "metric": made.settings.metric}
        row |= {"mean": score.mean, "std": score.std, "n": score.n, "seeds": _joined(sorted(arm.scores))}
        row |= _numbers(one) if one else {}
        row["tried"] = made.trials[arm.name].count if made.trials is not None else None
        row |= {cost: arm.cost(cost) for cost in COSTS} | {f"front_{c}": fronts[c][arm.name] for c in COSTS}
        rows.append(row)
    return import_pandas().DataFrame(rows)


def _numbers(one: Comparison) -> dict[str, Any]:
    test, boot = one.paired, one.bootstrap
    return {
        "common_seeds": _joined(one.seeds),
        "unpaired_seeds": _joined(one.unpaired),
        "difference": test.mean,
        "difference_std": test.std,
        "t_low": test.low,
        "t_high": test.high,
        "p": test.p,
        "p_holm": one.p,
        "no_test": test.why_no_test,
        "bootstrap_low": boot and 100 * boot.low,
        "bootstrap_high": boot and 100 * boot.high,
        "beats": boot and boot.beats,
        "no_bootstrap": one.no_bootstrap,
        "seeds_needed": one.needed,
        "differs": _joined(one.differs),
        "settings": "; ".join(one.settings),
    }


def _joined(values: Sequence[Any]) -> str:
    return " ".join(map(str, values))


def matched_frame(made: Differences) -> pd.DataFrame:
    """Return ``matched_table`` unrounded."""
    matches = {cost: made.matched(cost) for cost in COSTS}
    rows = []
    for i, arm in enumerate(made.arms):
        row: dict[str, Any] = {"arm": arm.name, "mean": made.score(arm).mean}
        for cost in COSTS:
            j = matches[cost][i]
            row |= {cost: arm.cost(cost), f"{cost}_best": None if j is None else made.arms[j].name}
            row[f"{cost}_best_mean"] = None if j is None else made.score(made.arms[j]).mean
        rows.append(row)
    return import_pandas().DataFrame(rows)


def write_frames(made: Differences, folder: Path) -> list[str]:
    """Write ``differences.csv`` and ``matched.csv`` and return their names."""
    frames = {"differences.csv": difference_frame(made), "matched.csv": matched_frame(made)}
    for name, frame in frames.items():
        frame.to_csv(folder / name, index=False)
    return list(frames)
