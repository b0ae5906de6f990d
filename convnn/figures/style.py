"""What all figures share: colours, markers, panels, axes and legends."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from convnn.text import show

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which differ for colour-blind eyes too, without the yellow that is pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX<>h*p"
DASHES = ("-", "--", ":", "-.")
COLOUR_MAP = "viridis"
RC_PARAMS: Any = {
    "font.size": 14,
    "axes.titlesize": 15,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 2,
    "legend.fontsize": 12,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "convnn",
}


def evenly_spread(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most this many items, evenly spread, the first and the last among them."""
    count = min(len(items), most)
    return [items[round(i * (len(items) - 1) / max(count - 1, 1))] for i in range(count)]


def plain_text(text: str, width: int = 44) -> str:
    """Return text that matplotlib draws as it is, wrapped."""
    text = "".join(c if c.isprintable() else "?" for c in text).replace("$", r"\$")
    return "\n".join(textwrap.wrap(text, width)[:3])


def line_styles(values: Sequence[Any]) -> dict[Any, dict[str, Any]]:
    """Return a colour and a marker for each value; numbers get an ordered scale."""
    import matplotlib as mpl

    ordered = all(isinstance(value, (int, float)) for value in values) or len(values) > len(COLOURS)
    scale = mpl.colormaps[COLOUR_MAP]
    found = {}
    for i, value in enumerate(values):
        colour = scale(0.88 * i / max(len(values) - 1, 1)) if ordered else COLOURS[i]
        found[value] = {"color": colour, "marker": MARKERS[i % len(MARKERS)]}
    return found


def new_figure(panels: int, width: float = 9.6, height: float = 5.4) -> tuple[Figure, list[Axes]]:
    """Return a figure of one panel of this size (in inches), or of several in two columns, and its panels."""
    from matplotlib.figure import Figure

    columns = 1 if panels == 1 else 2
    rows = -(-panels // columns)
    size = (width, height) if panels == 1 else (13.5, 1 + 4.4 * rows)
    figure = Figure(figsize=size)
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for extra in axes[panels:]:
        extra.set_visible(False)
    return figure, axes[:panels]


def add_legend(figure: Figure, entries: dict[str, Any], title: str | None) -> None:
    """Put a legend below all panels, and make the figure higher by as much."""
    labels = [plain_text(label, 60) for label in entries]
    longest = max(len(line) for label in labels for line in label.split("\n"))
    columns = max(1, min(len(labels), int(figure.get_figwidth() * 10.5) // (longest + 10)))
    figure.set_figheight(figure.get_figheight() + 0.27 * (-(-len(labels) // columns) + (title is not None)))
    figure.legend(entries.values(), labels, title=title, loc="outside lower center", ncols=columns)


def needs_log_scale(values: Sequence[float]) -> bool:
    """Return whether numbers span so much that they need a logarithmic scale."""
    return min(values) > 0 and max(values) / min(values) >= 30


def colour_scale(values: Sequence[float]) -> Any:
    """Return matplotlib's norm for numbers shown as colours."""
    from matplotlib.colors import LogNorm, Normalize

    return (LogNorm if needs_log_scale(values) else Normalize)(min(values), max(values))


def number_axis(axes: Axes, values: Sequence[float]) -> None:
    """Use a logarithmic axis for numbers that span much, and ticks at the values where they are few."""
    if needs_log_scale(values):
        axes.set_xscale("log")
    elif len(values) <= 11:
        gap = min((b - a for a, b in itertools.pairwise(values)), default=0)
        if gap >= (values[-1] - values[0]) / 16:
            axes.set_xticks(values, [show(value) for value in values])
