"""Numbers, cells and tables as text. Imports nothing of ours."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


def is_missing(value: Any) -> bool:
    """Return whether a cell is empty."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or str(value) == "<NA>"


def sort_key(value: Any) -> tuple[int, float, str]:
    """Order numbers before text before nothing."""
    if is_missing(value):
        return (2, 0.0, "")
    return (0, float(value), "") if isinstance(value, (int, float)) else (1, 0.0, str(value))


def show(value: Any) -> str:
    """Return a cell as text."""
    if is_missing(value):
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


class Score(NamedTuple):
    """Mean over runs that differ in their seed alone."""

    mean: float
    """NaN without a run."""
    std: float
    """Sample standard deviation; NaN for fewer than two runs."""
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Score:
        """Return the score of some runs' values."""
        n = len(values)
        return cls(statistics.fmean(values) if n else math.nan, statistics.stdev(values) if n > 1 else math.nan, n)

    def __str__(self) -> str:
        """Return such as ``86.12 ± 0.35 (n=3)``."""
        if not self.n:
            return "–"
        return f"{self.mean:.2f}{f' ± {self.std:.2f}' if self.n > 1 else ''} (n={self.n})"


def duration(seconds: float) -> str:
    """Return a time in words: seconds, minutes or hours."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def size(count: float) -> str:
    """Return a number of bytes in words, in powers of 1000: ``3.6 GB``."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB" if count < 1000 else f"{count:,.0f} TB"


def command_line(command: Sequence[str]) -> str:
    """Return a command as a shell takes it: a script of the checkout is run by uv, an installed program by itself."""
    return ("uv run " if command[0].endswith(".py") else "") + shlex.join(command)


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], *, right_from: int | None = None) -> str:
    """Return a table as text in columns, two spaces apart.

    Args:
        header: names of the columns.
        rows: cells.
        right_from: columns from this one on are aligned to the right; None: none.
    """
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    first_right = len(header) if right_from is None else right_from

    def text(line: Sequence[str]) -> str:
        cells = zip(line, widths, strict=True)
        return "  ".join(c.ljust(w) if i < first_right else c.rjust(w) for i, (c, w) in enumerate(cells)).rstrip()

    return "\n".join(map(text, lines))


def markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], cell: Callable[[str], str] | None = None
) -> str:
    """Return a table in Markdown; ``cell`` escapes a cell, by default its bars alone."""
    escape = cell or (lambda text: text.replace("|", "\\|"))
    lines = [list(map(escape, header)), ["---"] * len(header), *(list(map(escape, row)) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
