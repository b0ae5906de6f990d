"""Calling the kernel of selection with tensors: sizes, strides and precision.

Shapes: B batch, H heads, Q queries, N tokens, M candidates, K neighbours, D channels per head, C channels of values.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, library

from convnn.ops.geometry import Geometry
from convnn.ops.neighbors import Neighbors
from convnn.ops.scores import Search, Terms, prepare, whole_range
from convnn.ops.similarity import ALIKE, score_terms
from convnn.ops.triton.dispatch import interpreted


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one, where a kernel is to be launched."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def block_size(size: int, low: int = 1, high: int = 1 << 30) -> int:
    """Return the power of two that holds ``size``, within bounds."""
    return min(max(1 << (size - 1).bit_length(), low), high)


def best_tokens(search: Search) -> Neighbors:
    """Return what ``convnn.ops.selection.rank`` returns for a blend above 0, from the kernel.

    Scores are float32 sums of products of the inputs in their own precision, in which those products are exact for 16
    bits; norms and means are float32. So the order is that of float32, as in the plain path.
    """
    geometry, selection = search.geometry, search.selection
    b, h = search.q.shape[:2]
    terms = prepare(search)
    operands = _operands(terms, selection.similarity)
    share = terms.share if isinstance(terms.share, Tensor) else terms.floor.new_full((), terms.share)
    share = share.to(torch.float32).flatten().expand(b * h).contiguous()
    steps = _steps(terms, geometry, selection.distance)
    numbers = geometry.prefix, geometry.padded_shape[1], geometry.padded_shape[0], geometry.extent, selection.k
    flags = selection.self_first, search.ranged, terms.mixed, selection.distance == "euclidean"
    index, low, high = best_keys(
        *operands, search.queries, search.candidates, share, terms.floor, *steps, *numbers, *flags
    )
    if not search.ranged:
        return Neighbors(index.unflatten(0, (b, h)))
    if selection.similarity == "dot":  # the kernel multiplies the features as they are
        low, high = (t / math.sqrt(operands[0].shape[2]) for t in (low, high))
    low, high = low[..., None], high[..., None]
    low, high = whole_range(low, high, operands[0], terms.own, selection.similarity)
    return Neighbors(index.unflatten(0, (b, h)), None, low.unflatten(0, (b, h)), high.unflatten(0, (b, h)))


# A custom operator, which ``torch.compile`` calls as it is, see ``attention``; what is computed around it fuses with
# the rest of the network.
@library.custom_op("convnn::best_keys", mutates_args=())
def best_keys(
    q: Tensor,
    k: Tensor,
    inverse_q: Tensor | None,
    inverse_k: Tensor | None,
    bias: Tensor | None,
    own: Tensor,
    candidates: Tensor | None,
    share: Tensor,
    floor: Tensor,
    row_steps: Tensor | None,
    column_steps: Tensor | None,
    prefix: int,
    columns: int,
    rows: int,
    extent: int,
    num: int,
    self_first: bool,
    ranged: bool,
    mixed: bool,
    euclidean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ``num`` best of the candidates, (B H, Q, K) int64, and least and largest score, (B H, Q) or empty.

    The arguments are those of ``kernels.topk_kernel``.
    """
    from convnn.ops.triton.kernels import topk_kernel

    items, count, channels = q.shape
    index, low, high = _keys_of(q, floor, num, ranged)
    available = k.shape[1] if candidates is None else len(candidates)
    bq, bm = block_size(count, 16, 32), block_size(available, 16, 64)
    with on_device(q.device):
        topk_kernel[(-(-count // bq) * items,)](
            q, k, inverse_q, inverse_k, bias, own, candidates, share, floor, row_steps, column_steps,
            index, low, high, count, k.shape[1], available, channels, num, prefix, columns, rows, extent, ALIKE,
            BQ=bq, BM=bm, BD=block_size(channels, 16, 32), BK=block_size(num - self_first or 1),
            COSINE=inverse_q is not None, BIASED=bias is not None, LISTED=candidates is not None,
            SELF=int(self_first), RANGED=ranged, MIXED=mixed, EUCLIDEAN=euclidean,
            WIDEN=q.dtype == torch.bfloat16 and interpreted(),
        )  # fmt: skip
    return index, low, high


@best_keys.register_fake
def _(q: Tensor, k: Tensor, inverse_q: Any, inverse_k: Any, bias: Any, own: Tensor, candidates: Any, share: Tensor,
      floor: Tensor, row_steps: Any, column_steps: Any, prefix: int, columns: int, rows: int, extent: int, num: int,
      self_first: bool, ranged: bool, mixed: bool, euclidean: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _keys_of(q, floor, num, ranged)


def _keys_of(q: Tensor, floor: Tensor, num: int, ranged: bool) -> tuple[Tensor, Tensor, Tensor]:
    low, high = (floor.new_empty(q.shape[:2] if ranged else 0) for _ in range(2))
    return q.new_empty(*q.shape[:2], num, dtype=torch.int64), low, high


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
