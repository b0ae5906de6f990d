"""A report's pictures that need the runs' epochs: layers over depth and training, and the ends along the spectrum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convnn.figures.curves import (
    LayerMeasures,
    draw_layer_heat_maps,
    draw_over_depth,
    draw_over_number,
    read_layer_measures,
)
from convnn.figures.style import evenly_spread
from convnn.report.looks import Looks
from convnn.report.tables import complete_groups, labels_of, short_name
from convnn.report.view import BLEND, MAX_LINES, RATIO, Row
from convnn.runs.metrics import is_number
from convnn.runs.record import read_record
from convnn.text import Score, is_missing, show

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

MAX_HEAT_MAPS = 3
"""Configurations whose layers are drawn epoch by epoch; of more, evenly spread ones."""


def draw_layers(
    frame: pd.DataFrame, looks: Looks, folders: Sequence[Path]
) -> list[tuple[str, str, tuple[Figure, str] | None]]:
    """Return (name, title, figure and caption) of the pictures of what the layers choose."""
    measured: list[tuple[Row, LayerMeasures]] = []
    for values, rows in complete_groups(frame):
        measures = next((m for m in (read_layer_measures(folders[i]) for i in rows) if m.epochs), None)
        if measures is not None:
            measured.append((values, measures))
    of_row = {id(row): measures for row, measures in measured}
    every = [row for row, _ in measured]
    label_of = dict(zip(map(id, every), labels_of(every, looks.view.keys), strict=True))
    picked = looks.pick(every, MAX_LINES)
    figure = draw_over_depth(
        {label_of[id(row)]: of_row[id(row)] for row in picked},
        {label_of[id(row)]: look for row, look in zip(picked, looks.of(picked), strict=True)},
    )
    caption = "The last epoch of one run of each configuration, on the probe images (docs/tour.md says how to read it)."
    if len(picked) < len(measured):
        caption += f" {len(picked)} of {len(measured)} configurations."
    drawn: list[tuple[str, str, tuple[Figure, str] | None]] = []
    drawn.append(("layers_depth", "What the layers choose, over depth", (figure, caption) if figure else None))
    for i, row in enumerate(evenly_spread(every, MAX_HEAT_MAPS)):
        title = "What each layer chooses, epoch by epoch" + (f": {label_of[id(row)]}" if looks.view.keys else "")
        made = draw_layer_heat_maps(of_row[id(row)], title="")
        text = "One run; layers from first (top) to last; grey: not defined."
        drawn.append((f"layers_epochs{i + 1}", title, (made, text) if made else None))
    return drawn


def draw_spectrum(frame: pd.DataFrame, looks: Looks, folders: Sequence[Path]) -> tuple[Figure, str] | None:
    """Draw accuracy, loss and cost over blend or branch ratio, a line for each value of all other keys.

    None where no two runs differ in the blend or the ratio alone. A blend that moves is none of its values.
    """
    keys = looks.view.keys
    x = next((key for key in (BLEND, RATIO) if key in looks.view.numbers), None)
    if x is None:
        return None
    columns = {"accuracy": list(frame["top1_last"]), "loss": [_last_loss(folder) for folder in folders]}
    columns |= {name: list(frame[name]) for name in ("gflops", "seconds")}

    def mean(values: list[Any], rows: list[int]) -> float:
        return Score.of([float(values[i]) for i in rows if not is_missing(values[i])]).mean

    lines: dict[tuple[Any, ...], list[dict[str, float]]] = {}
    first: dict[tuple[Any, ...], Row] = {}
    moving = 0
    for values, rows in complete_groups(frame):
        if is_number(values[x]):
            given = tuple(show(value) for key, value in values.items() if key != x)
            first.setdefault(given, values)
            point = {"x": float(values[x])} | {name: mean(column, rows) for name, column in columns.items()}
            lines.setdefault(given, []).append(point)
        else:
            moving += 1
    joined = [given for given, line in lines.items() if len({point["x"] for point in line}) > 1]
    picked = looks.pick([first[given] for given in joined], MAX_LINES, over=x)
    shown = [given for given in joined if any(first[given] is row for row in picked)]
    labels = labels_of([first[given] for given in shown], [key for key in keys if key != x])
    figure = draw_over_number(
        {label: lines[given] for label, given in zip(labels, shown, strict=True)},
        short_name(x),
        dict(zip(labels, looks.of([first[given] for given in shown], over=x), strict=True)),
    )
    if figure is None:
        return None
    caption = "Mean over the seeds of each configuration; loss and accuracy of the last epoch on the test set."
    if len(joined) > len(shown):
        caption += f" {len(shown)} of {len(joined)} lines."
    if len(joined) < len(lines):
        caption += f" Left out: {len(lines) - len(joined)} that no run with another {short_name(x)} equals in all else."
    if moving:
        caption += f" Left out: {moving} without one fixed {short_name(x)}."
    return figure, caption


def _last_loss(folder: Path) -> float:
    rows = read_record(folder).whole_rows
    value = rows[-1].get("test_loss") if rows else None
    return float(value) if is_number(value) else math.nan
