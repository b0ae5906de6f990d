"""Pictures of a summary over runs, as PNG and SVG.

Which key goes where: x is the number plotted over (blend and branch ratio each get a picture; without them the number
with the most values); lines are one further key, k before blend before other numbers before text, the one with the
most values first; every combination of the remaining keys gets a panel of its own. Where this leaves no line with two
points, as in a random search, all points stand in one panel without lines. Keys that follow from others
(``main_keys``) do not count. What exceeds ``MAX_LINES`` or ``MAX_PANELS`` is left out, and the caption says so.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convnn.figures.style import (
    COLOUR_MAP,
    COLOURS,
    DASHES,
    RC_PARAMS,
    add_legend,
    colour_scale,
    evenly_spread,
    line_styles,
    needs_log_scale,
    new_figure,
    number_axis,
    plain_text,
)
from convnn.report.content import Picture
from convnn.report.spectrum import draw_layers, draw_spectrum
from convnn.report.tables import METRICS, complete_groups, describe, main_keys, short_name
from convnn.report.view import BLEND, MAX_CELLS, MAX_DOTS, MAX_LINES, MAX_PANELS, K, Row, View, group_rows
from convnn.runs.metrics import is_number
from convnn.runs.record import read_record
from convnn.runs.status import COMPLETE
from convnn.runtime.owned import naming
from convnn.text import Score, show, sort_key

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_all(
    frame: pd.DataFrame, summary: pd.DataFrame, metric: str, folders: Sequence[Path], out: Path
) -> list[Picture]:
    """Draw what these runs can show; ``folders`` are the run folders of the frame's rows."""
    import matplotlib as mpl

    view = View(summary, metric)
    with mpl.rc_context(RC_PARAMS):
        drawn = [
            (f"over_{short_name(key)}", f"Accuracy over {short_name(key)}", accuracy_over_number(view, key))
            for key in view.x_keys()
        ]
        operations = accuracy_against_cost(view, "gflops", "forward pass of one image (GFLOPs)")
        seconds = accuracy_against_cost(view, "seconds", "measured training time (s)")
        spectrum = draw_spectrum(frame, summary, folders)
        drawn += [
            ("heatmap", "Accuracy over blend and k", accuracy_heat_map(view)),
            ("configurations", "Accuracy by configuration", accuracy_by_configuration(view)),
            ("gflops", "Accuracy against computation", operations),
            ("seconds", "Accuracy against training time", seconds and _with_devices(seconds, frame)),
            ("spectrum", "Accuracy, loss and cost along the spectrum", spectrum and _with_devices(spectrum, frame)),
            ("curves", "Training curves", training_curves(frame, summary, folders)),
            *draw_layers(frame, summary, folders),
        ]
        return [_save(name, title, *made, out) for name, title, made in drawn if made is not None]


def _save(name: str, title: str, figure: Figure, caption: str, out: Path) -> Picture:
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", name)
    figure.suptitle(title, fontsize=17)
    paths = [out / f"{name}.png", out / f"{name}.svg"]
    with naming(paths[0]):
        figure.savefig(paths[0], dpi=150)
    with naming(paths[1]):
        figure.savefig(paths[1], metadata={"Date": None})
    return Picture(name, title, caption, *paths)


