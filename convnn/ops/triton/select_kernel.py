"""Triton kernel: the k best tokens of each query by a bound, a filter and a short sort.

Only ``ops.triton`` imports this file, when a kernel is about to run: it needs triton.

Shapes: B batch times heads, Q queries, M candidates, K neighbours, D channels.
Capitals with two letters are block sizes, powers of two: BQ queries, BM candidates, BD channels, NB buckets; LIST is
the room for survivors of a query.
"""

from __future__ import annotations

import triton
import triton.language as tl

from convnn.ops.triton.score_kernel import blended, inverse_norms, queries, scores, spread

_EMPTY = tl.constexpr(-(2**63))
"""Key of an empty slot: below every key that a score can have."""


@triton.jit
def _above(x):
    """Return the next larger float32."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(x > 0.0, bits + 1, tl.where(x < 0.0, bits - 1, 1))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _hold(hit, score, token, counts, held, BQ: tl.constexpr, BM: tl.constexpr, LIST: tl.constexpr, PTX: tl.constexpr):
    """Add the candidates ``hit`` to the survivors of their queries: a score and a token are one int64.

    Args:
        hit: (BQ, BM).
        score: (BQ, BM) float32.
        token: (BQ, BM) int32.
        counts: where each query counts its survivors, (BQ, 1).
        held: where they are held, (BQ, 1).
        PTX: write it as such. Triton would bring every operand of a store into another layout first.
    """
    if PTX:
        # All places are asked for before the first is needed: the answers come together.
        place = tl.inline_asm_elementwise(
            """{
            .reg .pred wanted;
            setp.ne.s32 wanted, $1, 0;
            mov.u32 $0, $3;
            @wanted atom.relaxed.cta.global.add.u32 $0, [$2], 1;
            }""",
            "=r,r,l,n",
            [hit.to(tl.int32), counts.to(tl.int64), LIST],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
        tl.inline_asm_elementwise(
            """{
            .reg .pred wanted;
            .reg .u64 where;
            setp.lt.u32 wanted, $1, $5;
            mad.wide.u32 where, $1, 8, $2;
            @wanted st.global.v2.b32 [where], {$4, $3};
            mov.u32 $0, $1;
            }""",
            "=r,r,l,r,r,n",
            [place, held.to(tl.int64), score.to(tl.int32, bitcast=True), token, LIST],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        place = tl.atomic_add(counts + tl.zeros((BQ, BM), tl.int32), 1, mask=hit, sem="relaxed", scope="cta")
        bits = score.to(tl.int32, bitcast=True).to(tl.int64)
        tl.store(held + place, (bits << 32) | token, mask=hit & (place < LIST))


@triton.jit
def _ordered(held, line, tokens, found, LIST: tl.constexpr, LISTED: tl.constexpr):
    """Return the survivors as keys whose order is that of scores, ties to the lower token, and their tokens."""
    slot = tl.arange(0, LIST)
    there = slot[None, :] < found[:, None]
    both = tl.load(held + line[:, None] * LIST + slot[None, :], mask=there, other=0)
    score, token = (both >> 32).to(tl.int32).to(tl.float32, bitcast=True), both.to(tl.int32)
    if LISTED:
        token = tl.load(tokens + token, mask=there, other=0).to(tl.int32)
    score = tl.where(score == 0.0, 0.0, score)  # -0.0 equals 0.0
    bits = score.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # now integers compare as the floats do
    return tl.where(there, (bits.to(tl.int64) << 32) | (0x7FFFFFFF - token), _EMPTY), token


@triton.jit
def _raised(bound, key, crowded, K):
    """Return the K-th best score of the survivors that are held as the bound, where there were more than fit."""
    last = bound
    for _ in range(0, K):
        top = tl.max(key, axis=1)
        bits = (top >> 32).to(tl.int32)
        last = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        key = tl.where(key == top[:, None], _EMPTY, key)
    return tl.where(crowded, last, bound)


@triton.jit(do_not_specialize=["K"])  # as a constant 1 it makes loops that some layouts cannot compile
def select_kernel(
    q, k, inverse_k, bias, own, tokens, share, floor, row_steps, column_steps, index, low, high,
    held, counts,
    Q, M, D, K, blocks, prefix, columns, rows, extent, alike,
    BQ: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, NB: tl.constexpr, ONE: tl.constexpr,
    LIST: tl.constexpr, EVEN: tl.constexpr, PTX: tl.constexpr,
    COSINE: tl.constexpr, BIASED: tl.constexpr, LISTED: tl.constexpr, SELF: tl.constexpr,
    RANGED: tl.constexpr, MIXED: tl.constexpr, EUCLIDEAN: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Write the K best candidates of each query in order: higher score first, ties to the lower token.

    Scores are computed twice, and nothing of size Q x M exists. The first pass keeps the largest score of each of
    NB buckets of candidates; the K-th largest of these is a lower bound of the K-th best score, and close to it. The
    second keeps the few candidates that reach the bound (of those that only equal it, no more than can count), and
    they are sorted. Where more reach it than there is room for, it is raised to the K-th best of those that found room,
    and the second pass done again. Scores that are no number are no candidates.

    Programs take blocks of queries in turn, so that what is held for survivors is as large as the device is wide.

    Args:
        q: (B, Q, D).
        k: the candidates alone, (B, M, D).
        inverse_k: 1 / norms, (B, M) float32, if COSINE.
        bias: added to the scores, (B, M) float32, if BIASED.
        own: token of each query, (Q,) int64; it takes the first slot and is not ranked if SELF.
        tokens: token of each candidate, rising, (M,) int64, if LISTED, else all tokens are candidates.
        share, floor, row_steps, column_steps, low, high, alike: as ``topk_kernel`` has them.
        index: output, (B, Q, K) int64.
        held: room for survivors, (programs, BQ, LIST) int64.
        counts: of survivors, (programs, BQ) int32.
        blocks: of queries, in all items.
    """
    program = tl.program_id(0)
    line = program * BQ + tl.arange(0, BQ)
    per_item = tl.cdiv(Q, BQ)
    for block in range(program, blocks, tl.num_programs(0)):
        item = (block // per_item).to(tl.int64)
        row = (block % per_item) * BQ + tl.arange(0, BQ)
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

        best = tl.full((BQ, BM), float("-inf"), tl.float32)
        for start in range(0, M, BM):
            token = start + tl.arange(0, BM)
            score = scores(own_queries, keys, first, inverse_q, inverse_k, bias, item, row, row_ok, token, M, D,
                           BQ, BM, BD, ONE, EVEN, COSINE, BIASED, WIDEN)  # fmt: skip
            if MIXED:
                score = blended(score, least, scale, away, row_steps, column_steps, own_row, own_column, token, M,
                                prefix, columns, rows, extent, tokens, LISTED, EUCLIDEAN)  # fmt: skip
            if not EVEN:
                score = tl.where((token < M)[None, :], score, float("-inf"))
            best = tl.maximum(best, score)
        buckets = tl.max(tl.reshape(best, (BQ, NB, BM // NB)), axis=2) if NB < BM else best
        bound = tl.full((BQ,), float("-inf"), tl.float32)
        taken = tl.zeros((BQ,), tl.int32)
        for _ in range(0, K):
            top = tl.max(buckets, axis=1)
            bound = tl.where(taken < K, top, bound)
            same = buckets == top[:, None]
            taken += tl.sum(same.to(tl.int32), axis=1)
            buckets = tl.where(same, float("-inf"), buckets)
        bound = tl.where(row_ok, bound, float("inf"))

        found, again = tl.full((BQ,), LIST + 1, tl.int32), 0
        while tl.max(found, axis=0) > LIST:
            beyond = tl.where(row_ok, _above(bound), float("inf"))
            tl.debug_barrier()
            tl.store(counts + line, tl.zeros((BQ,), tl.int32))
            tl.debug_barrier()
            found = tl.zeros((BQ,), tl.int32)
            for start in range(0, M, BM):
                token = start + tl.arange(0, BM)
                score = scores(own_queries, keys, first, inverse_q, inverse_k, bias, item, row, row_ok, token, M, D,
                               BQ, BM, BD, ONE, EVEN, COSINE, BIASED, WIDEN)  # fmt: skip
                if MIXED:
                    score = blended(score, least, scale, away, row_steps, column_steps, own_row, own_column, token, M,
                                    prefix, columns, rows, extent, tokens, LISTED, EUCLIDEAN)  # fmt: skip
                # Once K candidates reach the bound, later ones have to pass it: of equal ones the first count.
                wanted = tl.where(found < K, bound, beyond)
                hit = score >= wanted[:, None]
                if not EVEN:
                    hit = hit & (token < M)[None, :]
                more = tl.sum(hit.to(tl.int32), axis=1)
                if (again > 0) | (tl.max(found + more, axis=0) > LIST):  # of those that only reach it K suffice
                    # Not said by hit, or Triton brings that into the layout of a running sum each time.
                    missed = (score < wanted[:, None]) | (token >= M)[None, :] | (score != score)
                    order = found[:, None] + tl.cumsum(1 - missed.to(tl.int32), axis=1)
                    hit = hit & ((score > bound[:, None]) | (order <= K))
                    more = tl.sum(hit.to(tl.int32), axis=1)
                found += more
                _hold(hit, score, token[None, :] + tl.zeros((BQ, BM), tl.int32), counts + line[:, None],
                      held + line[:, None] * LIST, BQ, BM, LIST, PTX)  # fmt: skip
            tl.debug_barrier()
            if tl.max(found, axis=0) > LIST:
                crowd, _chosen = _ordered(held, line, tokens, found, LIST, LISTED)
                bound = _raised(bound, crowd, found > LIST, K)
            again = 1  # at most K that only reach the bound are held then, so that it must rise

        key, survivor = _ordered(held, line, tokens, found, LIST, LISTED)
        out = index + (item * Q + row) * K
        if SELF:
            tl.store(out, itself.to(tl.int64), mask=row_ok)
            key = tl.where(survivor == itself[:, None], _EMPTY, key)
        for rank in range(0, K - SELF):
            top = tl.max(key, axis=1)
            # Where too few scores are numbers, some token: the gradient is none either.
            winner = tl.where(top == _EMPTY, 0, 0x7FFFFFFF - (top & 0x7FFFFFFF))
            tl.store(out + SELF + rank, winner, mask=row_ok)
            key = tl.where(key == top[:, None], _EMPTY, key)
