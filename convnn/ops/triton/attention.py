"""Attention to the neighbours as an operator of torch's library: ``convnn::attend``, with its gradient.

Both are custom operators, which ``torch.compile`` calls as they are, and not ``triton_op``s, which it would look into:
so Python runs when they are called, which sorts edges, sizes blocks, and may choose by what was measured here; and they
run in Triton's interpreter, of which a compiled graph knows nothing. What is lost is little, since nothing beside the
kernels could be fused into them.

Shapes: B batch, H heads, Q queries, N tokens, K neighbours, D channels per head, C channels of values.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, library

from convnn.ops.similarity import unit
from convnn.ops.triton.launch import block_size, on_device

PARTS = 64
"""Copies of the gradient of the weights, so that fewer programs wait for one another, or each has its own."""


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


@library.custom_op("convnn::attend", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    valid: Tensor | None,
    weight: Tensor | None,
    temperature: Tensor | None,
    scale: float,
    ordered: bool,
) -> tuple[Tensor, Tensor]:
    """Return ``sum_r softmax_r(scale q . k_r / temperature) w_r v_r`` and the log of each query's sum.

    Args:
        q: (B, H, Q, D).
        k: (B, H, N, D).
        v: (B, H, N, C).
        index: (B or 1, H or 1, Q, K) int64.
        valid: False for neighbours that do not count, shaped as ``index``, or None.
        weight: of each channel and rank, (C, K), or None for ones.
        temperature: () float32, without a gradient, or None for one.
        scale: of the products.
        ordered: sum the gradients in one order, see ``attend_backward``.

    Returns:
        (B, H, Q, C), of the precision of v and the weights; (B, H, Q) float32, which has no gradient.
    """
    from convnn.ops.triton.kernels import attend_kernel

    b, h, count, _ = q.shape
    y, lse = _outputs(q, v, weight)
    q, k, v, index, valid, weight = _laid_out(q, k, v, index, valid, weight)
    sizes, strides, blocks = _layout(q, k, v, index, weight)
    with on_device(q.device):
        attend_kernel[(-(-count // blocks["BQ"]) * b * h,)](
            q, k, v, index, valid, weight, temperature, y, lse, scale, h, count, *sizes, *strides, **blocks,
            MASKED=valid is not None, WEIGHED=weight is not None, TEMPERED=temperature is not None,
        )  # fmt: skip
    return y, lse


@library.custom_op("convnn::attend_backward", mutates_args=())
def attend_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    valid: Tensor | None,
    weight: Tensor | None,
    temperature: Tensor | None,
    lse: Tensor,
    dy: Tensor,
    scale: float,
    ordered: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and the weights (empty without weights) from that of the output.

    Those of k, v and the weights are added up atomically, in no fixed order on a GPU. With ``ordered``, and under
    ``torch.use_deterministic_algorithms``, the edges are sorted by token once, and each token sums over the queries
    that took it: the same numbers every time.
    """
    q, k, v, index, valid, weight = _laid_out(q, k, v, index, valid, weight)
    inputs, dy = (q, k, v, index, valid, weight, temperature, lse), dy.contiguous()
    backward = _backward_in_order if ordered or torch.are_deterministic_algorithms_enabled() else _backward_atomically
    return backward(inputs, dy, scale)


Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def _backward_atomically(inputs: Inputs, dy: Tensor, scale: float) -> Gradients:
    q, k, v, index, _, weight, _, lse = inputs
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (k, v))
    sizes, _, blocks = _layout(q, k, v, index, weight)
    parts = min(_programs(q, blocks), PARTS)
    dw = lse.new_zeros(0) if weight is None else lse.new_zeros(parts, *sizes[1:])
    _launch_backward(inputs, dy, scale, dq=dq, dk=dk, dv=dv, dw=dw, parts=parts)
    return dq, dk.to(k.dtype), dv.to(v.dtype), dw if weight is None else dw.sum(0).to(weight.dtype)


