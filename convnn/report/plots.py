"""Pictures of a summary over runs, as PNG and SVG.

Which key goes where: x is the number plotted over (blend and branch ratio each get a picture; without them the number
with the most values); lines are one further key, k before blend before other numbers before text, the one with the
most values first; every combination of the remaining keys gets a panel of its own. Where this leaves no line with two
points, as in a random search, all points stand in one panel without lines. Keys that follow from others
(``main_keys``) do not count. What exceeds ``MAX_LINES`` or ``MAX_PANELS`` is left out, and the caption says so. What a
configuration looks like is ``Looks``', the same in all pictures.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convnn.figures.hints import placed_hints, tell, tell_line
from convnn.figures.style import (
    COLOUR_MAP,
    MARKERS,
    NEUTRAL,
    RC_PARAMS,
    add_legend,
    add_title,
    evenly_spread,
    integer_axis,
    needs_log_scale,
    new_figure,
    number_axis,
    plain_text,
    save_figure,
)
from convnn.report.content import Picture
from convnn.report.looks import Looks
from convnn.report.spectrum import draw_layers, draw_spectrum
from convnn.report.tables import METRICS, PLAIN, complete_groups, describe, labels_of, short_name
from convnn.report.view import BLEND, MAX_CELLS, MAX_DOTS, MAX_LINES, MAX_PANELS, K, Row, View
from convnn.runs.metrics import is_number
from convnn.runs.record import read_record
from convnn.runs.status import COMPLETE
from convnn.text import Score, show

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


LEAST_SPAN = 1.0
"""Points of accuracy that the colours of a heat map span at least."""
LEAST_SPAN_OF_ONE_SEED = 5.0
"""The same where every configuration has one seed, so that the noise is not known."""


def draw_all(
    frame: pd.DataFrame, summary: pd.DataFrame, metric: str, folders: Sequence[Path], out: Path, subject: str = ""
) -> list[Picture]:
    """Draw what these runs can show.

    Args:
        frame: of runs.
        summary: of the same.
        metric: what is drawn.
        folders: the run folders of the frame's rows.
        out: where the files go.
        subject: what the runs are, for the titles.
    """
    import matplotlib as mpl

    view = View(summary, metric)
    looks = Looks(view)
    with mpl.rc_context(RC_PARAMS):
        drawn = [
            (f"over_{short_name(key)}", f"Accuracy over {short_name(key)}", accuracy_over_number(looks, key))
            for key in view.x_keys()
        ]
        operations = accuracy_against_cost(looks, "gflops", "forward pass of one image (GFLOPs)")
        seconds = accuracy_against_cost(looks, "seconds", "measured training time (s)")
        spectrum = draw_spectrum(frame, looks, folders)
        drawn += [
            ("heatmap", "Accuracy over blend and k", accuracy_heat_map(view)),
            ("configurations", "Accuracy by configuration", accuracy_by_configuration(looks)),
            ("gflops", "Accuracy against computation", operations),
            ("seconds", "Accuracy against training time", seconds and _with_devices(seconds, frame)),
            ("spectrum", "Accuracy, loss and cost along the spectrum", spectrum and _with_devices(spectrum, frame)),
            ("curves", "Training curves", training_curves(frame, looks, folders)),
            *draw_layers(frame, looks, folders),
        ]
        return save_all(drawn, out, subject)


def save_all(
    drawn: Iterable[tuple[str, str, tuple[Figure, str] | None]], out: Path, subject: str = ""
) -> list[Picture]:
    """Save pictures as (name, title, figure and caption), without those that were not made, as PNG and SVG."""
    return [_save(name, title, *made, out, subject) for name, title, made in drawn if made is not None]


def _save(name: str, title: str, figure: Figure, caption: str, out: Path, subject: str) -> Picture:
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", name)
    add_title(figure, f"{title} ({subject})" if subject else title)
    files = save_figure(figure, out / name, dpi=150)
    return Picture(name, title, caption, *files, placed_hints(figure))


def accuracy_over_number(looks: Looks, x: str) -> tuple[Figure, str] | None:
    """Draw accuracy over a numeric key; None if there are fewer than two points."""
    view = looks.view
    rows = view.rows_at(x)
    if len({row[x] for row in rows}) < 2:
        return None
    line = view.line_key(x)
    rest = [key for key in view.keys if key not in (x, line)]
    panels = view.grouped(rows, rest)
    lines = [group for panel in panels.values() for group in view.grouped(panel, [line] if line else []).values()]
    joined = any(len({row[x] for row in group}) > 1 for group in lines)
    if not joined:
        line, panels = None, {(): rows}
    shown = dict(list(panels.items())[:MAX_PANELS])
    figure, all_axes = new_figure(len(shown))
    values = [value for (value,) in view.grouped(rows, [line])] if line else [None]
    style = {value: looks.of_value(line, value) for value in evenly_spread(values, MAX_LINES)}
    alpha = min(0.15, 0.6 / len(style))
    handles: dict[str, Any] = {}
    for axes, (given, panel) in zip(all_axes, shown.items(), strict=True):
        for (value,), points in (view.grouped(panel, [line]) if line else {(None,): panel}).items():
            if value in style:
                points.sort(key=lambda row: row[x])
                if joined:
                    handles[show(value)] = _line(axes, view, points, x, style[value], alpha)
                else:
                    _dots(axes, looks, points, x, dict.fromkeys(map(id, points), MARKERS[0]))
        if given:
            axes.set_title(plain_text(describe(dict(zip(rest, given, strict=True)))))
        axes.set_xlabel(plain_text(short_name(x)))
        axes.set_ylabel(plain_text(METRICS[view.metric], 34))
        number_axis(axes, sorted({row[x] for row in panel}))
    plain = [row for row in view.rows if row[x] == PLAIN]
    ordered = {show(value): handles[show(value)] for value in style if show(value) in handles} if line else {}
    if len(plain) == 1:
        for axes in all_axes:
            ordered[PLAIN] = _baseline(axes, view, plain[0])
    if ordered:
        add_legend(figure, ordered, plain_text(short_name(line)) if line else None)
    caption = view.caption("band" if joined else "bar")
    if not joined and view.keys != [x]:
        caption += f" The points differ in more than {short_name(x)}, so that no line joins them."
    moving = len(view.rows) - len(rows) - (len(plain) if len(plain) == 1 else 0)
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
    """Draw points, joined and with a band; return the legend's entry."""
    xs, ys = [row[x] for row in points], [view.mean(row) for row in points]
    stds = [view.std(row) for row in points]
    for row in points:
        tell(axes, row[x], view.mean(row), view.told(row))
    if any(std > 0 for std in stds):
        low, high = ([y + sign * s for y, s in zip(ys, stds, strict=True)] for sign in (-1, 1))
        axes.fill_between(xs, low, high, color=style["color"], alpha=alpha, linewidth=0)
    return axes.plot(xs, ys, markersize=7, **style)[0]