def accuracy_over_number(view: View, x: str) -> tuple[Figure, str] | None:
    """Draw accuracy over a numeric key; None if there are fewer than two points."""
    rows = view.rows_at(x)
    if len({row[x] for row in rows}) < 2:
        return None
    line = view.line_key(x)
    rest = [key for key in view.keys if key not in (x, line)]
    panels = group_rows(rows, rest)
    lines = [group for panel in panels.values() for group in group_rows(panel, [line] if line else []).values()]
    joined = any(len({row[x] for row in group}) > 1 for group in lines)
    if not joined:
        line, panels = None, {(): rows}
    shown = dict(list(panels.items())[:MAX_PANELS])
    figure, all_axes = new_figure(len(shown))
    values = [value for (value,) in group_rows(rows, [line])] if line else [None]
    style = line_styles(evenly_spread(values, MAX_LINES))
    alpha = min(0.15, 0.6 / len(style)) if joined else 0.0
    handles: dict[str, Any] = {}
    for axes, (given, panel) in zip(all_axes, shown.items(), strict=True):
        for (value,), points in (group_rows(panel, [line]) if line else {(None,): panel}).items():
            if value in style:
                points.sort(key=lambda row: row[x])
                handles[show(value)] = _line(axes, view, points, x, style[value], alpha)
        if given:
            axes.set_title(plain_text(describe(dict(zip(rest, given, strict=True)))))
        axes.set_xlabel(plain_text(short_name(x)))
        axes.set_ylabel(plain_text(METRICS[view.metric], 34))
        number_axis(axes, sorted({row[x] for row in panel}))
    if line:
        ordered = {show(value): handles[show(value)] for value in style if show(value) in handles}
        add_legend(figure, ordered, plain_text(short_name(line)))
    caption = view.caption("band" if joined else "bar")
    if not joined and view.keys != [x]:
        caption += f" The points differ in more than {short_name(x)}, so that no line joins them."
    moving = sum(isinstance(row[x], str) for row in view.rows)
    if moving:
        caption += f" Left out: {moving} without one fixed {short_name(x)}."
    if len(values) > len(style):
        caption += f" {len(style)} of {len(values)} values of {short_name(line or '')}."
    if len(panels) > 1:
        caption += " Each panel has a vertical scale of its own."
    if len(panels) > len(shown):
        caption += f" The first {len(shown)} of {len(panels)} panels are shown."
    return figure, caption


def _line(axes: Axes, view: View, points: list[Row], x: str, style: dict[str, Any], alpha: float) -> Any:
    """Draw points, joined and with a band unless ``alpha`` is 0; return the legend's entry."""
    xs, ys = [row[x] for row in points], [view.mean(row) for row in points]
    stds = [view.std(row) for row in points]
    if not alpha:
        axes.errorbar(xs, ys, stds, fmt="none", ecolor="#999999", elinewidth=1)
        return axes.scatter(xs, ys, color=style["color"], marker=style["marker"], zorder=3)
    if any(std > 0 for std in stds):
        low, high = ([y + sign * s for y, s in zip(ys, stds, strict=True)] for sign in (-1, 1))
        axes.fill_between(xs, low, high, color=style["color"], alpha=alpha, linewidth=0)
    return axes.plot(xs, ys, markersize=7, **style)[0]


def accuracy_heat_map(view: View) -> tuple[Figure, str] | None:
    """Draw accuracy over blend and k; None unless both vary."""
    if BLEND not in view.numbers or K not in view.numbers:
        return None
    rows = [row for row in view.rows_at(BLEND) if is_number(row[K])]
    rest = [key for key in view.keys if key not in (BLEND, K)]
    blends, ks = ([value for (value,) in group_rows(rows, [key])] for key in (BLEND, K))
    if not (2 <= len(blends) <= MAX_CELLS and 2 <= len(ks) <= MAX_CELLS):
        return None
    panels = group_rows(rows, rest)
    shown = dict(list(panels.items())[:MAX_PANELS])
    from matplotlib.figure import Figure

    width = min(max(7.0, 3.2 + 0.95 * len(blends)), 24)
    figure = Figure(figsize=(width, 1 + len(shown) * max(2.8, min(1.4 + 0.75 * len(ks), 12))))
    all_axes = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for axes, (given, panel) in zip(all_axes, shown.items(), strict=True):
        _cells(figure, axes, view, panel, blends, ks)
        if given:
            axes.set_title(plain_text(describe(dict(zip(rest, given, strict=True))), 70))
    caption = f"{METRICS[view.metric].capitalize()}, mean over seeds; grey cells have no complete run."
    if len(panels) > 1:
        caption += " Each panel has a colour scale of its own."
    if len(panels) > len(shown):
        caption += f" The first {len(shown)} of {len(panels)} panels are shown."
    return figure, caption


