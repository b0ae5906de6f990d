"""Calling the kernels with tensors: sizes, strides and precision.

Shapes: B batch, H heads, Q queries, N tokens, M candidates, K neighbours, D channels per head, C channels of values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from convnn.ops.geometry import Geometry
from convnn.ops.neighbors import Neighbors
from convnn.ops.scores import Search, Terms, prepare, whole_range
from convnn.ops.similarity import ALIKE, score_terms, unit
from convnn.ops.triton.attention import attend, on_device
from convnn.ops.triton.dispatch import interpreted


def _block(size: int, low: int = 1, high: int = 1 << 30) -> int:
    """Return the power of two that holds ``size``, within bounds."""
    return min(max(1 << (size - 1).bit_length(), low), high)


def best_tokens(search: Search) -> Neighbors:
    """Return what ``convnn.ops.selection.rank`` returns for a blend above 0, from the kernel.

    Scores are float32 sums of products of the inputs in their own precision, in which those products are exact for 16
    bits; norms and means are float32. So the order is that of float32, as in the plain path.
    """
    from convnn.ops.triton.kernels import topk_kernel

    geometry, selection, candidates = search.geometry, search.selection, search.candidates
    b, h, count, _ = search.q.shape
    terms = prepare(search)
    operands = _operands(terms, selection.similarity)
    device = search.q.device
    index = torch.empty(b * h, count, selection.k, dtype=torch.int64, device=device)
    low, high = (terms.floor.new_empty(b * h, count) for _ in range(2)) if search.ranged else (None, None)
    available = search.k.shape[2] if candidates is None else len(candidates)
    own_first = int(selection.self_first)
    channels, (rows, columns) = operands[0].shape[2], geometry.padded_shape
    share = torch.as_tensor(terms.share, dtype=torch.float32, device=device).flatten().expand(b * h).contiguous()
    bq, bm = _block(count, 16, 32), _block(available, 16, 64)
    with on_device(device):
        topk_kernel[(-(-count // bq) * b * h,)](
            *operands, search.queries, candidates, share, terms.floor, *_steps(terms, geometry, selection.distance),
            index, low, high, count, search.k.shape[2], available, channels, selection.k, geometry.prefix,
            columns, rows, geometry.extent, ALIKE,
            BQ=bq, BM=bm, BD=_block(channels, 16, 32), BK=_block(selection.k - own_first or 1),
            COSINE=operands[2] is not None, BIASED=operands[4] is not None, LISTED=candidates is not None,
            SELF=own_first, RANGED=search.ranged, MIXED=terms.mixed, EUCLIDEAN=selection.distance == "euclidean",
            WIDEN=operands[0].dtype == torch.bfloat16 and interpreted(),
        )  # fmt: skip
    if low is not None and high is not None:
        if selection.similarity == "dot":  # the kernel multiplies the features as they are
            low, high = (t / math.sqrt(channels) for t in (low, high))
        low, high = low[..., None], high[..., None]
        low, high = whole_range(low, high, operands[0], terms.own, selection.similarity)
        low, high = low.unflatten(0, (b, h)), high.unflatten(0, (b, h))
    return Neighbors(index.unflatten(0, (b, h)), None, low, high)


def _operands(terms: Terms, similarity: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return queries and keys as the kernel multiplies them, their inverse norms and the bias of the keys."""
    q, k, bias = terms.q, terms.k, None
    if similarity == "euclidean":
        q, k, bias = score_terms(q.float(), k.float(), similarity)
    dtype = torch.promote_types(q.dtype, k.dtype)
    q, k = q.to(dtype).contiguous(), k.to(dtype).contiguous()
    inverse_q, inverse_k = (_inverse_norm(x) for x in (q, k)) if similarity == "cosine" else (None, None)
    return q, k, inverse_q, inverse_k, bias


def _steps(terms: Terms, geometry: Geometry, distance: str) -> list[Tensor | None]:
    """Return the distances between rows and between columns of the grid, where position is mixed in."""
    if not terms.mixed:
        return [None, None]
    axes = [torch.arange(side, device=terms.q.device) for side in geometry.padded_shape]
    tables = [geometry.steps(axis, line[:, None], line).contiguous() for axis, line in enumerate(axes)]
    # Squared here: in the kernel a product and a sum may round once, and swapped offsets would no longer tie.
    return [t.square() if distance == "euclidean" else t for t in tables]


def _inverse_norm(x: Tensor) -> Tensor:
    """Return 1 / length along the last axis in float32, 0 where ``convnn.ops.similarity.unit`` gives zeros."""
    norm = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    return norm.masked_fill(norm <= 1e-12, torch.inf).reciprocal()


def attend_to_neighbors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    valid: Tensor | None,
    weight: Tensor | None,
    *,
    similarity: str,
    temperature: float | Tensor,
    ordered: bool = False,
) -> Tensor:
    """Return ``sum_r softmax_r(s / temperature) w_r v_r`` over the neighbours r of each query, s their similarity.

    Nothing of size (Q, K, D) exists, forward or backward. Softmax and sums are float32. The gradient of k, v and the
    weights is added up atomically, in no fixed order on a GPU, unless ``ordered`` or torch's deterministic algorithms
    ask for one; it cannot be differentiated again.

    Args:
        q: (B, H, Q, D).
        k: (B, H, N, D).
        v: (B, H, N, C).
        index: (B or 1, H or 1, Q, K) int64.
        valid: False for neighbours that do not count, shaped as ``index``, or None.
        weight: of each channel and rank, (C, at least K), or None for ones.
        similarity: ``dot`` or ``cosine``.
        temperature: divides the similarity; a number, or a tensor () that may change without a new compilation.
        ordered: sum every gradient in one order, along the inverted neighbour graph.

    Returns:
        (B, H, Q, C), of the precision of v and the weights.
    """
    scale = 1.0 if isinstance(temperature, Tensor) else 1 / temperature
    if similarity == "cosine":
        q, k = unit(q.float()), unit(k.float())
    else:
        scale /= math.sqrt(q.shape[-1])
    if weight is not None:
        weight = weight[:, : index.shape[-1]]
    divisor = temperature.to(q.device, torch.float32) if isinstance(temperature, Tensor) else None
    return attend(q, k, v, index, valid, weight, divisor, scale, ordered)[0]
