"""Curves and heat maps of runs over epochs, depth and the spectrum, from their metrics. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convnn.figures.hints import tell, tell_line
from convnn.figures.style import (
    COLOUR_MAP,
    COLOURS,
    RC_PARAMS,
    add_legend,
    add_title,
    axis_from_zero,
    integer_axis,
    line_styles,
    new_figure,
    number_axis,
    plain_text,
)
from convnn.runs.metrics import PANEL_TITLES, is_number
from convnn.runs.record import read_record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_LAYER_NAMES = 24
"""Layer names on an axis; of more, evenly spread ones are written."""

MOST_CELLS_TOLD = 300
"""Cells of a panel up to which each says its value (see ``convnn.figures.hints``)."""

LEAST_TOP = 0.05
"""Where the colour scale of a share ends at least: what hardly happens shall not look like much."""

Cells = dict[tuple[str, int], float]
Look = Mapping[str, Any]
"""Colour, marker and the like of a line, as ``Axes.plot`` takes them."""


@dataclass
class LayerMeasures:
    """What the layers of a run chose, as ``metrics.jsonl`` has it: each measure by layer and epoch."""

    epochs: list[int] = field(default_factory=list)
    """Of the measurements, counted from 1."""
    layers: list[str] = field(default_factory=list)
    """In forward order."""
    network: list[str] = field(default_factory=list)
    """All layers of the network that may be replaced, in forward order; empty: not known, as of older runs."""
    values: dict[str, Cells] = field(default_factory=dict)
    """By measure, the value of each (layer, epoch); undefined ones are left out."""

    def last(self, name: str) -> list[float]:
        """Return a measure of every layer at the last epoch, NaN where undefined."""
        cells = self.values.get(name, {})
        return [cells.get((layer, self.epochs[-1]), math.nan) for layer in self.layers] if self.epochs else []

    def mean(self, name: str) -> list[float]:
        """Return a measure's mean over layers at every epoch, NaN where no layer has it."""
        columns = [[v for (_, e), v in self.values.get(name, {}).items() if e == epoch] for epoch in self.epochs]
        return [sum(column) / len(column) if column else math.nan for column in columns]


def read_layer_measures(folder: Path) -> LayerMeasures:
    """Return the diagnostics of a run folder; without any, of no layer and no epoch."""
    record = read_record(folder)
    network = (record.result or {}).get("network_layers")
    measures = LayerMeasures(network=[str(name) for name in network] if isinstance(network, list) else [])
    for row in record.whole_rows:
        layers = row.get("layers")
        every = [one for one in layers if isinstance(one, dict)] if isinstance(layers, list) else []
        measured = [one for one in every if all(is_number(one.get(name)) for name in ("overlap", "padding", "prefix"))]
        if not measured:
            continue
        epoch = int(row["epoch"]) + 1
        measures.epochs.append(epoch)
        for one in measured:
            name = str(one.get("name")).removesuffix(".neighbors")
            if name not in measures.layers:
                measures.layers.append(name)
            values = one | {"outside": one["padding"] + one["prefix"]}
            for key in PANEL_TITLES:
                if is_number(values.get(key)):
                    measures.values.setdefault(key, {})[name, epoch] = float(values[key])
    return measures


def draw_curves(folder: Path) -> dict[str, Figure]:
    """Return the figures ``diagnostics`` and ``training`` of a run folder, those that its metrics allow."""
    figures = {"diagnostics": draw_layer_heat_maps(read_layer_measures(folder)), "training": draw_training(folder)}
    return {name: figure for name, figure in figures.items() if figure is not None}


