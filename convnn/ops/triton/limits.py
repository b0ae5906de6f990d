"""Which settings the Triton kernels cannot compute. Imports neither torch nor triton.

The functions take the settings of an operator by name and return None, or why there is no kernel for them; ``{p}``
stands for the prefix of the keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MAX_K = 64
"""Neighbours per query: the best ones so far, and their weights, stay in registers."""

MAX_CHANNELS = 1024
"""Channels per head of queries, keys and values in attention: a row of each stays in registers."""


def selection_limit(o: Mapping[str, Any]) -> str | None:
    """Return why the kernel of similarity and top-k does not serve a selection by features."""
    if o["candidates"] in ("window", "stride"):
        return f"{{p}}.candidates={o['candidates']} is not served; use all, random or grid"
    return _too_many(o)


def attention_limit(o: Mapping[str, Any]) -> str | None:
    """Return why the kernel of attention to the neighbours does not serve ``weighting=softmax``."""
    if o["similarity"] == "euclidean":
        return "{p}.similarity=euclidean with {p}.weighting=softmax is not served; use dot or cosine"
    if o["straight_through"] or o["learn_blend"] != "no":
        key = "straight_through" if o["learn_blend"] == "no" else "learn_blend"
        return f"{{p}}.{key} with {{p}}.weighting=softmax is not served"
    return _too_many(o)


def has_attention_kernel(o: Mapping[str, Any]) -> bool:
    """Return whether the mixing is one that there is a kernel for; the others are plain with every backend."""
    return o["weighting"] == "softmax" and o["aggregation"] in ("sum", "depthwise", "separable")


def backend_limit(o: Mapping[str, Any]) -> str | None:
    """Return why ``backend=triton`` cannot serve an operator, whatever its tensors and device are."""
    reason = selection_limit(o) if o["blend"] > 0 or o["learn_blend"] != "no" else None
    if reason is None and has_attention_kernel(o):
        reason = attention_limit(o)
    return reason


def _too_many(o: Mapping[str, Any]) -> str | None:
    return f"{{p}}.k={o['k']} exceeds {MAX_K}" if o["k"] > MAX_K else None
