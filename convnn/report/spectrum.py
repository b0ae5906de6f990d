"""A report's pictures that need the runs' epochs: layers over depth and training, and the ends along the spectrum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convnn.figures.curves import draw_layer_heat_maps, draw_over_depth, draw_over_number, read_layer_measures
from convnn.figures.style import COLOURS, evenly_spread, plain_text
from convnn.report.tables import complete_groups, describe, is_numeric, main_keys, short_name
from convnn.report.view import BLEND, MAX_LINES, RATIO
from convnn.runs.metrics import is_number
from convnn.runs.record import read_record
from convnn.text import Score, is_missing, show

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

MAX_HEAT_MAPS = 3
"""Configurations whose layers are drawn epoch by epoch; of more, evenly spread ones."""


def draw_layers(
    frame: pd.DataFrame, summary: pd.DataFrame, folders: Sequence[Path]
) -> list[tuple[str, str, tuple[Figure, str] | None]]:
    """Return (name, title, figure and caption) of the pictures of what the layers choose."""
    keys = main_keys(summary)
    measured = []
    for values, rows in complete_groups(frame):
        measures = next((m for m in (read_layer_measures(folders[i]) for i in rows) if m.epochs), None)
        if measures is not None:
            measured.append((describe({key: values[key] for key in keys}), measures))
    lines = evenly_spread(measured, len(COLOURS))  # more would not be told apart
    figure = draw_over_depth({plain_text(label, 60): measures for label, measures in lines}, None)
    caption = "The last epoch of one run of each configuration, on the probe images (docs/tour.md says how to read it)."
    if len(lines) < len(measured):
        caption += f" {len(lines)} of {len(measured)} configurations."
    drawn: list[tuple[str, str, tuple[Figure, str] | None]] = []
    drawn.append(("layers_depth", "What the layers choose, over depth", (figure, caption) if figure else None))
    for i, (label, measures) in enumerate(evenly_spread(measured, MAX_HEAT_MAPS)):
        title = "What each layer chooses, epoch by epoch" + (f": {label}" if label else "")
        made = draw_layer_heat_maps(measures, title="")
        text = "One run; layers from first (top) to last; grey: not defined."
        drawn.append((f"layers_epochs{i + 1}", plain_text(title, 90), (made, text) if made else None))
    return drawn


def draw_spectrum(frame: pd.DataFrame, summary: pd.DataFrame, folders: Sequence[Path]) -> tuple[Figure, str] | None:
    """Draw accuracy, loss and cost over blend or branch ratio, a line for each value of all other keys.

    None where no two runs differ in the blend or the ratio alone. A blend that moves is none of its values.
    """
    keys = main_keys(summary)
    x = next((key for key in (BLEND, RATIO) if key in keys and is_numeric(summary, key)), None)
    if x is None:
        return None
    columns = {"accuracy": list(frame["top1_last"]), "loss": [_last_loss(folder) for folder in folders]}
    columns |= {name: list(frame[name]) for name in ("gflops", "seconds")}

    def mean(values: list[Any], rows: list[int]) -> float:
        return Score.of([float(values[i]) for i in rows if not is_missing(values[i])]).mean

    lines: dict[tuple[Any, ...], list[dict[str, float]]] = {}
    labels: dict[tuple[Any, ...], str] = {}
    moving = 0
    for values, rows in complete_groups(frame):
        if is_number(values[x]):
            others = {key: value for key, value in values.items() if key != x}
            given = tuple(show(value) for value in others.values())
            label = plain_text(describe({key: others[key] for key in keys if key != x}), 60)
            if given not in labels:  # cut short, two may look alike
                labels[given] = f"{label} ({len(labels) + 1})" if label in labels.values() else label
            point = {"x": float(values[x])} | {name: mean(column, rows) for name, column in columns.items()}
            lines.setdefault(given, []).append(point)
        moving += isinstance(values[x], str)
    joined = {labels[given]: line for given, line in lines.items() if len({point["x"] for point in line}) > 1}
    figure = draw_over_number(dict(list(joined.items())[:MAX_LINES]), short_name(x))
    if figure is None:
        return None
    caption = "Mean over the seeds of each configuration; loss and accuracy of the last epoch on the test set."
    if len(joined) > MAX_LINES:
        caption += f" {MAX_LINES} of {len(joined)} lines."
    if len(joined) < len(lines):
        caption += f" Left out: {len(lines) - len(joined)} that no run with another {short_name(x)} equals in all else."
    if moving:
        caption += f" Left out: {moving} without one fixed {short_name(x)}."
    return figure, caption


def _last_loss(folder: Path) -> float:
    rows = read_record(folder).whole_rows
    value = rows[-1].get("test_loss") if rows else None
    return float(value) if is_number(value) else math.nan
