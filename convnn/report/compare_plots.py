"""Pictures of differences: a row an arm with its interval, accuracy over a number with intervals, Pareto fronts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convnn.figures.hints import tell
from convnn.figures.style import (
    NEUTRAL,
    RC_PARAMS,
    add_legend,
    line_styles,
    needs_log_scale,
    new_figure,
    number_axis,
    plain_text,
)
from convnn.report.arms import Arm
from convnn.report.compare import COSTS, Differences
from convnn.report.content import Picture
from convnn.report.differences import difference_words
from convnn.report.looks import Looks
from convnn.report.plots import save_all
from convnn.report.results import NAMES
from convnn.report.tables import METRICS, labels_of, short_name
from convnn.report.view import BLEND, MAX_LINES, RATIO, K, View
from convnn.runs.metrics import is_number
from convnn.stats.paired import mean_interval
from convnn.text import is_missing, show

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Drawn = tuple[str, str, tuple["Figure", str] | None]
MAX_ROWS = 60
"""Arms in a picture of differences."""
MAX_NAMES = 14
"""Points of a Pareto picture that bear their arm's name: those of the front first."""
ABOVE, BELOW = "#0072B2", "#D55E00"
"""Of differences that are decided; grey: not decided."""


def save_differences(made: Differences, summary: pd.DataFrame, out: Path, subject: str = "") -> list[Picture]:
    """Draw what the differences can show, as PNG and SVG.

    Args:
        made: the differences.
        summary: of the same runs, see ``convnn.report.tables.summarize``.
        out: where the files go.
        subject: what the runs are, for the titles.
    """
    import matplotlib as mpl

    view = View(summary, made.settings.metric)
    with mpl.rc_context(RC_PARAMS):
        drawn: list[Drawn] = [("differences", f"Difference to {made.baseline.name}", forest(made))]
        for key in number_keys(made, view):
            name = short_name(key)
            drawn.append((f"intervals_{name}", f"Accuracy over {name}", accuracy_with_intervals(made, view, key)))
        drawn.append(("pareto", "Accuracy at a cost", pareto(made)))
        return save_all(drawn, out, subject)


def forest(made: Differences) -> tuple[Figure, str]:
    """Draw a row for each arm: the mean difference with its t interval, the bootstrap's beside it, a line at zero."""
    shown = made.comparisons[:MAX_ROWS]
    dense = len(shown) > 15
    figure, (axes,) = new_figure(1, height=1.9 + (0.34 if dense else 0.5) * len(shown))
    axes.axvline(0, color=NEUTRAL, linewidth=1.5)
    alpha, size = 1 - made.settings.level, 6 if dense else 8
    marks: dict[str, Any] = {}
    for place, one in enumerate(shown):
        test, boot = one.paired, one.bootstrap
        decided = one.p is not None and one.p < alpha
        colour = (ABOVE if test.mean > 0 else BELOW) if decided else "#777777"
        if test.low is not None and test.high is not None:
            bar = axes.plot([test.low, test.high], [place, place], color=colour, linewidth=2.5, solid_capstyle="butt")
            marks.setdefault("t interval", bar[0])
        if boot is not None:
            ends = [100 * boot.low, 100 * boot.high]
            axes.plot(ends, [place + 0.24] * 2, color="#999999", linewidth=1.2, marker="|", markersize=5)
        if test.n:
            tell(axes, test.mean, place, difference_words(one))
            filled = colour if test.low is not None else "white"
            axes.plot([test.mean], [place], "o", color=colour, markerfacecolor=filled, markersize=size)
    axes.set_yticks(range(len(shown)), [plain_text(one.arm.name, 46, 1) for one in shown], fontsize=11 if dense else 14)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    for place in range(1, len(shown), 2):
        axes.axhspan(place - 0.5, place + 0.5, color="#f4f4f4", zorder=0, linewidth=0)
    _contain_zero(axes)
    axes.set_xlabel(plain_text(f"points against {made.baseline.name}, {METRICS[made.settings.metric]}", 70, 2))
    add_legend(figure, _forest_legend(made))
    level = f"{100 * made.settings.level:g} %"
    caption = f"Mean difference over common seeds; thick: paired t interval, {level}; thin: bootstrap over seeds and "
    caption += f"images, {level}. Colours: Holm over {made.family} comparisons; each interval is of its own comparison."
    if len(shown) < len(made.comparisons):
        caption += f" The first {len(shown)} of {len(made.comparisons)} arms are shown."
    return figure, caption


def _forest_legend(made: Differences) -> dict[str, Any]:
    from matplotlib.lines import Line2D

    above, below, _ = made.verdicts()
    rest = [one for one in made.comparisons if one.p is not None and one.p >= 1 - made.settings.level]
    entries = {}
    for some, label, colour in ((above, "above", ABOVE), (below, "below", BELOW), (rest, "not decided", "#777777")):
        if some:
            entries[label] = Line2D([], [], color=colour, marker="o", linewidth=2.5)
    if any(one.bootstrap for one in made.comparisons):
        entries["bootstrap"] = Line2D([], [], color="#999999", linewidth=1.2, marker="|")
    if any(one.paired.low is None for one in made.comparisons):
        entries["no test"] = Line2D([], [], color="#777777", marker="o", markerfacecolor="white", linestyle="")
    return entries