def _baseline(axes: Axes, view: View, row: Row) -> Any:
    """Draw a plain backbone, which has no place on the axis, as a level with a band; return the legend's entry."""
    mean, std = view.mean(row), view.std(row)
    tell(axes, None, mean, view.told(row))
    if std > 0:
        axes.axhspan(mean - std, mean + std, color="#555555", alpha=0.1, linewidth=0)
    return axes.axhline(mean, color="#555555", linestyle="--")


def _dots(axes: Axes, looks: Looks, rows: list[Row], x: str, markers: Mapping[int, str]) -> None:
    """Draw a dot with a bar for each configuration; ``markers`` by the row's id."""
    for row in rows:
        y, bar = looks.view.mean(row), looks.view.std(row)
        axes.errorbar([row[x]], [y], [bar], fmt="none", ecolor="#999999", elinewidth=1)
        tell(axes, row[x], y, looks.view.told(row, None if x in looks.view.keys else x))
        axes.scatter([row[x]], [y], s=70, zorder=3, color=looks.colour(row), marker=markers[id(row)])


def accuracy_heat_map(view: View) -> tuple[Figure, str] | None:
    """Draw accuracy over blend and k; None unless both vary."""
    if BLEND not in view.numbers or K not in view.numbers:
        return None
    rows = [row for row in view.rows_at(BLEND) if is_number(row[K])]
    rest = [key for key in view.keys if key not in (BLEND, K)]
    blends, ks = ([value for (value,) in view.grouped(rows, [key])] for key in (BLEND, K))
    if not (2 <= len(blends) <= MAX_CELLS and 2 <= len(ks) <= MAX_CELLS):
        return None
    panels = view.grouped(rows, rest)
    shown = dict(list(panels.items())[:MAX_PANELS])
    noise = _noise(view, rows)
    least = LEAST_SPAN_OF_ONE_SEED if math.isnan(noise) else max(4 * noise, LEAST_SPAN)
    from matplotlib.figure import Figure

    width = min(max(7.0, 3.2 + 0.95 * len(blends)), 24)
    figure = Figure(figsize=(width, 1 + len(shown) * max(2.8, min(1.4 + 0.75 * len(ks), 12))))
    all_axes = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
    for axes, (given, panel) in zip(all_axes, shown.items(), strict=True):
        _cells(figure, axes, view, panel, (blends, ks), least)
        if given:
            axes.set_title(plain_text(describe(dict(zip(rest, given, strict=True))), 70))
    caption = f"{METRICS[view.metric].capitalize()}, mean over seeds; grey cells have no complete run."
    caption += f" The colours span {least:.2g} points or more: "
    caption += "what one seed's noise may be." if math.isnan(noise) else "± two standard deviations over seeds."
    if len(panels) > 1:
        caption += " Each panel has a colour scale of its own."
    if len(panels) > len(shown):
        caption += f" The first {len(shown)} of {len(panels)} panels are shown."
    return figure, caption


