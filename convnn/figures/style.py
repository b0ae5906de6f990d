"""What all figures share: colours, markers, panels, axes and legends."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convnn.runtime.owned import naming
from convnn.text import show

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which differ for colour-blind eyes too, without the yellow that is pale on white; behind
# them some of Paul Tol's.
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"),
    *("#882255", "#999933", "#332288", "#BBBBBB", "#661100"),
)
MARKERS = "osD^vPX<>h*p"
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (7, 2, 1, 2, 1, 2)), (0, (9, 3)))
COLOUR_MAP = "viridis"
NEUTRAL = "#444444"
"""Of what stands for no single one of the things that the colours of a page tell apart."""
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


def plain_text(text: str, width: int = 44, lines: int = 3) -> str:
    """Return text that matplotlib draws as it is, wrapped; what is more than these lines is left out."""
    text = "".join(c if c.isprintable() else "?" for c in " ".join(text.split())).replace("$", r"\$")
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" ..."))


def characters(inches: float, size: float) -> int:
    """Return how many characters of a font of ``size`` points surely fit into a width."""
    return max(int(inches * 72 / (0.62 * size)), 8)


def add_title(figure: Figure, text: str, size: float = 16) -> None:
    """Put a title above all panels, wrapped to the figure's width, and make the figure higher by the further lines."""
    title = plain_text(text, characters(figure.get_figwidth() - 0.2, size))
    figure.set_figheight(figure.get_figheight() + title.count("\n") * size * 1.25 / 72)
    figure.suptitle(title, fontsize=size)


def save_figure(figure: Figure, path: Path, dpi: float) -> tuple[Path, Path]:
    """Write a figure as PNG and SVG of one layout; return both files.

    ``Figure.savefig`` would lay out and draw each of them twice, which is most of the time that small pictures take.

    Args:
        figure: not used afterwards.
        path: without a suffix.
        dpi: of the PNG.

    Raises:
        OSError: as of ``naming``, if a file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    png, svg = path.with_name(f"{path.name}.png"), path.with_name(f"{path.name}.svg")
    figure.dpi = dpi
    with naming(png):
        FigureCanvasAgg(figure).print_png(png)
    figure.set_layout_engine("none")
    with naming(svg):
        FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None})
    return png, svg


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


def add_legend(figure: Figure, entries: Mapping[str, Any], title: str | None = None, size: float = 12) -> None:
    """Put a legend below all panels, no wider than the figure, and make the figure higher by as much."""
    mark = 8  # characters that a line or a marker, and the gaps beside it, take: 4.8 of the font's size
    room = characters(figure.get_figwidth() - 0.4, size)
    labels = [plain_text(label, min(60, room - mark)) for label in entries]
    longest = max(len(line) for label in labels for line in label.split("\n"))
    columns = max(1, min(len(labels), room // (longest + mark)))
    rows = -(-len(labels) // columns)
    lines = max(sum(labels[i].count("\n") + 1 for i in range(j * rows, min((j + 1) * rows, len(labels))))
                for j in range(columns))  # fmt: skip
    figure.set_figheight(figure.get_figheight() + 0.0225 * size * (lines + (title is not None)))
    title = title and plain_text(title, room)
    figure.legend(list(entries.values()), labels, title=title, loc="outside lower center", ncols=columns, fontsize=size)


def needs_log_scale(values: Sequence[float]) -> bool:
    """Return whether numbers span so much that they need a logarithmic scale."""
    return min(values) > 0 and max(values) / min(values) >= 30


def axis_from_zero(axes: Axes) -> None:
    """Let the vertical axis begin at 0, and draw markers whole where they stand on it."""
    axes.set_ylim(bottom=0)
    for line in axes.lines:
        line.set_clip_on(False)


def integer_axis(axes: Axes, first: float, last: float) -> None:
    """Let the horizontal axis show counts from ``first`` to ``last``, with ticks at integers alone, be it one."""
    from matplotlib.ticker import MaxNLocator

    margin = max(0.04 * (last - first), 0.1 if last > first else 0.5)
    axes.set_xlim(first - margin, last + margin)
    if last > first:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    else:
        axes.set_xticks([first])


def number_axis(axes: Axes, values: Sequence[float]) -> None:
    """Use a logarithmic axis for numbers that span much, and ticks at the values where they are few."""
    if needs_log_scale(values):
        axes.set_xscale("log")
    elif len(values) <= 11:
        gap = min((b - a for a, b in itertools.pairwise(values)), default=0)
        if gap >= (values[-1] - values[0]) / 16:
            axes.set_xticks(values, [show(value) for value in values])
