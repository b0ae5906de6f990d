"""A report's pictures that need the runs' epochs: layers over depth and training, and the ends along the spectrum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convnn.figures.curves import draw_layer_heat_maps, draw_over_depth, draw_over_number, read_layer_measures
from convnn.figures.style import COLOURS, evenly_spread, plain_text
from convnn.report.tables import complete_groups, describe, is_numeric, main_keys, short_name
from convnn.report.view import BLEND, MAX_LINES, RATIO, K
from convnn.runs.metrics import is_number, read_metrics
from convnn.text import Score, is_missing

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
    """Draw accuracy, loss and cost over blend or branch ratio, the mean of all other keys but k; None without one."""
    keys = main_keys(summary)
    x = next((key for key in (BLEND, RATIO) if key in keys and is_numeric(summary, key)), None)
    if x is None:
        return None
    line = K if K in keys else None
    cells: dict[Any, dict[float, list[int]]] = {}
    for values, rows in complete_groups(frame):
        if not is_missing(values[x]):
            own = None if line is None or is_missing(values[line]) else values[line]
            cells.setdefault(own, {}).setdefault(float(values[x]), []).extend(rows)
    columns = {"accuracy": list(frame["top1_last"]), "loss": [_last_loss(folder) for folder in folders]}
    columns |= {name: list(frame[name]) for name in ("gflops", "seconds")}

    def mean(values: list[Any], rows: list[int]) -> float:
        return Score.of([float(values[i]) for i in rows if not is_missing(values[i])]).mean

    points = {
        "all runs" if own is None else f"k = {own:g}" if isinstance(own, (int, float)) else str(own): [
            {"x": at} | {name: mean(column, rows) for name, column in columns.items()} for at, rows in places.items()
        ]
        for own, places in cells.items()
    }
    figure = draw_over_number(dict(list(points.items())[:MAX_LINES]), short_name(x))
    if figure is None:
        return None
    return figure, "Mean over all complete runs of each value; loss and accuracy of the last epoch on the test set."


def _last_loss(folder: Path) -> float:
    rows = read_metrics(folder / "metrics.jsonl")
    value = rows[-1].get("test_loss") if rows else None
    return float(value) if is_number(value) else math.nan