def _noise(view: View, rows: Sequence[Row]) -> float:
    """Return the standard deviation over seeds, pooled over configurations; NaN where each has one seed."""
    variances = [view.std(row) ** 2 for row in rows if not math.isnan(view.std(row))]
    return math.sqrt(statistics.fmean(variances)) if variances else math.nan


def _cells(
    figure: Figure, axes: Axes, view: View, rows: list[Row], sides: tuple[list[Any], list[Any]], least: float
) -> None:
    """Draw a table of accuracies as colours, which span ``least`` points or more, so that noise does not look large."""
    import numpy as np

    blends, ks = sides
    grid = np.full((len(ks), len(blends)), np.nan)
    for (blend, k), group in view.grouped(rows, [BLEND, K]).items():
        place = ks.index(k), blends.index(blend)
        grid[place] = statistics.fmean(view.mean(row) for row in group)
        tell(axes, place[1], place[0], "; ".join(map(view.told, group)))
    axes.grid(False)
    axes.set_facecolor("#cccccc")
    middle = float(np.nanmin(grid) + np.nanmax(grid)) / 2
    half = max(least, float(np.nanmax(grid) - np.nanmin(grid))) / 2
    middle = min(max(middle, half), 100 - half)  # there is no accuracy below 0 or above 100 %
    image = axes.imshow(grid, cmap=COLOUR_MAP, aspect="auto", origin="lower", vmin=middle - half, vmax=middle + half)
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


def accuracy_by_configuration(looks: Looks) -> tuple[Figure, str] | None:
    """Draw a row for each configuration; None where numbers vary, which have pictures of their own."""
    view = looks.view
    if view.numbers or len(view.rows) < 2:
        return None
    rows = view.rows[:MAX_DOTS]
    figure, (axes,) = new_figure(1, height=1.6 + 0.45 * len(rows))
    for place, (row, look) in enumerate(zip(rows, looks.of(rows), strict=True)):
        bar = [view.std(row)]
        tell(axes, view.mean(row), place, view.told(row))
        axes.errorbar([view.mean(row)], [place], xerr=bar, fmt=look["marker"], color=look["color"], ms=8, capsize=4)
    axes.set_yticks(range(len(rows)), [plain_text(label, 50) for label in labels_of(rows, view.keys)])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(plain_text(METRICS[view.metric]))
    caption = view.caption("bar")
    if len(view.rows) > len(rows):
        caption += f" The first {len(rows)} of {len(view.rows)} configurations are shown."
    return figure, caption


