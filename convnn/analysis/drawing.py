"""What the pictures of analyses share: lines over depth and along the spectrum, with intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from convnn.analysis.base import ArmResults, Mean, Result, headline_means, series_means
from convnn.figures.style import (
    NEUTRAL,
    RC_PARAMS,
    add_legend,
    add_title,
    evenly_spread,
    line_styles,
    new_figure,
    number_axis,
    plain_text,
)
from convnn.runs.metrics import is_number
from convnn.text import show

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_ARMS = 10
"""Lines of a panel; of more arms, evenly spread ones."""
MAX_PLACES = 16
"""Names on an axis; of more, evenly spread ones."""
MAX_NAMED, MAX_NAME = 6, 24
"""Arms side by side, and characters of a name, above which arms are numbered."""
MAX_LABEL = 40
"""Characters of the label of a line along the spectrum."""
BLEND, K = "operator.blend", "operator.k"
INTERVAL = "mean over seeds, 95 % t interval"


def figure_of(
    panels: int, draw: Callable[[list[Axes]], dict[str, Any] | None], title: str, *, tiles: int = 0
) -> Figure:
    """Return a figure in the looks of all.

    Args:
        panels: axes for lines.
        draw: fills the axes, of panels first, then of tiles, and returns the entries of the legend.
        title: above all.
        tiles: axes without a grid, such as those of maps, in a row above the panels.
    """
    import matplotlib as mpl

    with mpl.rc_context(RC_PARAMS):
        figure, axes = _with_tiles(panels, tiles) if tiles else new_figure(panels)
        entries = draw(axes)
        if entries and len(entries) > 1:
            add_legend(figure, entries)
        add_title(figure, title)
        # Text is laid out with the style that is set while it is drawn.
        figure.draw_without_rendering()
    return figure


def _with_tiles(panels: int, tiles: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    rows = -(-panels // 2)
    figure = Figure(figsize=(13.5, 4.2 + 4.4 * rows))
    # A tile is two columns wide and a panel half of all, so that one grid lays out both.
    grid = figure.add_gridspec(rows + 1, 2 * tiles, height_ratios=[3.2, *[4.4] * rows])
    halves = (slice(0, tiles), slice(tiles, 2 * tiles))
    axes = [figure.add_subplot(grid[1 + i // 2, halves[i % 2]]) for i in range(panels)]
    for i in range(tiles):
        axes.append(figure.add_subplot(grid[0, 2 * i : 2 * i + 2]))
        axes[-1].grid(False)
    return figure, axes


def drawn_arms(arms: Sequence[ArmResults]) -> list[ArmResults]:
    """Return at most ``MAX_ARMS`` arms, by blend where they have one."""
    numbered = all(is_number(arm.values.get(BLEND)) for arm in arms)
    ordered = sorted(arms, key=lambda arm: arm.values[BLEND]) if numbered else list(arms)
    return evenly_spread(ordered, MAX_ARMS)


def short_names(arms: Sequence[ArmResults]) -> dict[str, str]:
    """Return what arms are called at axes and above tiles: their names, or numbers that the legend explains.

    Args:
        arms: all of a figure.
    """
    drawn = drawn_arms(arms)
    crowded = len(drawn) > MAX_NAMED and _along(arms) is None
    if crowded or (len(drawn) > 1 and max(len(arm.name) for arm in drawn) > MAX_NAME):
        return {arm.name: str(i) for i, arm in enumerate(drawn, 1)}
    return {arm.name: arm.name for arm in drawn}


def legend_name(name: str, short: Mapping[str, str]) -> str:
    """Return what the legend calls an arm: its name, behind the number that stands for it."""
    return name if short[name] == name else f"{short[name]} {name}"


def looks_of(arms: Sequence[ArmResults]) -> dict[str, dict[str, Any]]:
    """Return colour and marker of each arm by its name: an ordered scale where a number tells the arms apart."""
    key = spectrum_key(arms)
    values = [arm.values.get(key) for arm in arms] if key else []
    distinct = len(set(values)) == len(arms) and all(map(is_number, values))
    styles = line_styles(values if distinct else [arm.name for arm in arms])
    return {arm.name: style for arm, style in zip(arms, styles.values(), strict=True)}


def spectrum_key(arms: Sequence[ArmResults]) -> str | None:
    """Return the numeric key to draw arms over: blend, else k, else the one with the most values; None: there is none.

    A blend that a schedule moves is a text, and no number.
    """
    keys = dict.fromkeys(key for arm in arms for key in arm.values)
    counts = {key: len({v for arm in arms if is_number(v := arm.values.get(key))}) for key in keys}
    fit = [key for key in keys if counts[key] > 1]
    return min(fit, key=lambda key: (key != BLEND, key != K, -counts[key]), default=None)


def draw_series(
    axes: Axes, arms: Sequence[ArmResults], name: str, ylabel: str, xlabel: str = "", *, labels: bool = True
) -> dict[str, Any]:
    """Draw a series of every arm as a line with a band; return the legend's entries.

    Names of layers stand at the axis where one arm has all of them. Arms of different architectures are drawn over
    the share of their depth.

    Args:
        axes: to draw on.
        arms: with the series; those without it are left out.
        name: of the series.
        ylabel: with the unit.
        xlabel: of numbers; names of layers speak for themselves.
        labels: write the names of the places, where they are names.
    """
    short, arms = short_names(arms), drawn_arms(arms)
    looks, entries = looks_of(arms), {}
    found = {arm.name: one for arm in arms if (one := series_means(arm, name))[0]}
    named = [places for places, _ in found.values() if not all(map(is_number, places))]
    names = max(named, key=len, default=[])
    common = all(set(places) <= set(names) for places in named)
    for arm, (places, means) in found.items():
        if places not in named:
            xs = [float(at) for at in places]
        elif common:
            xs = [names.index(at) for at in places]
        else:
            xs = [i / max(len(places) - 1, 1) for i in range(len(places))]
        entries[legend_name(arm, short)] = _line(axes, xs, means, looks[arm])
    if names and common:
        shown = evenly_spread(list(range(len(names))), MAX_PLACES)
        texts = [plain_text(str(names[i]), 24) if labels else "" for i in shown]
        axes.set_xticks(shown, texts, rotation=35, ha="right", fontsize=11)
    elif names:
        axes.set_xticks([0, 1], ["first", "last"] if labels else ["", ""], fontsize=11)
        xlabel = xlabel or ("depth" if labels else "")
    axes.set_ylabel(ylabel)
    axes.set_xlabel(xlabel)
    return entries


def _line(axes: Axes, xs: Sequence[float], means: Sequence[Mean], look: dict[str, Any], **more: Any) -> Any:
    """Draw a line with its band, which is left out where there is one seed; return the legend's entry."""
    lows = [one.low if math.isfinite(one.low) else one.mean for one in means]
    highs = [one.high if math.isfinite(one.high) else one.mean for one in means]
    axes.fill_between(xs, lows, highs, color=look["color"], alpha=0.15, linewidth=0)
    return axes.plot(xs, [one.mean for one in means], markersize=6, **(look | more))[0]


