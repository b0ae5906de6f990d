"""Scores and the k best of each row, one pass on a CPU, compiled by numba where that is installed.

``torch.topk`` leaves ties open, so that they must be looked for and put right; here the rule is kept on the way, and
costs nothing. It runs on one core; ``threads`` gives each core blocks of its own.

Shapes: R rows; G items (batch times heads), P queries, D channels, M candidates.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from convnn.errors import first_line
from convnn.ops.precision import product

log = logging.getLogger("convnn")

MAX_K = 32
"""Beyond it ``torch.topk`` is faster: what is kept is sorted by insertion."""

FEW_CHANNELS = 6
"""Up to here a plain loop multiplies as fast as a library does."""


@lru_cache(maxsize=1)
def installed() -> bool:
    """Return whether numba is, and works: it needs a NumPy that it knows and a folder for what it compiled."""
    if find_spec("numba") is None:
        return False
    try:
        import convnn.ops.native_kernel  # noqa: F401
    except Exception as error:
        log.warning("numba cannot be used here, plain torch is slower: %s", first_line(error))
        return False
    return True


def best_of_rows(score: Tensor, k: int) -> Tensor | None:
    """Return the columns of the k largest of each row, larger first, ties to the lower column: (R, M) -> (R, k).

    Args:
        score: on a CPU, float32 or float64.
        k: at most M.

    Returns:
        None where the kernel does not serve: without numba, for no or large k, and for rows with NaN.
    """
    if not 0 < k <= MAX_K or not _fits(score) or score.amax().isnan():
        return None
    from convnn.ops.native_kernel import best_of_rows as kernel

    found = np.empty((len(score), k), np.int64)
    kernel(score.detach().contiguous().numpy(), found)
    return torch.from_numpy(found)


@dataclass(frozen=True)
class Ranking:
    """How similarities are ranked, for ``rank_pairs``."""

    k: int
    """Columns to be found of each row, at most M."""
    own: Tensor
    """Column that each query leaves out, or -1, (P,)."""
    share: float | Tensor = 1.0
    """The blend, a number or (G, 1, 1)."""
    distance: Tensor | tuple[Tensor, Tensor] | None = None
    """Share of the map, (P, M), or along its axes, (P, rows) and (P, columns), where the farther counts; None: none."""
    floor: Tensor | None = None
    """Differences that count, (G, P, 1), see ``similarity.span``; None: no range is asked for."""
    alike: float = 0.0
    """As ``similarity.ALIKE``."""


def rank_pairs(
    q: Tensor, keys: Tensor, bias: Tensor | None, ranking: Ranking, first: int = 0
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the columns of each query's k best keys, and the range of its similarities ``q @ keys + bias``.

    Products of at most ``FEW_CHANNELS`` are computed on the way, so that a row of scores never leaves the core's
    nearest cache; those of more are a product of matrices.

    Args:
        q: (G, P, D), for which ``serves`` has been asked.
        keys: (G, D, M).
        bias: (G, 1, M).
        ranking: how.
        first: slots to leave for the caller.

    Returns:
        (G, P, first + k), of which the first slots are 0; the least and the largest, (G, P, 1) or None.
    """
    from convnn.ops import native_kernel

    few, floor = keys.shape[1] <= FEW_CHANNELS, ranking.floor
    if not few:
        score = product(q, keys)
        q, bias = score if bias is None else score.add_(bias), None
    kind, none = q.new_empty(0).numpy().dtype.type, q.new_empty(0, 0)
    low, high = (
        None if floor is None else torch.empty_like(floor, memory_format=torch.contiguous_format) for _ in "lh"
    )
    found = torch.zeros(*q.shape[:2], first + ranking.k, dtype=torch.int64)
    share, distance = ranking.share, ranking.distance
    shares = share.flatten().numpy() if isinstance(share, Tensor) else np.full(len(q), share, kind)
    places = (none, *distance) if isinstance(distance, tuple) else (distance, none, none)
    flat = [none if t is None else t.squeeze(-1) for t in (floor, low, high)]
    limit, least, most = (t.contiguous().numpy() for t in flat)
    away, rows, cols = ((none if t is None else t).contiguous().numpy() for t in places)
    terms = ranking.own.numpy(), shares, away, rows, cols, limit, kind(ranking.alike)
    outcome = least, most, found.numpy(), first
    if few:
        offset = (none if bias is None else bias.squeeze(-2)).contiguous().numpy()
        native_kernel.rank_products(q.contiguous().numpy(), keys.contiguous().numpy(), offset, terms, outcome)
    else:
        native_kernel.rank_scores(q.contiguous().numpy(), terms, outcome)
    return found, low, high


def serves(k: int, q: Tensor, keys: Tensor, bias: Tensor | None) -> bool:
    """Return whether ``rank_pairs`` can rank these: on a CPU with numba, few of them, and no score can become NaN."""
    if not 0 < k <= MAX_K or not _fits(q) or not keys.numel():
        return False
    # A sum of finite products is NaN only where it overflows on the way.
    most = _size(q) * _size(keys) * q.shape[-1] + (0.0 if bias is None else _size(bias))
    return most < torch.finfo(q.dtype).max / 4


def add_rows(table: Tensor, rows: Tensor, values: Tensor) -> None:
    """Add rows (R, C) to those of ``table`` (N, C) that ``rows`` (R,) names, in place, one after another.

    ``index_add_`` does the same, in the same order, at the cost of an operation for each row.
    """
    if not (_fits(table) and table.is_contiguous() and values.dtype == table.dtype):
        table.index_add_(0, rows, values)
        return
    from convnn.ops.native_kernel import add_rows as kernel

    kernel(table.detach().numpy(), rows.contiguous().numpy(), values.detach().contiguous().numpy())


def _size(x: Tensor) -> float:
    """Return the largest absolute value; NaN if there is one."""
    return float(torch.maximum(x.amax(), -x.amin()))


def _fits(x: Tensor) -> bool:
    """Return whether the kernels take a tensor; numba is loaded for one on a CPU alone."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and x.numel() > 0 and installed()