def _contain_zero(axes: Axes) -> None:
    low, high = axes.get_xlim()
    span = max(high, 0) - min(low, 0) or 1
    axes.set_xlim(min(low, -0.04 * span), max(high, 0.04 * span))


def accuracy_with_intervals(made: Differences, view: View, x: str) -> tuple[Figure, str] | None:
    """Draw the mean of each arm with its t interval over a numeric key, and its seeds as dots; None for one number.

    A line joins arms that differ in the key alone, names and settings of the optimizer aside.
    """
    placed = [arm for arm in made.arms if is_number(arm.values.get(x))]
    numbers = sorted({float(arm.values[x]) for arm in placed})
    if len(numbers) < 2:
        return None
    lines = _lines(placed, x)
    shown = dict(list(lines.items())[:MAX_LINES])
    figure, (axes,) = new_figure(1, width=10.5)
    gap = min(b - a for a, b in itertools.pairwise(numbers))
    step = 0.0 if needs_log_scale(numbers) else min(0.5 * gap / len(shown), 0.02 * (numbers[-1] - numbers[0]))
    entries: dict[str, Any] = {}
    for i, ((name, arms), look) in enumerate(zip(shown.items(), _looks(view, shown, x), strict=True)):
        entries[name] = _line(axes, made, arms, x, step * (i - (len(shown) - 1) / 2), look)
    if not is_number(made.baseline.values.get(x)):
        entries[made.baseline.name] = _level(axes, made)
    axes.set_xlabel(plain_text(short_name(x)))
    axes.set_ylabel(plain_text(METRICS[view.metric], 34))
    number_axis(axes, numbers)
    if len(entries) > 1:
        add_legend(figure, entries)
    caption = f"Mean with its {100 * made.settings.level:g} % t interval (new seeds, these images); dots: the seeds."
    caption += " Arms share their seeds, so that a difference can be decided where these intervals overlap."
    if len(shown) < len(lines):
        caption += f" {len(shown)} of {len(lines)} lines."
    if any(arm not in placed and arm is not made.baseline for arm in made.arms):
        caption += f" Left out: arms without one fixed {short_name(x)}."
    return figure, caption


def number_keys(made: Differences, view: View) -> list[str]:
    """Return the keys to draw accuracy over: blend and branch ratio, be the points named or not; else one number."""

    def varies(key: str) -> bool:
        return len({arm.values[key] for arm in made.arms if is_number(arm.values.get(key))}) > 1

    return [key for key in (BLEND, RATIO) if varies(key)] or [key for key in view.numbers if varies(key)][:1]


def _lines(placed: Sequence[Arm], x: str) -> dict[str, list[Arm]]:
    """Return the arms that differ in a key alone, sorted by it, under a label of the other keys."""
    keys = [key for key in placed[0].values if "." in key and key != x and key not in NAMES]
    keys = [key for key in keys if not key.startswith("optim.") and len({_cell(arm, key) for arm in placed}) > 1]
    groups: dict[tuple[Any, ...], list[Arm]] = {}
    for arm in sorted(placed, key=lambda arm: float(arm.values[x])):
        groups.setdefault(tuple(_cell(arm, key) for key in keys), []).append(arm)
    rows = [dict(zip(keys, given, strict=True)) for given in groups]
    labels = labels_of(rows, _telling(rows, keys))
    order = {name: i for i, name in enumerate(arm.name for arm in placed)}
    found = dict(zip(labels if keys else ["arms"], groups.values(), strict=True))
    return dict(sorted(found.items(), key=lambda item: order[item[1][0].name]))