def _backward_in_order(inputs: Inputs, dy: Tensor, scale: float) -> Gradients:
    from convnn.ops.triton.kernels import attend_tokens_kernel, attend_weight_kernel

    q, k, v, index, _, weight, _, lse = inputs
    b, h, count, _ = q.shape
    tokens, num = k.shape[2], index.shape[-1]
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    weighs, score_grads = (lse.new_empty(b, h, count, num) for _ in range(2))
    _launch_backward(inputs, dy, scale, dq=dq, weighs_of=weighs, score_grads=score_grads)
    lead = [int(stride > 0) for stride in index.stride()[:2]]  # 0: expanded
    edges, start = incoming(index[: b if lead[0] else 1, : h if lead[1] else 1], tokens)
    (d, c, k_), strides, blocks = _layout(q, k, v, index, weight)
    wide = max(blocks["BD"], blocks["BC"])
    with on_device(q.device):
        attend_tokens_kernel[(b * h * tokens,)](
            q, weight, dy, weighs, score_grads, edges, start, dk, dv, h, count, tokens, d, c, k_,
            *strides[:3], lead[0] * (h if lead[1] else 1), lead[1], strides[-1],
            BE=block_size(4096 // wide, 1, 16), BD=blocks["BD"], BC=blocks["BC"], WEIGHED=weight is not None,
        )  # fmt: skip
        if weight is None:
            return dq, dk, dv, lse.new_empty(0)
        rows, step = b * h * count, block_size(2048 // blocks["BC"], 1, 32)
        each = max(step, -(-rows // (PARTS * step)) * step)
        dw = lse.new_empty(-(-rows // each), c, num)
        attend_weight_kernel[(len(dw) * num,)](
            v, index, dy, weighs, dw, h, count, c, num, rows, each, *strides[6:12], BQ=step, BC=blocks["BC"]
        )
    return dq, dk, dv, dw.sum(0).to(weight.dtype)


def _launch_backward(
    inputs: Inputs,
    dy: Tensor,
    scale: float,
    *,
    dq: Tensor,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    dw: Tensor | None = None,
    weighs_of: Tensor | None = None,
    score_grads: Tensor | None = None,
    parts: int = 1,
) -> None:
    from convnn.ops.triton.kernels import attend_backward_kernel

    q, k, v, index, valid, weight, temperature, lse = inputs
    sizes, strides, blocks = _layout(q, k, v, index, weight)
    with on_device(q.device):
        attend_backward_kernel[(_programs(q, blocks),)](
            q, k, v, index, valid, weight, temperature, lse, dy, dq, dk, dv, dw, weighs_of, score_grads,
            scale, q.shape[1], q.shape[2], k.shape[2], *sizes, parts, *strides, **blocks, BK=block_size(sizes[2]),
            MASKED=valid is not None, WEIGHED=weight is not None, TEMPERED=temperature is not None,
            ORDERED=weighs_of is not None,
        )  # fmt: skip


def incoming(index: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Return the inverted neighbour graph of (B, H, Q, K): who took each token.

    Args:
        index: neighbours.
        tokens: N.

    Returns:
        The edges, as places in ``index``, sorted by batch item, head and token, those of a token in rising order,
        (B H Q K,) int64; and where those of each token begin, (B H N + 1,) int64.
    """
    b, h = index.shape[:2]
    small = max(b * h * tokens + 1, index.numel()) < 2**31  # of which half as many digits are sorted
    kind = torch.int32 if small else torch.int64
    lead = torch.arange(b * h, device=index.device, dtype=kind).mul_(tokens).view(b, h, 1, 1)
    taken, edges = (index.to(kind) + lead).flatten().sort(stable=True)
    return edges, torch.searchsorted(taken, torch.arange(b * h * tokens + 1, device=index.device, dtype=kind))


def _outputs(q: Tensor, v: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    dtype = v.dtype if weight is None else torch.promote_types(v.dtype, weight.dtype)
    size = q.shape[:3]
    return v.new_empty(*size, v.shape[-1], dtype=dtype), v.new_empty(size, dtype=torch.float32)


def _laid_out(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, valid: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the inputs as the kernels read them: rows contiguous, ``index`` and ``valid`` (B, H, Q, K)."""
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    weight = weight if weight is None or weight.stride(-1) == 1 else weight.contiguous()
    index = _for_all(index, q)
    return q, k, v, index, None if valid is None else _for_all(valid.to(torch.uint8), q), weight


def _for_all(x: Tensor, q: Tensor) -> Tensor:
    """Expand (B or 1, H or 1, Q, K) to the batch and heads of (B, H, Q, D), with strides of 0 where it repeats."""
    x = x.contiguous()
    strides = [0 if size == 1 else stride for size, stride in zip(x.shape[:2], x.stride(), strict=False)]
    return x.as_strided((*q.shape[:2], *x.shape[2:]), (*strides, *x.stride()[2:]))


def _layout(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, weight: Tensor | None
) -> tuple[list[int], list[int], dict[str, int]]:
    """Return the sizes D, C, K, the strides and the block sizes of the attention kernels."""
    sizes = [q.shape[-1], v.shape[-1], index.shape[-1]]
    strides = [stride for t in (q, k, v, index) for stride in t.stride()[:3]]
    strides.append(0 if weight is None else weight.stride(0))
    bd, bc = block_size(sizes[0]), block_size(sizes[1])
    return sizes, strides, {"BQ": block_size(2048 // max(bd, bc), 1, 32), "BD": bd, "BC": bc}


def _programs(q: Tensor, blocks: dict[str, int]) -> int:
    return -(-q.shape[2] // blocks["BQ"]) * q.shape[0] * q.shape[1]


# ---------------------------------------------------------------------------------- what torch has to know of them


@attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, index: Tensor, valid: Any, weight: Tensor | None, *_: Any) -> Any:
    return _outputs(q, v, weight)


@attend_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, index: Tensor, valid: Any, weight: Tensor | None, *_: Any) -> Gradients:
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    return dq, dk, dv, q.new_empty(0, dtype=torch.float32) if weight is None else weight.new_empty(weight.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, index, valid, weight, temperature, ctx.scale, ctx.ordered = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, index, valid, weight, temperature, output[1])


def _gradients(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    # ``attend_backward`` has no gradient of its own: who differentiates twice is told so.
    saved = ctx.saved_tensors  # once: checkpointing hands them out no second time
    dq, dk, dv, dw = attend_backward(*saved, dy, ctx.scale, ctx.ordered)
    return dq, dk, dv, None, None, None if saved[5] is None else dw, None, None, None


attend.register_autograd(_gradients, setup_context=_keep)