def accuracy_against_cost(looks: Looks, cost: str, label: str) -> tuple[Figure, str] | None:
    """Draw accuracy against a cost: a marker for each combination of the keys that colours do not show, of few.

    None if the costs differ by less than a hundredth.
    """
    view = looks.view
    rows = [row for row in view.rows if row[cost] > 0]
    costs = [row[cost] for row in rows]
    if not costs or max(costs) < 1.01 * min(costs):
        return None
    others = [key for key in view.keys if key != looks.key]
    if len(view.grouped(rows, others)) > MAX_LINES:
        others = [key for key in others if key not in view.numbers]
    groups = view.grouped(rows, others)
    if len(groups) > MAX_LINES:
        others, groups = [], {(): rows}
    markers, entries = {}, {}
    for value in evenly_spread(looks.values, MAX_LINES) if len(looks.values) > 1 else []:
        style = looks.of_value(looks.key, value)
        entries[describe({looks.key or "": value})] = _mark(style["marker"] if len(groups) < 2 else "s", style["color"])
    names = [describe(dict(zip(others, given, strict=True))) for given in groups]
    for i, (name, points) in enumerate(zip(names, groups.values(), strict=True)):
        for row in points:
            own = looks.of_value(looks.key, row[looks.key])["marker"] if looks.key else MARKERS[0]
            markers[id(row)] = MARKERS[i] if len(groups) > 1 else own
        if len(groups) > 1:
            entries[name] = _mark(MARKERS[i], NEUTRAL)
    figure, (axes,) = new_figure(1)
    _dots(axes, looks, rows, cost, markers)
    axes.set_xlabel(label)
    axes.set_ylabel(plain_text(METRICS[view.metric], 34))
    if needs_log_scale(costs):
        axes.set_xscale("log")
    if entries:
        add_legend(figure, entries)
    return figure, view.caption("bar")


def _mark(marker: str, colour: Any) -> Any:
    """Return a legend's marker: grey where colour means something else."""
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="", markersize=8, marker=marker, color=colour)


def _with_devices(made: tuple[Figure, str], frame: pd.DataFrame) -> tuple[Figure, str]:
    figure, caption = made
    devices = sorted(set(frame["device"][frame["status"] == COMPLETE].dropna()))
    if len(devices) > 1:
        caption += f" The runs come from several devices, whose times do not compare: {', '.join(devices)}."
    return figure, caption


def training_curves(frame: pd.DataFrame, looks: Looks, folders: Sequence[Path]) -> tuple[Figure, str] | None:
    """Draw test top-1 and training loss over epochs for at most ``MAX_LINES`` configurations."""
    groups = complete_groups(frame)
    runs = {id(row): rows for row, rows in groups}
    picked = looks.pick([row for row, _ in groups], MAX_LINES)
    histories = [(row, [history for i in runs[id(row)] if (history := _history(folders[i]))]) for row in picked]
    histories = [(row, found) for row, found in histories if found]
    if not any(len(history) > 1 for _, found in histories for history in found):
        return None
    banded = len(histories) <= 4 and any(len(found) > 1 for _, found in histories)
    figure, all_axes = new_figure(2)
    handles = {}
    drawn = [row for row, _ in histories]
    labels = labels_of(drawn, looks.view.keys)
    for (_, found), label, style in zip(histories, labels, looks.of(drawn), strict=True):
        look = {"color": style["color"], "linestyle": style["linestyle"]}
        for axes, name in zip(all_axes, ("test_top1", "train_loss"), strict=True):
            handles[label] = _curve(axes, found, name, look, banded)
            tell_line(handles[label], label)
    for axes, label in zip(all_axes, ("test top-1 (%)", "training loss"), strict=True):
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        integer_axis(axes, 1, max(row["epoch"] + 1 for _, found in histories for history in found for row in history))
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
