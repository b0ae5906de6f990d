"""The rows of a trained model at other settings as tables and pictures: spectrum.csv, .md, .png and .svg."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from convnn.figures.moved import draw_layers_alone, draw_settings
from convnn.figures.style import save_figure
from convnn.runs.contents import EVALUATION_LIST
from convnn.runtime.files import write_json
from convnn.runtime.owned import Owner, naming
from convnn.text import aligned, markdown_table, show
from convnn.train.moved import Row
from convnn.train.predictions import csv_text

_FIRST = ("label", "moved")
_SCORES = [f.name for f in fields(Row) if f.name not in ("values", "layers", "depth", *_FIRST)]
_OF_LAYER = ("k", "blend", "temperature", "mass", "window")
_DPI = 80


def axes_of(rows: Sequence[Row]) -> list[str]:
    """Return the keys that the points set, in their order."""
    return list(dict.fromkeys(key for row in rows for key in row.values))


def write_rows(out: Path, rows: Sequence[Row], facts: dict[str, Any]) -> list[Path]:
    """Write the tables and pictures of rows into a folder, all of them or none; return the files.

    ``spectrum.csv`` has a row for the model's own settings and one for each point; ``spectrum_layers.csv`` one for each
    layer of each evaluation, with what its neighbours hold there and that evaluation's scores.

    Args:
        out: the folder.
        rows: as ``evaluate_points`` returns them.
        facts: for scores.json, see ``Trained.facts``.

    Raises:
        ConfigError: if a file would replace one that no evaluation wrote.
        OSError: if the disk refuses.
    """
    keys = axes_of(rows)
    together = [row for row in rows if row.moved in ("none", "all")]
    tables = {"spectrum.csv": _points_table(together, keys), "spectrum_layers.csv": _layers_table(rows, keys)}
    pictures = {"spectrum": draw_settings(together), "spectrum_layers": draw_layers_alone(rows)}
    with Owner("evaluation", EVALUATION_LIST).written_aside(out) as aside:
        for name, (header, lines) in tables.items():
            with naming(aside / name):
                (aside / name).write_bytes(csv_text(header, lines))
        with naming(aside / "spectrum.md"):
            (aside / "spectrum.md").write_text(as_text(rows, markdown=True) + "\n")
        with naming(aside / "scores.json"):
            write_json(aside / "scores.json", facts | {"axes": keys, "points": len(together) - 1})
        for name, figure in pictures.items():
            if figure is not None:
                save_figure(figure, aside / name, dpi=_DPI)
        written = sorted(path.name for path in aside.iterdir())
    return [out / name for name in written]


def _points_table(rows: Sequence[Row], keys: Sequence[str]) -> tuple[list[str], list[list[Any]]]:
    lines = [[row.label, *(row.values.get(key, "") for key in keys), row.moved, *_scores(row)] for row in rows]
    return ["setting", *keys, "moved", *_SCORES], lines


def _layers_table(rows: Sequence[Row], keys: Sequence[str]) -> tuple[list[str], list[list[Any]]]:
    scores = [name for name in _SCORES if name not in ("mass", "window")]
    lines = [
        [
            *(row.label, *(row.values.get(key, "") for key in keys), row.moved, layer),
            *(_cell(held.get(name)) for name in _OF_LAYER),
            *(_cell(getattr(row, name)) for name in scores),
        ]
        for row in rows
        for layer, held in row.layers.items()
    ]
    return ["setting", *keys, "moved", "layer", *_OF_LAYER, *scores], lines


def _scores(row: Row) -> list[Any]:
    return [_cell(getattr(row, name)) for name in _SCORES]


def _cell(value: Any) -> Any:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value


def as_text(rows: Sequence[Row], *, markdown: bool = False) -> str:
    """Return rows as a table, and where layers moved alone a second one of them: a row a layer, a column a point."""
    together = [row for row in rows if row.moved in ("none", "all")]
    optional = {"mass": "mass", "window": "in window", "gflops": "GFLOPs"}
    there = [name for name in optional if any(getattr(row, name) is not None for row in together)]
    header = ["setting", "top-1 %", "95 % interval", "difference", "95 % interval", "agreement %", "loss"]
    header += [*(optional[name] for name in there), "ms/image"]
    lines = [
        [
            *(row.label, f"{row.top1:.2f}", _interval(row.top1_low, row.top1_high, "")),
            *(_signed(row.difference), _interval(row.difference_low, row.difference_high, "+")),
            *(f"{row.agreement:.2f}", f"{row.loss:.4f}"),
            *(show(None if (value := getattr(row, name)) is None else round(value, 4)) for name in there),
            f"{1000 * row.seconds_per_image:.3g}",
        ]
        for row in together
    ]
    text = markdown_table(header, lines) if markdown else aligned(header, lines, right_from=1)
    alone = [row for row in rows if row.moved not in ("none", "all")]
    if not alone:
        return text
    labels, layers = (list(dict.fromkeys(values)) for values in zip(*((r.label, r.moved) for r in alone), strict=True))
    cells = {(row.moved, row.label): row for row in alone}
    header = ["one layer moved", *labels]
    lines = [[layer, *(_with_interval(cells.get((layer, label))) for label in labels)] for layer in layers]
    second = markdown_table(header, lines) if markdown else aligned(header, lines, right_from=1)
    return f"{text}\n\n{second}"


def _signed(value: float | None) -> str:
    return show(None) if value is None else f"{value:+.2f}"


def _interval(low: float | None, high: float | None, sign: str) -> str:
    return show(None) if low is None or high is None else f"[{low:{sign}.2f}, {high:{sign}.2f}]"


def _with_interval(row: Row | None) -> str:
    if row is None:
        return show(None)
    return f"{_signed(row.difference)} {_interval(row.difference_low, row.difference_high, '+')}"