def _telling(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[str]:
    """Return keys that tell rows apart, without those that say what the names and k say already."""
    kept: list[str] = []
    for key in sorted(keys, key=lambda key: (not key.endswith(".name"), key != K)):
        apart, more = (len({tuple(show(row[k]) for k in some) for row in rows}) for some in (kept, [*kept, key]))
        if more > apart:
            kept.append(key)
    return kept


def _looks(view: View, lines: Mapping[str, Sequence[Arm]], x: str) -> list[dict[str, Any]]:
    """Return the looks of the lines: the page's where it draws over the key too, else their own."""
    if x in view.keys:
        return Looks(view).of([dict.fromkeys(view.keys) | arms[0].values for arms in lines.values()], over=x)
    return [{"linestyle": "-", **style} for style in line_styles(list(lines)).values()]


def _cell(arm: Arm, key: str) -> Any:
    value = arm.values.get(key)
    return None if is_missing(value) else value


def _line(axes: Axes, made: Differences, arms: Sequence[Arm], x: str, shift: float, look: dict[str, Any]) -> Any:
    xs = [float(arm.values[x]) + shift for arm in arms]
    scores = [made.score(arm) for arm in arms]
    for place, arm, score in zip(xs, arms, scores, strict=True):
        tell(axes, place, score.mean, f"{arm.name}: {score}")
        low, high = mean_interval(*score, made.settings.level) if score.n > 2 else (math.nan, math.nan)
        axes.plot(
            [place] * len(arm.scores), list(arm.scores.values()), "o", color=look["color"], alpha=0.35, markersize=4
        )
        axes.plot([place, place], [low, high], color=look["color"], linewidth=2, solid_capstyle="butt")
    return axes.plot(xs, [score.mean for score in scores], markersize=8, **look)[0]


def _level(axes: Axes, made: Differences) -> Any:
    score = made.score(made.baseline)
    tell(axes, None, score.mean, f"{made.baseline.name}: {score}")
    if score.n > 2:
        axes.axhspan(*mean_interval(*score, made.settings.level), color="#555555", alpha=0.1, linewidth=0)
    return axes.axhline(score.mean, color="#555555", linestyle="--")


def pareto(made: Differences) -> tuple[Figure, str] | None:
    """Draw mean accuracy with its t interval against each cost that differs, and the front as a stair."""
    costs = [cost for cost in COSTS if _differ([arm.cost(cost) for arm in made.arms])]
    if not costs:
        return None
    figure, panels = new_figure(len(costs))
    for axes, cost in zip(panels, costs, strict=True):
        front = made.front(cost)
        points = [(arm.cost(cost), made.score(arm), arm, on) for arm, on in zip(made.arms, front, strict=True)]
        points = [point for point in points if math.isfinite(point[0])]
        stair = sorted((c, score.mean) for c, score, _, on in points if on)
        values = [c for c, *_ in points]
        if needs_log_scale(values):
            axes.set_xscale("log")
        for c, score, arm, on in points:
            tell(axes, c, score.mean, f"{arm.name}: {score}, {c:.4g} {COSTS[cost]}")
            colour = "#000000" if arm is made.baseline else ABOVE if on else "#999999"
            if score.n > 2:
                low, high = mean_interval(*score, made.settings.level)
                axes.plot([c, c], [low, high], color=colour, linewidth=1, alpha=0.6)
            axes.plot([c], [score.mean], "D" if arm is made.baseline else "o", color=colour, markersize=8, zorder=3)
        right = max(values)
        axes.step(
            [*(c for c, _ in stair), right],
            [*(v for _, v in stair), stair[-1][1]],
            where="post",
            color=ABOVE,
            linewidth=1.2,
            linestyle=":",
        )
        _write_names(axes, points)
        axes.set_xlabel("measured training time (s)" if cost == "seconds" else "forward pass of one image (GFLOPs)")
        axes.set_ylabel(plain_text(METRICS[made.settings.metric], 34))
    add_legend(figure, _pareto_legend(made))
    caption = (
        f"Means over seeds with their {100 * made.settings.level:g} % t intervals. The front is that of the means: "
    )
    return figure, caption + "whether two neighbours on it differ is for the table of differences to say."


def _differ(costs: Sequence[float]) -> bool:
    known = [cost for cost in costs if math.isfinite(cost) and cost > 0]
    return len(known) > 1 and max(known) >= 1.01 * min(known)


def _write_names(axes: Axes, points: Sequence[tuple[float, Any, Arm, bool]]) -> None:
    """Name the arms beside their points where there is room, those of the front first, then the best."""
    axes.set_xlim(axes.get_xlim()), axes.set_ylim(axes.get_ylim())  # names are placed within these
    taken = [_box(axes, c, score.mean, -0.008, 0.0, 1) for c, score, *_ in points]
    for c, score, arm, _ in sorted(points, key=lambda point: (not point[3], -point[1].mean))[:MAX_NAMES]:
        name = plain_text(arm.name, 24, 1)
        for right, up in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
            box = _box(axes, c, score.mean, 0.014 * right, 0.035 * up, len(name) * right)
            if box[0] >= 0 and box[1] <= 1 and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                side = "left" if right > 0 else "right"
                axes.annotate(name, (c, score.mean), (7 * right, 8 * up), textcoords="offset points", fontsize=10,
                              ha=side, va="center")  # fmt: skip
                break


Box = tuple[float, float, float, float]


def _box(axes: Axes, x: float, y: float, right: float, up: float, characters: int) -> Box:
    """Return about what a text beside a point takes, in shares of the panel: left, right, bottom, top."""
    across, above = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))
    ends = sorted((across + right, across + right + 0.0155 * characters))
    return ends[0], ends[1], above + up - 0.02, above + up + 0.02


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]


def _pareto_legend(made: Differences) -> dict[str, Any]:
    from matplotlib.lines import Line2D

    def mark(marker: str, colour: str) -> Any:
        return Line2D([], [], linestyle="", marker=marker, color=colour, markersize=8)

    name = f"baseline ({made.baseline.name})"
    fronts = zip(*(made.front(cost) for cost in COSTS), strict=True)
    behind = any(not all(on) for on, arm in zip(fronts, made.arms, strict=True) if arm is not made.baseline)
    others = {"other arms": mark("o", "#999999")} if behind else {}
    return {"on the front": mark("o", ABOVE), **others, name: mark("D", "#000000")}
