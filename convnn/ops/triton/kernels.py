"""Triton kernels: the k best tokens of each query, and softmax attention over chosen neighbours with its gradient.

Only ``ops.triton`` imports this file, when a kernel is about to run: it needs triton. Every load and store is
masked, offsets are 64-bit, and sums are in float32.

Shapes: B batch times heads, Q queries, N tokens, M candidates, K neighbours, D channels of q and k, C of v.
Capitals with two letters are block sizes, powers of two: BQ queries, BM candidates, BD and BC channels, BK slots.
"""

from __future__ import annotations

import triton
import triton.language as tl

_EMPTY = tl.constexpr(-(2**63))
"""Key of an empty slot: below every key that a score can have."""

_RESERVED = tl.constexpr(2**63 - 1)
"""Key of a slot that must not be filled: above every other."""


@triton.jit
def _similarity(
    q, k, inverse_q, inverse_k, bias, item, row, row_ok, token, token_ok, Q, N, D,
    BQ: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, COSINE: tl.constexpr, BIASED: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """Return the scores of a block of queries and tokens, (BQ, BM) float32, whatever the precision of the input."""
    score = tl.zeros((BQ, BM), tl.float32)
    q_row = q + (item * Q + row) * D
    k_row = k + (item * N + token) * D
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        a = tl.load(q_row[:, None] + d[None, :], mask=row_ok[:, None] & (d < D)[None, :], other=0.0)
        b = tl.load(k_row[None, :] + d[:, None], mask=token_ok[None, :] & (d < D)[:, None], other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        score = tl.dot(a, b, score, input_precision="ieee")
    if COSINE:
        score *= tl.load(inverse_q + item * Q + row, mask=row_ok, other=0.0)[:, None]
        score *= tl.load(inverse_k + item * N + token, mask=token_ok, other=0.0)[None, :]
    if BIASED:
        score += tl.load(bias + item * N + token, mask=token_ok, other=0.0)[None, :]
    return score


@triton.jit
def _candidates(tokens, start, M, BM: tl.constexpr, LISTED: tl.constexpr):
    """Return a block of candidates, (BM,) int64, and which of them exist."""
    place = start + tl.arange(0, BM)
    ok = place < M
    token = place.to(tl.int64)
    if LISTED:
        token = tl.load(tokens + place, mask=ok, other=0)
    return token, ok


@triton.jit
def topk_kernel(
    q, k, inverse_q, inverse_k, bias, own, tokens, share, floor, row_steps, column_steps, index, low, high, doubt,
    Q, N, M, D, K, prefix, columns, rows, extent, alike,
    BQ: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
    COSINE: tl.constexpr, BIASED: tl.constexpr, LISTED: tl.constexpr, SELF: tl.constexpr,
    RANGED: tl.constexpr, MIXED: tl.constexpr, EUCLIDEAN: tl.constexpr, WIDEN: tl.constexpr, DOUBTED: tl.constexpr,
):  # fmt: skip
    """Write the K best candidates of each query in order: higher score first, ties to the lower token.

    A score and its token are one int64 key whose order is the wanted one. The best keys so far stay in registers; a
    block of candidates is merged by taking out its largest key while that beats the worst one kept, which after the
    first blocks happens rarely. So nothing of size Q x M exists.

    Args:
        q: (B, Q, D).
        k: (B, N, D).
        inverse_q: 1 / norms, (B, Q) float32, if COSINE.
        inverse_k: 1 / norms, (B, N) float32, if COSINE.
        bias: added to the scores, (B, N) float32, if BIASED.
        own: token of each query, (Q,) int64; it takes the first slot and is not ranked if SELF.
        tokens: candidates in rising order, (M,) int64, if LISTED, else all tokens are.
        share: blend of features with position, (B,) float32, if MIXED.
        floor: (B, Q) float32, see ``convnn.ops.similarity.span``, if RANGED.
        row_steps: distance between rows of the padded grid, squared if EUCLIDEAN, else over the extent, (rows, rows)
            float32, if MIXED.
        column_steps: the same for columns, (columns, columns).
        index: output, (B, Q, K) int64.
        low: output if RANGED, (B, Q) float32: least similarity among the candidates.
        high: output if RANGED: the largest, infinite where all are alike.
        doubt: (B, Q) int32, if DOUBTED: blocks of queries for which all are 0 keep what is written.
        alike: see ``convnn.ops.similarity.ALIKE``.
        WIDEN: make float32 of the inputs first: the interpreter cannot multiply bfloat16.
    """
    blocks = tl.cdiv(Q, BQ)
    program = tl.program_id(0)
    item = (program // blocks).to(tl.int64)
    row = ((program % blocks) * BQ + tl.arange(0, BQ)).to(tl.int64)
    row_ok = row < Q
    if DOUBTED:
        in_doubt = tl.max(tl.load(doubt + item * Q + row, mask=row_ok, other=0), axis=0)
        if in_doubt == 0:
            return
    itself = tl.load(own + row, mask=row_ok, other=-1)
    if RANGED:
        least = tl.full((BQ,), float("inf"), tl.float32)
        most = tl.full((BQ,), float("-inf"), tl.float32)
        for start in range(0, M, BM):
            token, ok = _candidates(tokens, start, M, BM, LISTED)
            score = _similarity(q, k, inverse_q, inverse_k, bias, item, row, row_ok, token, ok, Q, N, D,
                                BQ, BM, BD, COSINE, BIASED, WIDEN)  # fmt: skip
            least = tl.minimum(least, tl.min(tl.where(ok[None, :], score, float("inf")), axis=1))
            most = tl.maximum(most, tl.max(tl.where(ok[None, :], score, float("-inf")), axis=1))
        lowest = tl.load(floor + item * Q + row, mask=row_ok, other=0.0)
        lowest = tl.maximum(lowest, alike * tl.maximum(tl.abs(least), tl.abs(most)))
        most = tl.where(most - least <= lowest, float("inf"), most)
        tl.store(low + item * Q + row, least, mask=row_ok)
        tl.store(high + item * Q + row, most, mask=row_ok)
    if MIXED:
        features = tl.load(share + item)
        scale = tl.div_rn(features, most - least)
        own_place = tl.maximum(itself - prefix, 0)
        own_row = own_place // columns
        own_column = own_place % columns

    ranks = K - SELF
    slot = tl.arange(0, BK)
    empty = tl.where(slot < ranks, slot.to(tl.int64) + _EMPTY, _RESERVED)  # all different
    best = tl.zeros((BQ, BK), tl.int64) + empty[None, :]
    for start in range(0, M, BM):
        token, ok = _candidates(tokens, start, M, BM, LISTED)
        score = _similarity(q, k, inverse_q, inverse_k, bias, item, row, row_ok, token, ok, Q, N, D,
                            BQ, BM, BD, COSINE, BIASED, WIDEN)  # fmt: skip
        if MIXED:
            place = tl.maximum(token - prefix, 0)
            inside = row_ok[:, None] & ok[None, :]
            across = tl.load(row_steps + own_row[:, None] * rows + (place // columns)[None, :], mask=inside, other=0.0)
            along = tl.load(
                column_steps + own_column[:, None] * columns + (place % columns)[None, :], mask=inside, other=0.0
            )
            distance = tl.sqrt_rn(across + along) if EUCLIDEAN else tl.maximum(across, along)
            distance = tl.where((token < prefix)[None, :], float("inf"), distance)
            if EUCLIDEAN:
                distance = tl.div_rn(distance, extent + tl.zeros_like(distance))
            score = (score - least[:, None]) * scale[:, None] - (1 - features) * distance
        if SELF:
            score = tl.where(token[None, :] == itself[:, None], float("-inf"), score)
        score = tl.where(score == 0.0, 0.0, score)  # -0.0 equals 0.0
        bits = score.to(tl.int32, bitcast=True)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # now integers compare as the floats do
        key = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - token)[None, :]
        key = tl.where(row_ok[:, None] & ok[None, :], key, _EMPTY)
        worst, top = tl.min(best, axis=1), tl.max(key, axis=1)
        while tl.max((top > worst).to(tl.int32), axis=0) > 0:
            enters = (best == worst[:, None]) & (top > worst)[:, None]
            best = tl.where(enters, top[:, None], best)
            key = tl.where(key == top[:, None], _EMPTY, key)
            worst, top = tl.min(best, axis=1), tl.max(key, axis=1)

    out = index + (item * Q + row) * K
    if SELF:
        tl.store(out, itself, mask=row_ok)
    best = tl.where((slot < ranks)[None, :], best, _EMPTY)
    for rank in range(0, ranks):
        top = tl.max(best, axis=1)
        tl.store(out + SELF + rank, 0x7FFFFFFF - (top & 0x7FFFFFFF), mask=row_ok)
        best = tl.where(best == top[:, None], _EMPTY, best)


@triton.jit
def attend_kernel(
    q, k, v, index, valid, weight, temperature, y, lse, scale, H, Q, D, C, K,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, i_b, i_h, i_n, weight_c,
    BQ: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr,
    MASKED: tl.constexpr, WEIGHED: tl.constexpr, TEMPERED: tl.constexpr,
):  # fmt: skip
    """Write ``y = sum_r softmax_r(scale q . k_r) w_r v_r`` over the neighbours r of each query, and the log of its sum.

    Args:
        q: (batch, H, Q, D), the last axis contiguous; ``q_b``, ``q_h``, ``q_n`` are its strides.
        k: (batch, H, N, D).
        v: (batch, H, N, C).
        index: neighbours, (batch, H, Q, K) int64.
        valid: zero for those that do not count, laid out as ``index``, if MASKED.
        weight: of each channel and rank, (C, K), if WEIGHED; ``weight_c`` is the stride of a channel.
        temperature: divides ``scale``, () float32, if TEMPERED.
        y: output, (batch * H, Q, C) contiguous.
        lse: output, (batch * H, Q) float32.
    """
    blocks = tl.cdiv(Q, BQ)
    program = tl.program_id(0)
    item = (program // blocks).to(tl.int64)
    batch, head = item // H, item % H
    row = ((program % blocks) * BQ + tl.arange(0, BQ)).to(tl.int64)
    row_ok = row < Q
    d, c = tl.arange(0, BD), tl.arange(0, BC)
    d_ok, c_ok = row_ok[:, None] & (d < D)[None, :], row_ok[:, None] & (c < C)[None, :]
    if TEMPERED:
        scale = scale / tl.load(temperature)
    query = tl.load(q + batch * q_b + head * q_h + row[:, None] * q_n + d[None, :], mask=d_ok, other=0.0)
    query = query.to(tl.float32)
    keys, values = k + batch * k_b + head * k_h + d[None, :], v + batch * v_b + head * v_h + c[None, :]
    first = batch * i_b + head * i_h + row * i_n
    # Softmax in one pass, as in flash attention: sums so far are rescaled whenever a larger score turns up.
    most = tl.full((BQ,), float("-inf"), tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    sums = tl.zeros((BQ, BC), tl.float32)
    for r in range(0, K):
        token = tl.load(index + first + r, mask=row_ok, other=0)
        key = tl.load(keys + token[:, None] * k_n, mask=d_ok, other=0.0).to(tl.float32)
        score = tl.sum(query * key, axis=1) * scale
        if MASKED:
            counts = tl.load(valid + first + r, mask=row_ok, other=0) != 0
            score = tl.where(counts, score, float("-inf"))
        value = tl.load(values + token[:, None] * v_n, mask=c_ok, other=0.0).to(tl.float32)
        if WEIGHED:
            value *= tl.load(weight + c * weight_c + r, mask=c < C, other=0.0).to(tl.float32)[None, :]
        highest = tl.maximum(most, score)
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        shrink, p = tl.exp(most - shift), tl.exp(score - shift)
        total = total * shrink + p
        sums = sums * shrink[:, None] + p[:, None] * value
        most = highest
    total = tl.where(total == 0.0, 1.0, total)
    out = y + (item * Q + row)[:, None] * C + c[None, :]
    tl.store(out, (sums / total[:, None]).to(y.dtype.element_ty), mask=c_ok)
    shift = tl.where(most == float("-inf"), 0.0, most)
    tl.store(lse + item * Q + row, shift + tl.log(total), mask=row_ok)


@triton.jit
def attend_backward_kernel(
    q, k, v, index, valid, weight, temperature, lse, dy, dq, dk, dv, dw, weighs_of, score_grads,
    scale, H, Q, N, D, C, K, parts,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, i_b, i_h, i_n, weight_c,
    BQ: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
    MASKED: tl.constexpr, WEIGHED: tl.constexpr, TEMPERED: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """Write the gradients of ``attend_kernel``.

    The gradient of q is gathered. Those of k, v and the weights are added atomically in float32, so that their last
    digits depend on the order in which programs finish; or, if ORDERED, left to ``attend_tokens_kernel`` and
    ``attend_weight_kernel``, which get what they need of each edge from here.

    Args:
        dy: (batch * H, Q, C) contiguous.
        dq: output, (batch * H, Q, D).
        dk: zeros to add to, (batch * H, N, D) float32, unless ORDERED.
        dv: zeros to add to, (batch * H, N, C) float32, unless ORDERED.
        dw: zeros to add to, (parts, C, K) float32, if WEIGHED and not ORDERED; its sum over the parts is the gradient.
        weighs_of: output if ORDERED, (batch * H, Q, K) float32: what each neighbour weighs.
        score_grads: output if ORDERED, (batch * H, Q, K) float32: the gradient of each product of query and key.
    """
    blocks = tl.cdiv(Q, BQ)
    program = tl.program_id(0)
    item = (program // blocks).to(tl.int64)
    batch, head = item // H, item % H
    row = ((program % blocks) * BQ + tl.arange(0, BQ)).to(tl.int64)
    row_ok = row < Q
    d, c, slot = tl.arange(0, BD), tl.arange(0, BC), tl.arange(0, BK)
    d_ok, c_ok = row_ok[:, None] & (d < D)[None, :], row_ok[:, None] & (c < C)[None, :]
    if TEMPERED:
        scale = scale / tl.load(temperature)
    query = tl.load(q + batch * q_b + head * q_h + row[:, None] * q_n + d[None, :], mask=d_ok, other=0.0)
    query = query.to(tl.float32)
    grad = tl.load(dy + (item * Q + row)[:, None] * C + c[None, :], mask=c_ok, other=0.0).to(tl.float32)
    log_sum = tl.load(lse + item * Q + row, mask=row_ok, other=0.0)
    keys, values = k + batch * k_b + head * k_h + d[None, :], v + batch * v_b + head * v_h + c[None, :]
    if not ORDERED:
        key_grads, value_grads = dk + item * N * D + d[None, :], dv + item * N * C + c[None, :]
    first = batch * i_b + head * i_h + row * i_n
    p = tl.zeros((BQ, BK), tl.float32)
    dp = tl.zeros((BQ, BK), tl.float32)
    for r in range(0, K):
        token = tl.load(index + first + r, mask=row_ok, other=0)
        key = tl.load(keys + token[:, None] * k_n, mask=d_ok, other=0.0).to(tl.float32)
        weighs = tl.exp(tl.sum(query * key, axis=1) * scale - log_sum)
        if MASKED:
            weighs = tl.where(tl.load(valid + first + r, mask=row_ok, other=0) != 0, weighs, 0.0)
        value = tl.load(values + token[:, None] * v_n, mask=c_ok, other=0.0).to(tl.float32)
        passed = grad
        if WEIGHED:
            if not ORDERED:
                part = tl.sum(weighs[:, None] * value * grad, axis=0)
                where = dw + ((program % parts).to(tl.int64) * C + c) * K + r
                tl.atomic_add(where, part, mask=c < C, sem="relaxed")
            passed = grad * tl.load(weight + c * weight_c + r, mask=c < C, other=0.0).to(tl.float32)[None, :]
        if ORDERED:
            tl.store(weighs_of + (item * Q + row) * K + r, weighs, mask=row_ok)
        else:
            tl.atomic_add(value_grads + token[:, None] * C, weighs[:, None] * passed, mask=c_ok, sem="relaxed")
        here = (slot == r)[None, :]
        p = tl.where(here, weighs[:, None], p)
        dp = tl.where(here, tl.sum(passed * value, axis=1)[:, None], dp)
    total = tl.sum(p, axis=1)  # 1 but for the rounding of the stored sum, which ds would magnify
    p = p / tl.where(total == 0.0, 1.0, total)[:, None]
    ds = p * (dp - tl.sum(p * dp, axis=1)[:, None]) * scale
    query_grad = tl.zeros((BQ, BD), tl.float32)
    for r in range(0, K):
        token = tl.load(index + first + r, mask=row_ok, other=0)
        key = tl.load(keys + token[:, None] * k_n, mask=d_ok, other=0.0).to(tl.float32)
        own = tl.sum(tl.where((slot == r)[None, :], ds, 0.0), axis=1)
        query_grad += own[:, None] * key
        if ORDERED:
            tl.store(score_grads + (item * Q + row) * K + r, own, mask=row_ok)
        else:
            tl.atomic_add(key_grads + token[:, None] * D, own[:, None] * query, mask=d_ok, sem="relaxed")
    tl.store(dq + (item * Q + row)[:, None] * D + d[None, :], query_grad.to(dq.dtype.element_ty), mask=d_ok)


@triton.jit
def attend_tokens_kernel(
    q, weight, dy, weighs_of, score_grads, edges, start, dk, dv, H, Q, N, D, C, K,
    q_b, q_h, q_n, lead_b, lead_h, weight_c,
    BE: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr, WEIGHED: tl.constexpr,
):  # fmt: skip
    """Write the gradients of k and v: each token sums over the queries that took it, in one order, by itself.

    Args:
        weighs_of: see ``attend_backward_kernel``.
        score_grads: likewise.
        edges: number of each edge, ``(lead * Q + query) * K + rank``, sorted by token, int64; ``lead`` is batch item
            times ``lead_b`` and head times ``lead_h``, which are 0 where all have the same neighbours.
        start: where the edges of each token begin, (leads * N + 1,) int64.
        dk: output, (batch * H, N, D).
        dv: output, (batch * H, N, C).
        BE: edges at once.
    """
    program = tl.program_id(0)
    item, token = (program // N).to(tl.int64), (program % N).to(tl.int64)
    batch, head = item // H, item % H
    lead = batch * lead_b + head * lead_h
    d, c, slot = tl.arange(0, BD), tl.arange(0, BC), tl.arange(0, BE)
    first, end = tl.load(start + lead * N + token), tl.load(start + lead * N + token + 1)
    key_grad = tl.zeros((BE, BD), tl.float32)
    value_grad = tl.zeros((BE, BC), tl.float32)
    for place in range(first, end, BE):
        ok = place + slot < end
        edge = tl.load(edges + place + slot, mask=ok, other=0) - lead * Q * K
        row, rank = edge // K, edge % K
        d_ok, c_ok = ok[:, None] & (d < D)[None, :], ok[:, None] & (c < C)[None, :]
        query = tl.load(q + batch * q_b + head * q_h + row[:, None] * q_n + d[None, :], mask=d_ok, other=0.0)
        grad = tl.load(dy + (item * Q + row)[:, None] * C + c[None, :], mask=c_ok, other=0.0).to(tl.float32)
        if WEIGHED:
            grad *= tl.load(weight + c[None, :] * weight_c + rank[:, None], mask=c_ok, other=0.0).to(tl.float32)
        number = item * Q * K + edge
        key_grad += tl.load(score_grads + number, mask=ok, other=0.0)[:, None] * query.to(tl.float32)
        value_grad += tl.load(weighs_of + number, mask=ok, other=0.0)[:, None] * grad
    out = item * N + token
    tl.store(dk + out * D + d, tl.sum(key_grad, axis=0).to(dk.dtype.element_ty), mask=d < D)
    tl.store(dv + out * C + c, tl.sum(value_grad, axis=0).to(dv.dtype.element_ty), mask=c < C)


@triton.jit
def attend_weight_kernel(
    v, index, dy, weighs_of, dw, H, Q, C, K, rows, each, v_b, v_h, v_n, i_b, i_h, i_n,
    BQ: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the weights in parts: that of one rank over ``each`` queries, of batch * H * Q = ``rows``.

    Args:
        weighs_of: see ``attend_backward_kernel``.
        dw: output, (parts, C, K) float32; its sum over the parts is the gradient.
    """
    part, rank = tl.program_id(0) // K, tl.program_id(0) % K
    c = tl.arange(0, BC)
    sums = tl.zeros((BQ, BC), tl.float32)
    for step in range(0, each, BQ):
        place = part.to(tl.int64) * each + step + tl.arange(0, BQ)
        ok = place < rows
        item, row = place // Q, place % Q
        batch, head = item // H, item % H
        c_ok = ok[:, None] & (c < C)[None, :]
        token = tl.load(index + batch * i_b + head * i_h + row * i_n + rank, mask=ok, other=0)
        values = v + batch * v_b + head * v_h + token * v_n
        value = tl.load(values[:, None] + c[None, :], mask=c_ok, other=0.0).to(tl.float32)
        grad = tl.load(dy + place[:, None] * C + c[None, :], mask=c_ok, other=0.0).to(tl.float32)
        sums += tl.load(weighs_of + place * K + rank, mask=ok, other=0.0)[:, None] * value * grad
    tl.store(dw + (part.to(tl.int64) * C + c) * K + rank, tl.sum(sums, axis=0), mask=c < C)