def draw_layer_heat_maps(
    measures: LayerMeasures, title: str = "What each layer chooses, epoch by epoch"
) -> Figure | None:
    """Draw layers x epochs for each measure that has values; None if there are none."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    names = [name for name in PANEL_TITLES if name in measures.values and _worth_a_panel(name, measures.values[name])]
    if not names:
        return None
    columns = min(3, len(names)) if len(names) != 4 else 2
    rows = -(-len(names) // columns)
    height = min(max(2.0, 0.8 + 0.27 * len(measures.layers)), 6.5)
    with mpl.rc_context(RC_PARAMS | {"axes.grid": False, "font.size": 12}):
        figure = Figure(figsize=(2.2 + 3.7 * columns, 0.9 + (height + 0.9) * rows))
        panels = figure.subplots(rows, columns, squeeze=False, sharey=True, sharex=True)
        for i, axes in enumerate(panels.flatten()):
            if i >= len(names):
                axes.set_visible(False)
                continue
            _heat_map(figure, axes, measures, names[i])
            last_in_column = i + columns >= len(names)
            axes.tick_params(labelbottom=last_in_column)
            axes.set_xlabel("epoch" if last_in_column else "")
        if title:
            add_title(figure, title)
    return figure


def _worth_a_panel(name: str, cells: Cells) -> bool:
    """Return whether a measure is worth a panel: a blend that is the same everywhere, or no padding, is not."""
    if name == "blend":
        return len(set(cells.values())) > 1
    return name != "outside" or max(cells.values()) > 0


def _heat_map(figure: Figure, axes: Axes, measures: LayerMeasures, name: str) -> None:
    import numpy as np

    cells = measures.values[name]
    grid = np.array([[cells.get((layer, e), math.nan) for e in measures.epochs] for layer in measures.layers])
    whole = name in ("blend", "overlap", "agreement", "entropy")
    axes.set_facecolor("#cccccc")
    top = 1.0 if whole else max(float(np.nanmax(grid)), LEAST_TOP)
    image = axes.imshow(grid, cmap=COLOUR_MAP, aspect="auto", interpolation="nearest", vmin=0, vmax=top)
    bar = figure.colorbar(image, ax=axes, aspect=14)
    if name not in ("blend", "entropy", "distance_mean"):
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.set_title(PANEL_TITLES[name], fontsize=12)
    for (i, j), value in np.ndenumerate(grid) if grid.size <= MOST_CELLS_TOLD else ():
        if not math.isnan(value):
            tell(axes, j, i, f"{measures.layers[i]}, epoch {measures.epochs[j]}: {value:.4g}")
    for axis, items, most in ((axes.yaxis, measures.layers, MAX_LAYER_NAMES), (axes.xaxis, measures.epochs, 6)):
        step = -(-len(items) // most)
        axis.set_ticks(range(0, len(items), step), [plain_text(str(item), 30) for item in items[::step]])


def draw_training(folder: Path) -> Figure | None:
    """Draw accuracy, loss, and where the layers were on the spectrum, over the epochs; None without any epoch."""
    import matplotlib as mpl

    rows = read_record(folder).whole_rows
    if not rows:
        return None
    measures = read_layer_measures(folder)
    epochs = [row["epoch"] + 1 for row in rows]
    with mpl.rc_context(RC_PARAMS | {"font.size": 12}):
        figure, panels = new_figure(2)
        if measures.epochs:
            figure.clear()
            panels = figure.subplots(1, 3).tolist()
        figure.set_size_inches(13.3, 4.6)
        lines = (("train", COLOURS[0], "s"), ("val", COLOURS[2], "^"), ("test", COLOURS[1], "o"))
        for axes, end, label in zip(panels, ("top1", "loss"), ("top-1 accuracy (%)", "loss"), strict=False):
            for split, colour, marker in lines:
                values = [row.get(f"{split}_{end}") for row in rows]
                if any(value is not None for value in values):
                    ys = [float(value) if is_number(value) else math.nan for value in values]
                    axes.plot(epochs, ys, color=colour, marker=marker, ms=5, label=split)
            axes.set_ylabel(label)
            if axes.lines:
                axes.legend()
        if measures.epochs:
            for name, label, colour, marker in (
                ("blend", "blend", "#000000", "D"),
                ("overlap", "neighbours in the\nconvolution window", COLOURS[3], "o"),
                ("agreement", "neighbours kept since\nthe epoch before", COLOURS[4], "s"),
            ):
                means = measures.mean(name)
                if not all(map(math.isnan, means)):
                    panels[2].plot(measures.epochs, means, color=colour, marker=marker, ms=5, label=label)
            panels[2].set_ylim(-0.03, 1.03)
            panels[2].set_ylabel("mean over layers")
            panels[2].legend(loc="best", fontsize=11)
        for axes in panels:
            axes.set_xlabel("epoch")
            integer_axis(axes, epochs[0], epochs[-1])
        add_title(figure, "Training")
    return figure


def draw_over_depth(
    runs: Mapping[str, LayerMeasures], looks: Mapping[str, Look] | None = None, title: str | None = None
) -> Figure | None:
    """Draw measures of the last epoch over the depth of the network, a line for each run; None where nothing varies.

    Args:
        runs: by label.
        looks: of each label's line; default: see ``line_styles``.
        title: of the legend.
    """
    runs = {label: measures for label, measures in runs.items() if measures.epochs}
    drawn = ("overlap", "distance_mean", "hub_share", "agreement")
    names = [name for name in drawn if any(name in measures.values for measures in runs.values())]
    places, axis, ends = _depths(runs)
    if not names or len({x for xs in places.values() for x in xs}) < 2:
        return None
    figure, panels = new_figure(len(names))
    looks = looks or line_styles(list(runs))
    handles: dict[str, Any] = {}
    for axes, name in zip(panels, names, strict=True):
        for label, measures in runs.items():
            (handles[label],) = axes.plot(places[label], measures.last(name), markersize=6, **looks[label])
            tell_line(handles[label], label)
        axes.set_ylabel(PANEL_TITLES[name], fontsize=12)
        axes.set_xlabel(axis)
        axis_from_zero(axes)
        if ends[1] > 1:
            integer_axis(axes, *ends)
        else:
            axes.set_xlim(-0.04, 1.04)
    if len(handles) > 1:
        add_legend(figure, handles, title)
    return figure


def _depths(runs: Mapping[str, LayerMeasures]) -> tuple[dict[str, list[float]], str, tuple[float, float]]:
    """Return where the layers of each run stand, what that is called, and where its axis begins and ends."""
    networks = [measures.network for measures in runs.values()]
    if all(len(m.network) > 1 and set(m.layers) <= set(m.network) for m in runs.values()):
        whole = {label: [float(m.network.index(name)) for name in m.layers] for label, m in runs.items()}
        if all(network == networks[0] for network in networks):
            end = len(networks[0]) if networks else 1
            return {label: [x + 1 for x in xs] for label, xs in whole.items()}, "layer of the network", (1, end)
        shares = {label: [x / (len(runs[label].network) - 1) for x in xs] for label, xs in whole.items()}
        return shares, "depth in the network\n(0: first layer, 1: last)", (0, 1)
    # Runs of before the network's layers were kept: the layers that any of them replaced.
    every = {name for measures in runs.values() for name in measures.layers}
    longest = max((measures.layers for measures in runs.values()), key=len, default=[])
    order = longest if set(longest) == every else sorted(every, key=_natural)
    found = {label: [order.index(name) + 1.0 for name in measures.layers] for label, measures in runs.items()}
    return found, "layer, of those that were replaced", (1, max(len(order), 1))


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Order names with numbers in them by these: blocks.9 before blocks.10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]


def draw_over_number(
    points: Mapping[str, Sequence[Mapping[str, float]]], x: str, looks: Mapping[str, Look] | None = None
) -> Figure | None:
    """Draw accuracy, loss and cost over a number, a line for each key of ``points``; None with fewer than two values.

    Args:
        points: rows with ``x``, and means in ``accuracy`` (%), ``loss``, ``gflops`` and ``seconds``, by line.
        x: name of the number.
        looks: of each line; default: see ``line_styles``.
    """
    rows = [row for line in points.values() for row in line]
    if len({row["x"] for row in rows}) < 2:
        return None
    labels = {
        "accuracy": "test top-1 (%)",
        "loss": "test loss",
        "gflops": "forward pass (GFLOPs)",
        "seconds": "training time (s)",
    }
    names = [name for name in labels if any(not math.isnan(row[name]) for row in rows)]
    figure, panels = new_figure(len(names))
    looks = looks or line_styles(list(points))
    handles: dict[str, Any] = {}
    for axes, name in zip(panels, names, strict=True):
        for label, line in points.items():
            ordered = sorted(line, key=lambda row: row["x"])
            xs, ys = [row["x"] for row in ordered], [row[name] for row in ordered]
            (handles[label],) = axes.plot(xs, ys, markersize=7, **looks[label])
            tell_line(handles[label], label)
        axes.set_xlabel(x)
        axes.set_ylabel(labels[name])
        number_axis(axes, sorted({row["x"] for row in rows}))
        if name in ("gflops", "seconds"):
            axis_from_zero(axes)
    if len(handles) > 1:
        add_legend(figure, handles, None)
    return figure
