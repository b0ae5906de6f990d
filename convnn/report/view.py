"""What plots have of a summary: its rows with a score, and which key goes where."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from convnn.report.tables import (
    describe,
    is_numeric,
    main_keys,
    name_moving,
    name_places,
    ordered,
    score_of,
    values_of,
)
from convnn.runs.metrics import is_number
from convnn.text import is_missing, show

if TYPE_CHECKING:
    import pandas as pd

MAX_LINES, MAX_PANELS, MAX_DOTS, MAX_CELLS = 12, 6, 40, 30
BLEND, RATIO, K = "operator.blend", "operator.branch_ratio", "operator.k"
Row = dict[str, Any]


class View:
    """A summary's rows that have a score, and the keys to show them by."""

    def __init__(self, summary: pd.DataFrame, metric: str) -> None:
        self.metric = metric
        self.keys = main_keys(summary)
        self.numbers = [key for key in self.keys if is_numeric(summary, key)]
        self.numbers.sort(key=lambda key: -len(values_of(summary, key)))
        self.places = name_places(summary)
        self.complete: list[Row] = [name_moving(row) for row in summary.to_dict("records") if row["n"]]
        """All configurations with a complete run, whether or not it has the metric."""
        self.rows = [row for row in self.complete if not is_missing(row.get(f"{metric}_mean"))]

    def grouped(self, rows: Iterable[Row], keys: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
        """Return the rows of each combination of some keys' values: names in their order, the rest sorted."""
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in rows:
            groups.setdefault(tuple(None if is_missing(row[k]) else row[k] for k in keys), []).append(row)
        return dict(sorted(groups.items(), key=lambda item: ordered(self.places, keys, item[0])))

    def rows_at(self, key: str) -> list[Row]:
        """Return the rows that have a number at a key, one that nothing moves."""
        return [row for row in self.rows if is_number(row[key])]

    def x_keys(self) -> list[str]:
        """Return the keys to draw accuracy over."""
        return [key for key in (BLEND, RATIO) if key in self.numbers] or self.numbers[:1]

    def line_key(self, x: str) -> str | None:
        """Return the key that tells lines apart when ``x`` is drawn over."""
        counts = {key: len(self.grouped(self.rows, [key])) for key in self.keys if key != x}
        fit = [key for key, count in counts.items() if count > 1]
        order = sorted(fit, key=lambda key: (key != K, key != BLEND, key not in self.numbers, -counts[key]))
        return order[0] if order else None

    def mean(self, row: Row) -> float:
        """Return a row's mean."""
        return row[f"{self.metric}_mean"]

    def std(self, row: Row) -> float:
        """Return a row's standard deviation, NaN for a single run."""
        return row[f"{self.metric}_std"]

    def told(self, row: Row, cost: str | None = None) -> str:
        """Return what a point of a picture says of a row: its keys, its score and, with ``cost``, what that is."""
        more = f", {show(float(f'{row[cost]:.4g}'))} {cost}" if cost else ""
        return f"{describe({key: row[key] for key in self.keys})}: {score_of(row, self.metric)}{more}"

    def caption(self, mark: str) -> str:
        """Say what a point is, and what its ``mark``, a bar or a band, shows."""
        counts = sorted({int(row[f"{self.metric}_n"]) for row in self.rows})
        if counts[-1:] == [1]:
            return "Each point is one run."
        span = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        none = f", no {mark} where there is one run" if counts[0] == 1 else ""
        return f"Mean over seeds ({span} a point); {mark}: ± one sample standard deviation{none}."