def draw_headline(
    axes: Axes, arms: Sequence[ArmResults], headline: Callable[[Result], dict[str, float]], name: str, ylabel: str
) -> None:
    """Draw one of the headline's numbers along the spectrum: over blend, else k, else the arms side by side.

    Arms that differ in more than that number, the optimizer's settings aside, make lines of their own, which are
    labelled; side by side they stand too where no line has two arms, or lines are many or of long labels.
    """
    means = {arm.name: headline_means(arm, headline).get(name, Mean.of([])) for arm in arms}
    along = _along(arms)
    if along is None:
        short, places = short_names(arms), list(range(len(drawn_arms(arms))))
        look = {"color": NEUTRAL, "marker": "o", "linestyle": "none"}
        _bars(axes, places, [means[arm] for arm in short], look)
        numbered = any(text != arm for arm, text in short.items())
        turned: dict[str, Any] = {} if numbered else {"rotation": 35, "ha": "right"}
        axes.set_xticks(places, [plain_text(text, MAX_NAME) for text in short.values()], fontsize=11, **turned)
        axes.set_xlabel("arm" if numbered else "")
    else:
        key, lines = along
        for (label, line), look in zip(lines.items(), line_styles(list(lines)).values(), strict=True):
            line.sort(key=lambda arm: arm.values[key])
            look = look if len(lines) > 1 else {"color": NEUTRAL, "marker": "o"}
            _bars(axes, [arm.values[key] for arm in line], [means[arm.name] for arm in line], look, label)
        if len(lines) > 1:
            axes.legend(fontsize=10)
        number_axis(axes, sorted({float(arm.values[key]) for arm in arms}))
        axes.set_xlabel(key.rpartition(".")[2])
    axes.set_ylabel(ylabel)


def _along(arms: Sequence[ArmResults]) -> tuple[str, dict[str, list[ArmResults]]] | None:
    """Return the key that arms are drawn over and the lines that they make by label; None: they stand side by side."""
    key = spectrum_key(arms)
    if key is None or not all(is_number(arm.values.get(key)) for arm in arms):
        return None
    lines: dict[str, list[ArmResults]] = {}
    for arm in arms:
        rest = {k: show(v) for k, v in arm.values.items() if k != key and not _aside(k)}
        lines.setdefault(", ".join(f"{k.rpartition('.')[2]}={v}" for k, v in rest.items()), []).append(arm)
    if len(lines) == 1:
        return key, lines
    single = all(len(line) == 1 for line in lines.values())
    crowded = len(lines) > MAX_NAMED or max(map(len, lines)) > MAX_LABEL
    return None if single or crowded else (key, lines)


def _aside(key: str) -> bool:
    """Return whether a key makes no line of its own: what a point is called, and the rates that arms were tuned to."""
    return key == "point.name" or key.startswith("optim.")


def _bars(axes: Axes, xs: Sequence[float], means: Sequence[Mean], look: dict[str, Any], label: str = "") -> None:
    ys = [one.mean for one in means]
    half = [one.high - one.mean if math.isfinite(one.high) else 0.0 for one in means]
    axes.errorbar(xs, ys, half, capsize=4, elinewidth=1.5, markersize=7, label=label, **look)
