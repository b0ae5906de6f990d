"""A trained model at other settings: accuracy and what the neighbours hold over a setting, and layers moved alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from convnn.figures.style import (
    NEUTRAL,
    RC_PARAMS,
    add_legend,
    characters,
    evenly_spread,
    integer_axis,
    line_styles,
    needs_log_scale,
    new_figure,
    number_axis,
    plain_text,
)
from convnn.text import show

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_LINES = 8
"""Lines of a picture; of more, evenly spread ones."""


Evaluated = Any
"""An evaluation with the fields of ``convnn.train.moved.Row``, a package above this one."""


def draw_settings(rows: Sequence[Evaluated]) -> Figure | None:
    """Draw accuracy with its interval, and what the neighbours hold, over a setting; None without a point.

    The horizontal axis is the numeric setting with the most values; without one the points stand side by side. Other
    settings make the lines.

    Args:
        rows: the model's own settings first, then points at which all layers moved.
    """
    import matplotlib as mpl

    own, points = rows[0], list(rows[1:])
    if not points:
        return None
    key, places = _horizontal(points)
    lines: dict[str, list[tuple[float, Evaluated]]] = {}
    for place, row in zip(places, points, strict=True):
        rest = " ".join(f"{_short(name)}={value}" for name, value in row.values.items() if name != key and key)
        lines.setdefault(rest, []).append((place, row))
    shown = {name: sorted(lines[name], key=lambda item: item[0]) for name in evenly_spread(list(lines), MAX_LINES)}
    looks = (
        line_styles(list(shown)) if len(shown) > 1 else {name: {"color": "#0072B2", "marker": "o"} for name in shown}
    )
    held = next((name for name in ("mass", "window") if any(getattr(r, name) is not None for r in points)), None)
    with mpl.rc_context(RC_PARAMS):
        figure, panels = new_figure(2 if held else 1)
        entries = {name or "all layers moved": _accuracy(panels[0], line, looks[name]) for name, line in shown.items()}
        entries["the model's own settings"] = _level(panels[0], own)
        panels[0].set_ylabel("test top-1 (%)")
        if held:
            _shares(panels[1], shown, looks, held)
        for axes in panels:
            _label_horizontal(axes, key, places, points)
        add_legend(figure, entries)
    return figure


def draw_layers_alone(rows: Sequence[Evaluated]) -> Figure | None:
    """Draw what accuracy loses when one layer alone moves, over depth, a line a point; None where none moved alone."""
    import matplotlib as mpl

    alone = [row for row in rows if row.depth is not None]
    if not alone:
        return None
    labels = list(dict.fromkeys(row.label for row in alone))
    shown = evenly_spread(labels, MAX_LINES)
    looks = line_styles(shown)
    with mpl.rc_context(RC_PARAMS):
        figure, (axes,) = new_figure(1, width=10.5)
        axes.axhline(0, color=NEUTRAL, linestyle="--", linewidth=1.5)
        entries: dict[str, Any] = {}
        last = max(row.depth or 0 for row in alone)
        for i, label in enumerate(shown):
            line = sorted((row for row in alone if row.label == label), key=lambda row: row.depth or 0)
            shift = 0.5 * (i / max(len(shown) - 1, 1) - 0.5) if len(shown) > 1 else 0.0
            places = [(row.depth or 0) + 0.5 * shift for row in line]
            for place, row in zip(places, line, strict=True):
                axes.plot(
                    [place] * 2, [row.difference_low, row.difference_high], color=looks[label]["color"], alpha=0.6
                )
            entries[label] = axes.plot(places, [row.difference for row in line], **looks[label])[0]
        integer_axis(axes, -0.3, last + 0.3)
        axes.set_xlabel("layer moved alone, first to last")
        axes.set_ylabel("difference of top-1 (points)")
        add_legend(figure, entries)
    return figure


def _short(key: str) -> str:
    return key.rpartition(".")[2]


def _number(text: str | None) -> float:
    try:
        return float(text) if text is not None else math.nan
    except ValueError:
        return math.nan


def _horizontal(points: Sequence[Evaluated]) -> tuple[str | None, list[float]]:
    """Return the numeric setting with the most values and its value at each point; without one their places."""
    keys = list(dict.fromkeys(key for row in points for key in row.values))
    numbers = {key: [_number(row.values.get(key)) for row in points] for key in keys}
    numeric = {key: values for key, values in numbers.items() if all(map(math.isfinite, values))}
    counts = {key: len(set(values)) for key, values in numeric.items()}
    best = max(counts, key=lambda key: counts[key], default=None)
    if best is None or counts[best] < 2:
        return None, [float(i) for i in range(len(points))]
    return best, numeric[best]


def _accuracy(axes: Axes, line: Sequence[tuple[float, Evaluated]], look: Mapping[str, Any]) -> Any:
    for place, row in line:
        axes.plot([place] * 2, [row.top1_low, row.top1_high], color=look["color"], alpha=0.6, solid_capstyle="butt")
    return axes.plot([place for place, _ in line], [row.top1 for _, row in line], **look)[0]


def _level(axes: Axes, own: Evaluated) -> Any:
    axes.axhspan(own.top1_low, own.top1_high, color=NEUTRAL, alpha=0.12, linewidth=0)
    return axes.axhline(own.top1, color=NEUTRAL, linestyle="--")


def _shares(axes: Axes, lines: Mapping[str, Sequence[tuple[float, Evaluated]]], looks: Any, held: str) -> None:
    for name, line in lines.items():
        known = [(place, getattr(row, held)) for place, row in line if getattr(row, held) is not None]
        axes.plot([place for place, _ in known], [value for _, value in known], **looks[name])
    axes.set_ylim(0, 1.04)
    axes.set_ylabel("attention mass of the neighbours" if held == "mass" else "neighbours inside the window")


def _label_horizontal(axes: Axes, key: str | None, places: Sequence[float], points: Sequence[Evaluated]) -> None:
    if key is not None:
        axes.set_xlabel(plain_text(_short(key)))
        values = sorted(set(places))
        number_axis(axes, values)
        if needs_log_scale(values) and len(values) <= MAX_LINES:
            axes.set_xticks(values, [show(value) for value in values])
            axes.minorticks_off()
        return
    width = characters(5.0 / max(len(points), 1), 11)
    axes.set_xticks(list(places), [plain_text(row.label, width, 4) for row in points], fontsize=11)
    axes.set_xlim(-0.5, len(points) - 0.5)
