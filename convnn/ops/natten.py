"""Neighbourhood attention with a window that stays inside the map, by NATTEN (arXiv 2204.07143) where it is installed.

NATTEN is no dependency: its kernels are built for one version of torch and CUDA (https://natten.org).

Shapes: B batch, H heads, N tokens, D channels per head.
"""

from __future__ import annotations

import math
from functools import lru_cache
from importlib.util import find_spec

from torch import Tensor

from convnn.ops.geometry import Geometry
from convnn.ops.settings import Mixing, Selection
from convnn.ops.similarity import unit


@lru_cache
def installed() -> bool:
    """Return whether NATTEN is."""
    return find_spec("natten") is not None


def serves(
    geometry: Geometry, selection: Selection, mixing: Mixing, blend: float | Tensor, channels: tuple[int, int]
) -> bool:
    """Return whether the settings choose NATTEN's window and weigh it by softmax.

    Args:
        geometry: without prefix tokens, padding or stride, and large enough for a whole window.
        selection: of the nearest positions, as many as the window holds.
        mixing: by softmax, without slot weights.
        blend: 0, that is by position.
        channels: of keys and values, which have to be as many.
    """
    margin, d, shape = geometry.margin[0], geometry.dilation[0], geometry.padded_shape
    plain = not any((*geometry.padding, *geometry.extra, geometry.prefix)) and geometry.queries is None
    square = margin > 0 and geometry.margin == (margin, margin) and geometry.dilation == (d, d)
    ones = geometry.stride == (1, 1) and channels[0] == channels[1] and selection.rank_step == 1
    positions = isinstance(blend, float) and blend == 0 and selection.distance == "chebyshev"
    chosen = selection.candidates == "all" and not selection.causal and selection.self_again is None
    softmax = mixing.weighting == "softmax" and mixing.aggregation == "sum" and mixing.self_score is None
    fits = selection.k == (2 * margin + 1) ** 2 and min(shape) >= (2 * margin + 1) * d
    similar = selection.similarity in ("dot", "cosine") and not mixing.straight_through
    return plain and square and ones and positions and chosen and softmax and fits and similar and installed()


def attend(q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, similarity: str, temperature: float | Tensor) -> Tensor:
    """Attend to the window of each query: (B, H, N, D) three times -> (B, H, N, D)."""
    from natten.functional import na2d

    if similarity == "cosine":
        q, k = unit(q), unit(k)
    else:
        temperature = temperature * math.sqrt(q.shape[-1])
    if isinstance(temperature, Tensor):
        q, temperature = q / temperature.to(q), 1.0
    maps = (x.transpose(1, 2).unflatten(1, geometry.padded_shape).contiguous() for x in (q, k, v))
    side = 2 * geometry.margin[0] + 1
    y = na2d(*maps, kernel_size=side, dilation=geometry.dilation[0], scale=1 / temperature)
    return y.flatten(1, 2).transpose(1, 2)
