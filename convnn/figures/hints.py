"""What the points of a figure say: texts at places, for pages that show them where the pointer is. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from convnn.figures.style import evenly_spread
from convnn.text import show

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

MOST_OF_A_LINE = 25
"""Points of a line that say something; of more, evenly spread ones."""


@dataclass(frozen=True)
class Hint:
    """A text at a place of a picture."""

    x: float
    """From the left, as a share of the picture's width."""
    y: float
    """From the top, as a share of its height."""
    text: str


class _Told(NamedTuple):
    x: float | None
    y: float
    text: str
    with_axes: bool


_TOLD: WeakKeyDictionary[Axes, list[_Told]] = WeakKeyDictionary()


def tell(axes: Axes, x: float | None, y: float, text: str) -> None:
    """Let a point say a text.

    Args:
        axes: of the point.
        x: in the axes' data; None: a level, which says it at its right end.
        y: in the axes' data; nothing is told at NaN.
        text: such as ``k=9: 84.50 ± 0.71 (n=2)``.
    """
    _TOLD.setdefault(axes, []).append(_Told(x, y, text, False))


def tell_line(line: Line2D, label: str) -> None:
    """Let the points of a line say its label, and their own numbers with the names of the axes."""
    points = list(zip(*(np.asarray(values, float).tolist() for values in line.get_data()), strict=True))
    axes: Any = line.axes
    if axes is not None:
        told = [_Told(x, y, label, True) for x, y in evenly_spread(points, MOST_OF_A_LINE)]
        _TOLD.setdefault(axes, []).extend(told)


def placed_hints(figure: Figure) -> list[Hint]:
    """Return what the points of a figure say, where its layout, done by saving it, has them."""
    found = []
    for axes in figure.axes:
        right = max(axes.get_xlim())
        for x, y, text, with_axes in _TOLD.get(axes, []):
            if with_axes:
                text = f"{text}, {_name(axes.get_xlabel())} {show(x)}: {_name(axes.get_ylabel())} {y:.4g}"
            place = axes.transData.transform((right if x is None else x, y))
            across, up = map(float, figure.transFigure.inverted().transform(place))
            if math.isfinite(across) and 0 <= across <= 1 and 0 <= up <= 1:
                found.append(Hint(across, 1 - up, text.removeprefix(", ")))
    return found


def _name(label: str) -> str:
    return " ".join(label.replace(r"\$", "$").split())
