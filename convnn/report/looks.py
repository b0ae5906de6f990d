"""How the configurations of a page look: one colour each, in all of its pictures.

The colour says the value of one key, ``Looks.key``; markers and dashes tell apart what differs in the other keys. A
line over the key itself runs through several colours and is grey.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from convnn.figures.style import DASHES, MARKERS, NEUTRAL, evenly_spread, line_styles
from convnn.report.view import Row, View
from convnn.text import is_missing


class Looks:
    """Colours, markers and dashes of the configurations of a page."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.key = self._colour_key()
        self.values = [value for (value,) in view.grouped(view.complete, [self.key])] if self.key else []
        """Of the key, in order."""
        self._colours = {value: style["color"] for value, style in line_styles(self.values).items()}

    def _colour_key(self) -> str | None:
        """Return the key that tells lines apart in the first plot over a number; else the one with the most values."""
        counts = {key: len(self.view.grouped(self.view.complete, [key])) for key in self.view.keys}
        x = next(iter(self.view.x_keys()), None)
        line = self.view.line_key(x) if x else max(counts, key=lambda key: counts[key], default=None)
        return line or x

    def colour(self, row: Mapping[str, Any]) -> Any:
        """Return the colour of a configuration."""
        return NEUTRAL if self.key is None else self._colours.get(_cell(row, self.key), NEUTRAL)

    def of_value(self, key: str | None, value: Any) -> dict[str, Any]:
        """Return the look of a line through all configurations with a value of a key; with no key, of all."""
        if key is None:
            return {"color": NEUTRAL, "marker": MARKERS[0], "linestyle": DASHES[0]}
        values = self.values if key == self.key else [v for (v,) in self.view.grouped(self.view.complete, [key])]
        i = values.index(value) if value in values else 0
        dash = DASHES[0 if key == self.key else i % len(DASHES)]
        marker = MARKERS[i] if len(values) <= len(MARKERS) else MARKERS[0]
        own = self.colour({key: value}) if key == self.key else NEUTRAL
        return {"color": own, "marker": marker, "linestyle": dash}

    def of(self, rows: Sequence[Mapping[str, Any]], *, over: str | None = None) -> list[dict[str, Any]]:
        """Return the looks of configurations in one picture, or of the lines through all that differ in ``over`` alone.

        Markers and dashes are counted among these rows; colours are the page's.
        """
        rest = {one: i for i, one in enumerate(dict.fromkeys(self._rest(row, over) for row in rows))}
        if len(rest) < 2 and self.key not in (None, over):
            return [self.of_value(self.key, _cell(row, self.key or "")) for row in rows]
        places = [rest[self._rest(row, over)] for row in rows]
        colours = [NEUTRAL if self.key == over else self.colour(row) for row in rows]
        return [
            {"color": colour, "marker": MARKERS[i % len(MARKERS)], "linestyle": DASHES[i % len(DASHES)]}
            for colour, i in zip(colours, places, strict=True)
        ]

    def pick(self, rows: Sequence[Row], most: int, *, over: str | None = None) -> list[Row]:
        """Return at most so many configurations, or lines over a key, evenly spread, that are told apart."""
        rest = dict.fromkeys(self._rest(row, over) for row in rows)
        for count in range(min(len(rest), len(DASHES)), 0, -1):
            kept = evenly_spread(list(rest), count)
            chosen = [row for row in rows if self._rest(row, over) in kept]
            if len(chosen) <= most and (count == len(rest) or len(chosen) > count):
                return chosen
        return evenly_spread(rows, most)

    def _rest(self, row: Mapping[str, Any], over: str | None) -> tuple[Any, ...]:
        return tuple(_cell(row, key) for key in self.view.keys if key not in (self.key, over))


def _cell(row: Mapping[str, Any], key: str) -> Any:
    return None if is_missing(row[key]) else row[key]
