"""Which settings the Triton kernels cannot compute. Imports neither torch nor triton.

The functions return None, or why there is no kernel; ``{p}`` stands for the prefix of the keys.
"""

from __future__ import annotations

from convnn.ops.settings import Mixing, Selection

MAX_K = 64
"""Neighbours per query: the best ones so far, and their weights, stay in registers."""
MAX_CHANNELS = 1024
"""Channels per head of queries, keys and values in attention: a row of each stays in registers."""


def selection_limit(selection: Selection) -> str | None:
    """Return why the kernel of similarity and top-k does not serve a selection by features."""
    if selection.candidates in ("window", "stride"):
        return f"{{p}}.candidates={selection.candidates} is not served; use all, random or grid"
    if selection.causal or selection.rank_step > 1:
        name = "causal=true" if selection.causal else f"rank_step={selection.rank_step}"
        return f"{{p}}.{name} is not served"
    for name in ("self_again", "score_step"):
        if getattr(selection, name) is not None:
            return f"{{p}}.{name} is not served; leave it at null"
    return _too_many(selection.k)


def attention_limit(selection: Selection, mixing: Mixing, num: int, learned: bool = False) -> str | None:
    """Return why the kernel of attention to ``num`` neighbours does not serve ``weighting=softmax``."""
    if selection.similarity == "euclidean":
        return "{p}.similarity=euclidean with {p}.weighting=softmax is not served; use dot or cosine"
    if mixing.self_score is not None:
        return "{p}.self_score with {p}.weighting=softmax is not served; leave it at null"
    if mixing.straight_through or learned:
        key = "learn_blend" if learned else "straight_through"
        return f"{{p}}.{key} with {{p}}.weighting=softmax is not served"
    return _too_many(num)


def has_attention_kernel(mixing: Mixing) -> bool:
    """Return whether the mixing is one that there is a kernel for; the others are plain with every backend."""
    return mixing.weighting == "softmax" and mixing.aggregation in ("sum", "depthwise", "separable")


def backend_limit(selection: Selection, mixing: Mixing, *, by_features: bool, learned: bool) -> str | None:
    """Return why ``backend=triton`` cannot serve an operator, whatever its tensors and device are."""
    reason = selection_limit(selection) if by_features else None
    if reason is None and has_attention_kernel(mixing):
        reason = attention_limit(selection, mixing, selection.k, learned)
    return reason


def _too_many(k: int) -> str | None:
    return f"{{p}}.k={k} exceeds {MAX_K}" if k > MAX_K else None
