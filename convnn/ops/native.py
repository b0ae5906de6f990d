"""Blends and the k best of each row, one pass each on a CPU, compiled by numba where that is installed.

``torch.topk`` leaves ties open, so that they must be looked for and put right; here the rule is kept on the way, and
costs nothing. It runs on one core; ``threads`` gives each core blocks of its own.

Shapes: R rows, M candidates, K neighbours.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from convnn.errors import first_line

log = logging.getLogger("convnn")

MAX_K = 32
"""Beyond it ``torch.topk`` is faster: what is kept is sorted by insertion."""


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
    if not 0 < k <= MAX_K or not _serves(score):
        return None
    from convnn.ops.native_kernel import best_of_rows as kernel

    found = np.empty((len(score), k), np.int64)
    kernel(score.detach().contiguous().numpy(), found)
    return torch.from_numpy(found)


def blend_rows(
    score: Tensor, offset: Tensor, share: float, floor: Tensor, alike: float
) -> tuple[Tensor, Tensor] | None:
    """Blend similarities with positions in place; return each row's least and largest similarity.

    Args:
        score: similarities (items, P, M), contiguous.
        offset: what position takes off, (P, M).
        share: of the features.
        floor: of differences that count, (items, P, 1); see ``similarity.span``.
        alike: as ``similarity.ALIKE``.

    Returns:
        (items, P, 1) twice; None where the kernel does not serve: ``score`` is then as it was.
    """
    if not score.is_contiguous() or not _serves(score):
        return None
    from convnn.ops.native_kernel import blend_rows as kernel

    low, high = (torch.empty(floor.shape, dtype=floor.dtype) for _ in range(2))
    rows, kind = score.view(-1, score.shape[-1]).numpy(), score.numpy().dtype.type
    flat = [t.contiguous().view(-1).numpy() for t in (floor, low, high)]
    kernel(rows, offset.contiguous().numpy(), kind(share), flat[0], kind(alike), *flat[1:])
    return low, high


def _serves(score: Tensor) -> bool:
    if not installed() or score.device.type != "cpu" or score.dtype not in (torch.float32, torch.float64):
        return False
    return score.numel() > 0 and not score.amax().isnan()
