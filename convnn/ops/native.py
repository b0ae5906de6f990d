"""The k best of each row in one pass on a CPU, compiled by numba where that is installed.

``torch.topk`` leaves ties open, so that they must be looked for and put right; here the rule is kept on the way, and
costs nothing. It runs on one core; ``threads`` gives each core blocks of its own.

Shapes: R rows, M candidates, K neighbours.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

MAX_K = 32
"""Beyond it ``torch.topk`` is faster: what is kept is sorted by insertion."""


@lru_cache(maxsize=1)
def installed() -> bool:
    """Return whether numba is."""
    return find_spec("numba") is not None


def best_of_rows(score: Tensor, k: int) -> Tensor | None:
    """Return the columns of the k largest of each row, larger first, ties to the lower column: (R, M) -> (R, k).

    Args:
        score: on a CPU, float32 or float64.
        k: at most M.

    Returns:
        None where the kernel does not serve: without numba, for no or large k, and for rows with NaN.
    """
    if not installed() or not 0 < k <= MAX_K or score.dtype not in (torch.float32, torch.float64):
        return None
    if score.numel() == 0 or score.amax().isnan():
        return None
    from convnn.ops.native_kernel import best_of_rows as kernel

    found = np.empty((len(score), k), np.int64)
    kernel(score.detach().contiguous().numpy(), found)
    return torch.from_numpy(found)
