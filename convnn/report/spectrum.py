"""A report's pictures that need the runs' epochs: layers over depth and training, and the ends along the spectrum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convnn.figures.curves import along, heat_maps, over_depth, read_trend
from convnn.figures.style import COLOURS, evenly, plain
from convnn.report.tables import describe, grouped, is_numeric, main_keys, short_name, varying_keys
from convnn.report.view import BLEND, MAX_LINES, RATIO, Row
from convnn.runs.metrics import is_number, read_metrics
from convnn.runs.status import COMPLETE
from convnn.text import Score, is_missing

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

MAX_HEAT_MAPS = 3
"""Configurations whose layers are drawn epoch by epoch; of more, evenly spread ones."""

Group = tuple[Row, list[int]]
"""The varying keys of a configuration, and the rows of its complete runs."""


def complete_groups(frame: pd.DataFrame) -> list[Group]:
    """Return the configurations that have complete runs."""
    keys, status = varying_keys(frame), list(frame["status"])
    groups = [
        (dict(zip(keys, values, strict=True)), [i for i in positions if status[i] == COMPLETE])
        for values, positions in grouped(frame)
    ]
    return [(values, rows) for values, rows in groups if rows]


def draw_layers(
    frame: pd.DataFrame, summary: pd.DataFrame, folders: Sequence[Path]
) -> list[tuple[str, str, tuple[Figure, str] | None]]:
    """Return (name, title, figure and caption) of the pictures of what the layers choose."""
    keys = main_keys(summary)
    trends = []
    for values, rows in complete_groups(frame):
        trend = next((t for t in (read_trend(folders[i]) for i in rows) if t.epochs), None)
        if trend is not None:
            trends.append((describe({key: values[key] for key in keys}), trend))
    lines = evenly(trends, len(COLOURS))  # more would not be told apart
    figure = over_depth({plain(label, 60): trend for label, trend in lines}, None)
    caption = "The last epoch of one run of each configuration, on the probe images (docs/tour.md says how to read it)."
    if len(lines) < len(trends):
        caption += f" {len(lines)} of {len(trends)} configurations."
    drawn: list[tuple[str, str, tuple[Figure, str] | None]] = []
    drawn.append(("layers_depth", "What the layers choose, over depth", (figure, caption) if figure else None))
    for i, (label, trend) in enumerate(evenly(trends, MAX_HEAT_MAPS)):
        title = "What each layer chooses, epoch by epoch" + (f": {label}" if label else "")
        made = heat_maps(trend, title="")
        text = "One run; layers from first (top) to last; grey: not defined."
        drawn.append((f"layers_epochs{i + 1}", plain(title, 90), (made, text) if made else None))
    return drawn


def draw_along(frame: pd.DataFrame, summary: pd.DataFrame, folders: Sequence[Path]) -> tuple[Figure, str] | None:
    """Draw accuracy, loss and cost over blend or branch ratio, the mean of all other keys but k; None without one."""
    keys = main_keys(summary)
    x = next((key for key in (BLEND, RATIO) if key in keys and is_numeric(summary, key)), None)
    if x is None:
        return None
    line = next((key for key in ("operator.k",) if key in keys), None)
    cells: dict[Any, dict[float, list[int]]] = {}
    for values, rows in complete_groups(frame):
        if not is_missing(values[x]):
            own = None if line is None or is_missing(values[line]) else values[line]
            cells.setdefault(own, {}).setdefault(float(values[x]), []).extend(rows)
    columns = {name: list(frame[name]) for name in ("top1_last", "gflops", "seconds")}
    losses = [_last_loss(folder) for folder in folders]

    def mean(values: list[Any], rows: list[int]) -> float:
        return Score.of([float(values[i]) for i in rows if not is_missing(values[i])]).mean

    points = {
        "all runs" if own is None else f"k = {own:g}" if isinstance(own, (int, float)) else str(own): [
            {
                "x": at,
                "accuracy": mean(columns["top1_last"], rows),
                "loss": mean(losses, rows),
                "gflops": mean(columns["gflops"], rows),
                "seconds": mean(columns["seconds"], rows),
            }
            for at, rows in places.items()
        ]
        for own, places in cells.items()
    }
    figure = along(dict(list(points.items())[:MAX_LINES]), short_name(x))
    if figure is None:
        return None
    return figure, "Mean over all complete runs of each value; loss and accuracy of the last epoch on the test set."


def _last_loss(folder: Path) -> float:
    rows = read_metrics(folder / "metrics.jsonl")
    value = rows[-1].get("test_loss") if rows else None
    return float(value) if is_number(value) else math.nan
