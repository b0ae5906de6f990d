"""Triton kernel: the k best tokens of each query from the few best of each bucket, and which queries are in doubt.

Only ``ops.triton`` imports this file, when a kernel is about to run: it needs triton.

Shapes: B batch times heads, Q queries, M candidates, K neighbours, D channels.
Capitals with two letters are block sizes, powers of two: BQ queries, BM candidates, BD channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from convnn.ops.triton.score_kernel import blended, inverse_norms, queries, scores, spread

_INFINITE = tl.constexpr(0x7F800000)
"""Bits of infinity: those of what is no number are above."""
_SPENT = tl.constexpr(-(2**31))
"""Key where a bucket has given away all that it kept."""
_ABSENT = tl.constexpr(1 - 2**31)
"""Key of what is no candidate."""

TURN = tl.constexpr(23)
"""Lanes by which each block of candidates is turned: tokens below or beside one another lie in different buckets."""


@triton.jit
def _kept(key, a, b, c, d, e):
    """Put a key among the largest ones of its bucket, in order."""
    a, key = tl.maximum(a, key), tl.minimum(a, key)
    b, key = tl.maximum(b, key), tl.minimum(b, key)
    c, key = tl.maximum(c, key), tl.minimum(c, key)
    d, key = tl.maximum(d, key), tl.minimum(d, key)
    return a, b, c, d, tl.maximum(e, key)


@triton.jit
def _place(lane, block, BM: tl.constexpr):
    """Return which candidate of all stands in a lane of a block."""
    return block * BM + ((lane + TURN * block) & (BM - 1))


@triton.jit(do_not_specialize=["K"])  # see ``select_kernel``
def bucket_kernel(
    q, k, inverse_k, bias, own, tokens, share, floor, row_steps, column_steps, index, low, high, doubt,
    Q, M, D, K, prefix, columns, rows, extent, alike,
    BQ: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, ONE: tl.constexpr, EVEN: tl.constexpr, BITS: tl.constexpr,
    COSINE: tl.constexpr, BIASED: tl.constexpr, LISTED: tl.constexpr, SELF: tl.constexpr,
    RANGED: tl.constexpr, MIXED: tl.constexpr, EUCLIDEAN: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Write the K best candidates of each query in order, and whether they may be others.

    Scores are computed once, and nothing leaves the registers. A lane of the blocks is a bucket, which keeps its five
    best scores; the best of all are then taken out one by one. The last ``BITS`` bits of a score give way to the number
    of its block, which tells its token. So a query is in doubt where two scores that follow one another differ in those
    bits alone, or where a bucket has given all that it kept, which may be fewer than it had: ``topk_kernel`` then
    decides. So are, for the sake of fewer instructions, queries with neighbours whose score is
    0, infinite, no number or (without a bias) negative: keys compare as integers.

    Args:
        index: output, (B, Q, K) int64.
        doubt: output, (B, Q) int32: not 0 where the neighbours of a query are not certain.
        BITS: of the number of blocks, so many that 2 ** BITS is no less.
        The others are as ``select_kernel`` has them.
    """
    per_item = tl.cdiv(Q, BQ)
    program = tl.program_id(0)
    item = (program // per_item).to(tl.int64)
    row = (program % per_item) * BQ + tl.arange(0, BQ)
    row_ok = row < Q
    own_queries, keys = q + item * Q * D, k + item * M * D
    itself = tl.load(own + row, mask=row_ok, other=-1).to(tl.int32)
    first = queries(own_queries, row, row_ok, tl.arange(0, BD), D, WIDEN) if ONE else None
    inverse_q = tl.zeros((BQ,), tl.float32)
    if COSINE:
        inverse_q = inverse_norms(own_queries, row, row_ok, D, BQ, BD)
    least = tl.zeros((BQ,), tl.float32)
    most, scale, away = least, least, 0.0
    own_row, own_column = itself, itself
    if RANGED:
        lowest = tl.load(floor + item * Q + row, mask=row_ok, other=0.0)
        least, most = spread(own_queries, keys, first, inverse_q, inverse_k, bias, lowest, item, row, row_ok, M, D,
                             alike, BQ, BM, BD, ONE, EVEN, COSINE, BIASED, WIDEN)  # fmt: skip
        tl.store(low + item * Q + row, least, mask=row_ok)
        tl.store(high + item * Q + row, most, mask=row_ok)
    if MIXED:
        features = tl.load(share + item)
        scale, away = tl.div_rn(features, most - least), 1 - features
        own_place = tl.maximum(itself - prefix, 0)
        own_row = own_place // columns
        own_column = own_place % columns

    lane = tl.arange(0, BM)
    a = tl.full((BQ, BM), _ABSENT, tl.int32)
    b, c, d, e = a, a, a, a
    blocks = tl.cdiv(M, BM)
    number: tl.constexpr = (1 << BITS) - 1
    for block in range(0, blocks):
        place = _place(lane, block, BM)
        score = scores(own_queries, keys, first, inverse_q, inverse_k, bias, item, row, row_ok, place, M, D,
                       BQ, BM, BD, ONE, EVEN, COSINE, BIASED, WIDEN)  # fmt: skip
        if MIXED:
            score = blended(score, least, scale, away, row_steps, column_steps, own_row, own_column, place, M,
                            prefix, columns, rows, extent, tokens, LISTED, EUCLIDEAN)  # fmt: skip
            score += away  # no less than 0 now
        key = score.to(tl.int32, bitcast=True)
        if BIASED:
            key = key ^ ((key >> 31) & 0x7FFFFFFF)  # now integers compare as the floats do, negative ones too
        key = (key & ~number) | block
        if not EVEN:
            key = tl.where((place < M)[None, :], key, _ABSENT)
        a, b, c, d, e = _kept(key, a, b, c, d, e)

    out = index + (item * Q + row) * K
    if SELF:
        tl.store(out, itself.to(tl.int64), mask=row_ok)
    placed = tl.full((BQ,), SELF, tl.int32)
    before = tl.full((BQ,), -1, tl.int32)  # of no key: the last bits are 0 in those
    unsure = tl.zeros((BQ,), tl.int32)
    for _ in range(0, K):
        top = tl.max(a, axis=1)
        at = tl.max(tl.where(a == top[:, None], lane[None, :], -1), axis=1)
        cut = top & ~number
        unsure |= ((cut == before) | (top >= _INFINITE) | (cut == 0)).to(tl.int32)
        unsure |= ((cut == ~number) if BIASED else (top < 0)).to(tl.int32)
        before = cut
        token = _place(at, top & number, BM)
        wanted = row_ok & (token < M) & (placed < K)
        if LISTED:
            token = tl.load(tokens + token, mask=wanted, other=0).to(tl.int32)
        if SELF:
            wanted = wanted & (token != itself)
        tl.store(out + placed, token.to(tl.int64), mask=wanted)
        placed += wanted.to(tl.int32)
        given = lane[None, :] == at[:, None]
        a, b, c = tl.where(given, b, a), tl.where(given, c, b), tl.where(given, d, c)
        d, e = tl.where(given, e, d), tl.where(given, _SPENT, e)
    unsure |= ((tl.max(a, axis=1) & ~number) == before).to(tl.int32)
    if blocks > 5:
        unsure |= (tl.min(a, axis=1) == _SPENT).to(tl.int32)
    tl.store(doubt + item * Q + row, unsure, mask=row_ok)
