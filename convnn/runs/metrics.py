"""The rows of metrics.jsonl: what they hold, reading them, showing them. Imports no torch."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

MEASURES = {
    "overlap": "neighbours inside the convolution window",
    "distance_mean": "mean distance to a neighbour, as a share of the map's longer side",
    "distance_q10": "distance that a tenth of the neighbours stay below",
    "distance_q50": "median distance to a neighbour",
    "distance_q90": "distance that nine tenths of the neighbours stay below",
    "entropy": "entropy of the weights, 1: all neighbours weigh the same",
    "hub_skewness": "skewness of how often a token is chosen",
    "hub_share": "queries that choose the most chosen token",
    "padding": "neighbours that are padding",
    "prefix": "neighbours that are CLS or other prefix tokens",
    "agreement": "neighbours that the same query chose at the measurement before",
}
"""Shares lie in [0, 1]; null: not defined (``entropy`` of equal weights, the first ``agreement``)."""

PANEL_TITLES = {
    "blend": "blend\n(0: by position, 1: by features)",
    "overlap": "neighbours in the\nconvolution window",
    "distance_mean": "mean distance to a neighbour\n(share of the map's side)",
    "hub_share": "queries that choose\nthe most chosen token",
    "entropy": "evenness of the weights\n(entropy, 1: all equal)",
    "outside": "neighbours that are\npadding or CLS",
    "agreement": "neighbours kept since\nthe epoch before",
}
"""What the pictures show, and its title; ``outside`` is ``padding`` and ``prefix`` together."""


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value is a finite number."""
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl up to the first damaged one, which has no ``epoch``; none without the file.

    A kill may have torn the last line; a disk may have spoilt any.
    """
    rows: list[dict[str, Any]] = []
    try:
        for line in path.read_text(errors="replace").splitlines():
            row = json.loads(line)
            if not isinstance(row, dict) or not is_number(row.get("epoch")):
                break
            rows.append(row)
    except (OSError, ValueError, RecursionError):
        pass
    return rows


def epochs_done(path: Path) -> int | None:
    """Return how many epochs a metrics.jsonl has, from its last 64 KiB alone; None if that cannot be told."""
    try:
        with path.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 2**16, 0))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            return int(json.loads(line)["epoch"]) + 1
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    return None


def json_line(row: Mapping[str, Any]) -> str:
    """Return a row as a line of JSON, which has no NaN: the loss of an epoch whose steps were all skipped is null."""
    whole = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(whole) + "\n"


def describe_row(row: Mapping[str, Any], epochs: int, *, moving: bool) -> str:
    """Return the line of an epoch; with the range of the layers' blends where a schedule is moving them."""
    text = f"epoch {row['epoch'] + 1:>3}/{epochs}  train loss {row['train_loss']:.4f}"
    if row["train_top1"] is not None:
        text += f" top1 {row['train_top1']:.2f}"
    for name in ("val", "test"):
        if f"{name}_loss" in row:
            text += f"  {name} loss {row[f'{name}_loss']:.4f} top1 {row[f'{name}_top1']:.2f}"
    blends = [layer["blend"] for layer in row["layers"] if "blend" in layer]
    if blends and moving:
        text += f"  blend {min(blends):.2f}..{max(blends):.2f}"
    return f"{text}  {row['train_seconds']:.1f} s"
