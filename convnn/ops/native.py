"""Scores and the k best of each row, one pass on a CPU, compiled by numba where that is installed.

``torch.topk`` leaves ties open, so that they must be looked for and put right; here the rule is kept on the way, and
costs nothing. It runs on one core; ``threads`` gives each core blocks of its own.

Shapes: R rows; G items (batch times heads), P queries, D channels, M candidates.
"""

from __future__ import annotations

import logging
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


def rank_pairs(
    q: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    k: int,
    *,
    own: Tensor,
    share: float | Tensor,
    distance: Tensor | None,
    floor: Tensor | None,
    alike: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the columns of each query's k best keys, and the range of its similarities ``q @ keys + bias``.

    Products of at most ``FEW_CHANNELS`` are computed on the way, so that a row of scores never leaves the core's
    nearest cache; those of more are a product of matrices.

    Args:
        q: (G, P, D), for which ``serves`` has been asked.
        keys: (G, D, M).
        bias: (G, 1, M).
        k: at most M.
        own: column that each query leaves out, or -1, (P,).
        share: the blend, a number or (G, 1, 1).
        distance: share of the map, (P, M); None: nothing to blend.
        floor: of differences that count, (G, P, 1), see ``similarity.span``; None: no range.
        alike: as ``similarity.ALIKE``.

    Returns:
        (G, P, k); the least and the largest, (G, P, 1) or None.
    """
    from convnn.ops import native_kernel

    few = keys.shape[1] <= FEW_CHANNELS
    if not few:
        score = product(q, keys)
        q, bias = score if bias is None else score.add_(bias), None
    kind, none = q.new_empty(0).numpy().dtype.type, q.new_empty(0, 0).numpy()
    low, high = (
        None if floor is None else torch.empty_like(floor, memory_format=torch.contiguous_format) for _ in "lh"
    )
    found = torch.empty(*q.shape[:2], k, dtype=torch.int64)
    shares = share.flatten().numpy() if isinstance(share, Tensor) else np.full(len(q), share, kind)
    flat = [none if t is None else t.squeeze(-1).contiguous().numpy() for t in (floor, low, high)]
    place = none if distance is None else distance.contiguous().numpy()
    rest = (own.numpy(), shares, place, flat[0], kind(alike), flat[1], flat[2], found.numpy())
    if few:
        offset = none if bias is None else bias.squeeze(-2).contiguous().numpy()
        native_kernel.rank_products(q.contiguous().numpy(), keys.contiguous().numpy(), offset, *rest)
    else:
        native_kernel.rank_scores(q.contiguous().numpy(), *rest)
    return found, low, high


def serves(k: int, q: Tensor, keys: Tensor, bias: Tensor | None) -> bool:
    """Return whether ``rank_pairs`` can rank these: on a CPU with numba, few of them, and no score can become NaN."""
    if not 0 < k <= MAX_K or not _fits(q) or not keys.numel():
        return False
    # A sum of finite products is NaN only where it overflows on the way.
    most = _size(q) * _size(keys) * q.shape[-1] + (0.0 if bias is None else _size(bias))
    return most < torch.finfo(q.dtype).max / 4


def _size(x: Tensor) -> float:
    """Return the largest absolute value; NaN if there is one."""
    return float(torch.maximum(x.amax(), -x.amin()))


def _fits(x: Tensor) -> bool:
    return installed() and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and x.numel() > 0
