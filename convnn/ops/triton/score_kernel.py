"""What the Triton kernels of selection share: scores of a block of queries and candidates, their range, their blend.

Only kernels import this file: it needs triton.

Shapes: B batch times heads, Q queries, M candidates, D channels.
Capitals with two letters are block sizes, powers of two: BQ queries, BM candidates, BD channels.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def inverse_norm_kernel(x, inverse, R, D, BR: tl.constexpr, BD: tl.constexpr):
    """Write 1 / length of each row of x, (R, D), in float32; 0 where ``convnn.ops.similarity.unit`` gives zeros."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    total = tl.zeros((BR,), tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        part = tl.load(x + row[:, None] * D + d[None, :], mask=(row < R)[:, None] & (d < D)[None, :], other=0.0)
        part = part.to(tl.float32)
        total += tl.sum(part * part, axis=1)
    length = tl.sqrt_rn(total)
    tl.store(inverse + row, tl.where(length <= 1e-12, 0.0, tl.div_rn(1.0, length)), mask=row < R)


@triton.jit
def queries(q, row, row_ok, d, D, WIDEN: tl.constexpr):
    """Return some channels of a block of queries, (BQ, channels)."""
    a = tl.load(q + row[:, None] * D + d[None, :], mask=row_ok[:, None] & (d < D)[None, :], other=0.0)
    return a.to(tl.float32) if WIDEN else a


@triton.jit
def scores(
    q, k, first, inverse_q, inverse_k, bias, item, row, row_ok, token, M, D,
    BQ: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, ONE: tl.constexpr, EVEN: tl.constexpr,
    COSINE: tl.constexpr, BIASED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Return the scores of a block of queries and candidates of one item, (BQ, BM) float32.

    Args:
        EVEN: every token is a candidate.
    """
    ok = tl.full((BM,), 1, tl.int1) if EVEN else token < M
    score = tl.zeros((BQ, BM), tl.float32)
    if ONE:
        d = tl.arange(0, BD)
        b = tl.load(k + token[None, :] * D + d[:, None], mask=ok[None, :] & (d < D)[:, None], other=0.0)
        score = tl.dot(first, b.to(tl.float32) if WIDEN else b, score, input_precision="ieee")
    else:
        for start in range(0, D, BD):
            d = start + tl.arange(0, BD)
            a = queries(q, row, row_ok, d, D, WIDEN)
            b = tl.load(k + token[None, :] * D + d[:, None], mask=ok[None, :] & (d < D)[:, None], other=0.0)
            score = tl.dot(a, b.to(tl.float32) if WIDEN else b, score, input_precision="ieee")
    if COSINE:
        score *= tl.load(inverse_k + item * M + token, mask=ok, other=0.0)[None, :]
        score *= inverse_q[:, None]
    if BIASED:
        score += tl.load(bias + item * M + token, mask=ok, other=0.0)[None, :]
    return score


@triton.jit
def inverse_norms(q, row, row_ok, D, BQ: tl.constexpr, BD: tl.constexpr):
    """Return 1 / length of a block of queries, (BQ,) float32; 0 where the length counts as none."""
    total = tl.zeros((BQ,), tl.float32)
    for start in range(0, D, BD):
        part = queries(q, row, row_ok, start + tl.arange(0, BD), D, True)
        total += tl.sum(part * part, axis=1)
    length = tl.sqrt_rn(total)
    return tl.where(length <= 1e-12, 0.0, tl.div_rn(1.0, length))


@triton.jit
def spread(
    q, k, first, inverse_q, inverse_k, bias, lowest, item, row, row_ok, M, D, alike,
    BQ: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, ONE: tl.constexpr, EVEN: tl.constexpr,
    COSINE: tl.constexpr, BIASED: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Return the least and the largest score of each query, (BQ,); the largest is infinite where all are alike.

    Args:
        lowest: range that counts as none, (BQ,), see ``convnn.ops.similarity.span``.
        alike: see ``convnn.ops.similarity.ALIKE``.
    """
    bottom = tl.full((BQ, BM), float("inf"), tl.float32)
    ceiling = tl.full((BQ, BM), float("-inf"), tl.float32)
    for start in range(0, M, BM):
        token = start + tl.arange(0, BM)
        score = scores(q, k, first, inverse_q, inverse_k, bias, item, row, row_ok, token, M, D,
                       BQ, BM, BD, ONE, EVEN, COSINE, BIASED, WIDEN)  # fmt: skip
        bottom = tl.minimum(bottom, tl.where((token < M)[None, :], score, float("inf")))
        ceiling = tl.maximum(ceiling, tl.where((token < M)[None, :], score, float("-inf")))
    least, most = tl.min(bottom, axis=1), tl.max(ceiling, axis=1)
    lowest = tl.maximum(lowest, alike * tl.maximum(tl.abs(least), tl.abs(most)))
    return least, tl.where(most - least <= lowest, float("inf"), most)


@triton.jit
def blended(
    score, least, scale, away, row_steps, column_steps, own_row, own_column, token, M, prefix, columns, rows, extent,
    tokens, LISTED: tl.constexpr, EUCLIDEAN: tl.constexpr,
):  # fmt: skip
    """Blend scores with distance, see ``convnn.ops.similarity.blend_scores``."""
    ok = token < M
    if LISTED:
        token = tl.load(tokens + token, mask=ok, other=0).to(tl.int32)
    place = tl.maximum(token - prefix, 0)
    across = tl.load(row_steps + own_row[:, None] * rows + (place // columns)[None, :], mask=ok[None, :], other=0.0)
    along = tl.load(
        column_steps + own_column[:, None] * columns + (place % columns)[None, :], mask=ok[None, :], other=0.0
    )
    if EUCLIDEAN:
        distance = tl.sqrt_rn(across + along)
        distance = tl.div_rn(distance, extent + tl.zeros_like(distance))
    else:  # both are shares of the extent
        distance = tl.maximum(across, along)
    distance = tl.where((token < prefix)[None, :], float("inf"), distance)
    return (score - least[:, None]) * scale[:, None] - away * distance