def _cells(figure: Figure, axes: Axes, view: View, rows: list[Row], blends: list[Any], ks: list[Any]) -> None:
    import numpy as np

    grid = np.full((len(ks), len(blends)), np.nan)
    for (blend, k), group in group_rows(rows, [BLEND, K]).items():
        grid[ks.index(k), blends.index(blend)] = statistics.fmean(view.mean(row) for row in group)
    axes.grid(False)
    axes.set_facecolor("#cccccc")
    image = axes.imshow(grid, cmap=COLOUR_MAP, aspect="auto", origin="lower")
    axes.set_xticks(range(len(blends)), [show(blend) for blend in blends])
    axes.set_yticks(range(len(ks)), [show(k) for k in ks])
    axes.set_xlabel("blend")
    axes.set_ylabel("k")
    figure.colorbar(image, ax=axes, label="%")
    size = 13 if len(blends) <= 12 else 9
    for (i, j), value in np.ndenumerate(grid):
        if not math.isnan(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            axes.text(j, i, f"{value:.1f}", ha="center", va="center", color="w" if dark else "k", fontsize=size)


def accuracy_by_configuration(view: View) -> tuple[Figure, str] | None:
    """Draw a row for each configuration; None where numbers vary, which have pictures of their own."""
    if view.numbers or len(view.rows) < 2:
        return None
    rows = view.rows[:MAX_DOTS]
    figure, (axes,) = new_figure(1, height=1.6 + 0.45 * len(rows))
    places = range(len(rows))
    scores, stds = [view.mean(row) for row in rows], [view.std(row) for row in rows]
    axes.errorbar(scores, places, xerr=stds, fmt="o", color=COLOURS[0], markersize=8, capsize=4)
    axes.set_yticks(places, [plain_text(describe({key: row[key] for key in view.keys}), 50) for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel(plain_text(METRICS[view.metric]))
    caption = view.caption("bar")
    if len(view.rows) > len(rows):
        caption += f" The first {len(rows)} of {len(view.rows)} configurations are shown."
    return figure, caption


def accuracy_against_cost(view: View, cost: str, label: str) -> tuple[Figure, str] | None:
    """Draw accuracy against a cost: colour by a numeric key, marker by the other keys where they are few.

    None if the costs differ by less than a hundredth.
    """
    from matplotlib.cm import ScalarMappable

    rows = [row for row in view.rows if row[cost] > 0]
    costs = [row[cost] for row in rows]
    if not costs or max(costs) < 1.01 * min(costs):
        return None
    colour = next((key for key in (BLEND, K, *view.numbers) if key in view.numbers), None)
    others = [key for key in view.keys if key != colour]
    if len(group_rows(rows, others)) > MAX_LINES:
        others = [key for key in others if key not in view.numbers]
    groups = group_rows(rows, others)
    if len(groups) > MAX_LINES:
        others, groups = [], {(): rows}
    names = [describe(dict(zip(others, given, strict=True))) for given in groups]
    style = line_styles(names)
    figure, (axes,) = new_figure(1)
    norm = colour_scale([row[colour] for row in rows if is_number(row[colour])]) if colour else None
    for name, points in zip(names, groups.values(), strict=True):
        look: dict[str, Any] = {"color": style[name]["color"]}
        if colour:
            shades = [float(row[colour]) if is_number(row[colour]) else math.nan for row in points]
            look = {"c": shades, "cmap": COLOUR_MAP, "norm": norm, "plotnonfinite": True}
        xs, ys = [row[cost] for row in points], [view.mean(row) for row in points]
        axes.errorbar(xs, ys, [view.std(row) for row in points], fmt="none", ecolor="#999999", elinewidth=1)
        axes.scatter(xs, ys, s=70, zorder=3, marker=style[name]["marker"], **look)
    axes.set_xlabel(label)
    axes.set_ylabel(plain_text(METRICS[view.metric], 34))
    if needs_log_scale(costs):
        axes.set_xscale("log")
    if colour:
        figure.colorbar(ScalarMappable(norm, COLOUR_MAP), ax=axes, label=plain_text(short_name(colour)))
    if len(groups) > 1:
        add_legend(figure, {name: _mark(style[name], colour is None) for name in names}, None)
    return figure, view.caption("bar")


def _mark(style: dict[str, Any], coloured: bool) -> Any:
    """Return a legend's marker, grey where colour means something else."""
    from matplotlib.lines import Line2D

    colour = style["color"] if coloured else "#444444"
    return Line2D([], [], linestyle="", markersize=8, marker=style["marker"], color=colour)


def _with_devices(made: tuple[Figure, str], frame: pd.DataFrame) -> tuple[Figure, str]:
    figure, caption = made
    devices = sorted(set(frame["device"][frame["status"] == COMPLETE].dropna()))
    if len(devices) > 1:
        caption += f" The runs come from several devices, whose times do not compare: {', '.join(devices)}."
    return figure, caption


def training_curves(frame: pd.DataFrame, summary: pd.DataFrame, folders: Sequence[Path]) -> tuple[Figure, str] | None:
    """Draw test top-1 and training loss over epochs for at most ``MAX_LINES`` configurations."""
    from matplotlib.ticker import MaxNLocator

    keys, groups = main_keys(summary), complete_groups(frame)
    picked = evenly_spread(groups, MAX_LINES)
    histories = [(row, [history for i in runs if (history := _history(folders[i]))]) for row, runs in picked]
    histories = [(row, found) for row, found in histories if found]
    if not any(len(history) > 1 for _, found in histories for history in found):
        return None
    most = max(keys, key=lambda key: len({show(row[key]) for row, _ in histories}), default=None)
    colours = line_styles(sorted({row[most] for row, _ in histories}, key=sort_key) if most else [None])
    others = [tuple(show(row[key]) for key in keys if key != most) for row, _ in histories]
    dashes = {given: DASHES[i % len(DASHES)] for i, given in enumerate(dict.fromkeys(others))}
    banded = len(histories) <= 4 and any(len(found) > 1 for _, found in histories)
    figure, all_axes = new_figure(2)
    handles = {}
    for (row, found), given in zip(histories, others, strict=True):
        look = {"color": colours[row[most] if most else None]["color"], "linestyle": dashes[given]}
        for axes, name in zip(all_axes, ("test_top1", "train_loss"), strict=True):
            handle = _curve(axes, found, name, look, banded)
        handles[describe({key: row[key] for key in keys})] = handle
    for axes, label in zip(all_axes, ("test top-1 (%)", "training loss"), strict=True):
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(handles) > 1:
        add_legend(figure, handles, None)
    several = any(len(found) > 1 for _, found in histories)
    caption = "Mean over seeds." if several else "Each line is one run."
    if banded:
        caption = "Mean over seeds; band: ± one sample standard deviation."
    if len(groups) > len(picked):
        caption += f" {len(picked)} of {len(groups)} configurations, evenly spread over the table."
    return figure, caption


def _history(folder: Path) -> list[Row]:
    """Return epoch, test top-1 and training loss of a run's epochs, up to the first that lacks one."""
    rows = []
    for row in read_record(folder).whole_rows:
        found = {name: row.get(name) for name in ("epoch", "test_top1", "train_loss")}
        if found["train_loss"] is None and "train_loss" in row:  # all steps of the epoch were skipped
            found["train_loss"] = math.nan
        if not all(isinstance(value, (int, float)) for value in found.values()):
            break
        rows.append(found)
    return rows


def _curve(axes: Axes, histories: list[list[Row]], name: str, look: dict[str, Any], banded: bool) -> Any:
    values: dict[float, list[float]] = {}
    for history in histories:
        for row in history:
            values.setdefault(row["epoch"] + 1, []).append(row[name])
    epochs = sorted(values)
    scores = [Score.of(values[epoch]) for epoch in epochs]
    if banded:
        low, high = ([s.mean + sign * s.std if s.n > 1 else s.mean for s in scores] for sign in (-1, 1))
        axes.fill_between(epochs, low, high, color=look["color"], alpha=0.15, linewidth=0)
    return axes.plot(epochs, [s.mean for s in scores], marker="o" if len(epochs) == 1 else None, **look)[0]
