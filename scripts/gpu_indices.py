"""Neighbours by each kernel beside those of plain torch, for millions of rows: where they differ, is it by rounding?

A row is a query with all tokens of its map as candidates. Both ways rank float32 scores, whose sums they take in orders
of their own, so that scores which lie closer than their rounding may come in either order. Scores in float64 tell
whether that is what happened: at each rank, those of the two tokens are then no further apart than rounding allows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from convnn.errors import first_line
from convnn.ops.geometry import Geometry
from convnn.ops.neighbors import Neighbors
from convnn.ops.scores import Search
from convnn.ops.selection import select_neighbors
from convnn.ops.settings import Selection
from convnn.ops.triton import select

Row = dict[str, Any]
HALF = 2.0**-24
"""Rounding of float32, of a number of size 1."""


@dataclass(frozen=True)
class Case:
    """Features, and how they are compared."""

    similarity: str
    channels: int
    dtype: torch.dtype
    exact: bool = False
    """Products and sums are exact in float32, and equal scores frequent: no row may differ."""

    def draw(self, items: int, tokens: int, generator: torch.Generator, device: torch.device) -> Tensor:
        """Return features, (items, 1, tokens, channels)."""
        size = items, 1, tokens, self.channels
        x = torch.randn(size, generator=generator, device=device)
        return (x.mul(1.5).round() if self.exact else x).clamp_min_(0 if self.exact else -torch.inf).to(self.dtype)


CASES = {
    "ties": Case("dot", 64, torch.bfloat16, exact=True),
    "bfloat16": Case("cosine", 64, torch.bfloat16),
    "float32": Case("cosine", 64, torch.float32),
    "many channels": Case("dot", 128, torch.bfloat16),
}


def compare_indices(plan: Row, folder: Any, write: Callable[[Any, list[Row]], None]) -> list[Row]:
    """Compare each kernel map by map until enough rows are done, or the time is up; rows are written as they come."""
    items, side, wanted = plan["size"]
    case, device = CASES[plan["case"]], torch.device(plan["device"])
    generator = torch.Generator(device).manual_seed(plan["seed"])
    until = time.monotonic() + plan["seconds"]
    selection, geometry = Selection(k=9, similarity=case.similarity), Geometry(side, side)
    rows = [_no_row(f"{plan['case']}, {name}") for name, _kernel, _tiles in select.WAYS]
    done = 0
    while done < wanted and (not done or time.monotonic() < until):
        x = case.draw(items, side * side, generator, device)
        plain = select_neighbors(x, x, geometry, selection, backend="torch").index
        search = Search(x, x, geometry.query_places(device), None, geometry, selection, 1.0, ranged=False)
        for way, row in enumerate(rows):
            if not row["note"]:
                _add(row, x, plain, case, partial(select.best_tokens, search, way))
        done += items * side * side
        write(folder, rows)
    return rows


def _no_row(name: str) -> Row:
    return {"case": name, "rows": 0, "differ": 0, "unexplained": 0, "largest": 0.0, "note": ""}


def _add(row: Row, x: Tensor, plain: Tensor, case: Case, kernel: Callable[[], Neighbors]) -> None:
    try:
        ours = kernel().index
        if x.device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as error:  # what a kernel cannot do here is what is to be found out
        row["note"] = f"{type(error).__name__}: {first_line(error)}"
        return
    differ, far = differences(x, ours, plain, case)
    row["rows"] += plain[..., 0].numel()
    row["differ"] += differ
    row["unexplained"] += int((far > 1).sum())
    row["largest"] = max(row["largest"], float(far.max()) if differ else 0.0)


def differences(x: Tensor, a: Tensor, b: Tensor, case: Case) -> tuple[int, Tensor]:
    """Return how many rows differ, and how far scores of those are apart, in units of what rounding allows.

    Args:
        x: features, (B, 1, N, D), of queries and tokens.
        a: neighbours, (B, 1, N, K).
        b: the same by another way.
        case: how they were compared.

    Returns:
        The number; for each differing row the largest difference at a rank, above 1 where rounding does not explain it.
    """
    item, _, query = (a != b).any(-1).nonzero(as_tuple=True)
    far = [_apart(x, item[some], query[some], a, b, case) for some in torch.arange(len(item)).split(1 << 16)]
    return len(item), torch.cat(far) if far else x.new_zeros(0, dtype=torch.float64)


def _apart(x: Tensor, item: Tensor, query: Tensor, a: Tensor, b: Tensor, case: Case) -> Tensor:
    wide = x[item, 0, query].double()
    scores, sizes = [], []
    for index in (a, b):
        tokens = x[item[:, None], 0, index[item, 0, query]].double()  # (rows, K, D)
        score, size = (tokens @ wide[..., None]).squeeze(-1), wide.norm(dim=-1, keepdim=True) * tokens.norm(dim=-1)
        scores.append(score / size.clamp_min(1e-300) if case.similarity == "cosine" else score)
        sizes.append(torch.ones_like(size) if case.similarity == "cosine" else size)
    if case.exact:
        return x.new_full((len(item),), torch.inf, dtype=torch.float64)
    # A sum of D products is off by D roundings of the norms' product at most, a cosine by some more. A score and the
    # one that stands at its rank in exact order are each off by that, in both ways.
    allowed = 4 * (case.channels + 8) * HALF * torch.maximum(*sizes)
    return ((scores[0] - scores[1]).abs() / allowed).amax(-1)
