"""Calling the kernels of attention with tensors: sizes, strides, precision, and the gradient.

Shapes: B batch, H heads, Q queries, N tokens, M candidates, K neighbours, D channels per head, C channels of values.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from convnn.ops.similarity import unit


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one, where a kernel is to be launched."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def block_size(size: int, low: int = 1, high: int = 1 << 30) -> int:
    """Return the power of two that holds ``size``, within bounds."""
    return min(max(1 << (size - 1).bit_length(), low), high)


def attend_to_neighbors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    valid: Tensor | None,
    weight: Tensor | None,
    *,
    similarity: str,
    temperature: float,
) -> Tensor:
    """Return ``sum_r softmax_r(s / temperature) w_r v_r`` over the neighbours r of each query, s their similarity.

    Nothing of size (Q, K, D) exists, forward or backward. Softmax and sums are float32. The gradient of k, v and the
    weights is added up atomically, in no fixed order on a GPU; it cannot be differentiated again.

    Args:
        q: (B, H, Q, D).
        k: (B, H, N, D).
        v: (B, H, N, C).
        index: (B or 1, H or 1, Q, K) int64.
        valid: False for neighbours that do not count, shaped as ``index``, or None.
        weight: of each channel and rank, (C, at least K), or None for ones.
        similarity: ``dot`` or ``cosine``.
        temperature: divides the similarity.

    Returns:
        (B, H, Q, C), of the precision of v and the weights.
    """
    scale = 1 / temperature
    if similarity == "cosine":
        q, k = unit(q.float()), unit(k.float())
    else:
        scale /= math.sqrt(q.shape[-1])
    if weight is not None:
        weight = weight[:, : index.shape[-1]]
    return _NeighborAttention.apply(q, k, v, index, valid, weight, scale)


class _NeighborAttention(torch.autograd.Function):
    """``attend_to_neighbors`` for scaled dot products; keeps its inputs and the log of each query's sum."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index: Tensor,
        valid: Tensor | None,
        weight: Tensor | None,
        scale: float,
    ) -> Tensor:
        from convnn.ops.triton.kernels import attend_kernel

        b, h, count, _ = q.shape
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
        weight = weight if weight is None or weight.stride(-1) == 1 else weight.contiguous()
        lead = (b, h, -1, -1)
        index = index.contiguous().expand(lead)
        valid = None if valid is None else valid.to(torch.uint8).contiguous().expand(lead)
        dtype = v.dtype if weight is None else torch.promote_types(v.dtype, weight.dtype)
        y = v.new_empty(b, h, count, v.shape[-1], dtype=dtype)
        lse = v.new_empty(b, h, count, dtype=torch.float32)
        sizes, strides, blocks = _layout(q, k, v, index, weight)
        with on_device(q.device):
            attend_kernel[(-(-count // blocks["BQ"]) * b * h,)](
                q, k, v, index, valid, weight, y, lse, scale, h, count, *sizes, *strides, **blocks,
                MASKED=valid is not None, WEIGHED=weight is not None,
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, index, valid, weight, lse)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from convnn.ops.triton.kernels import attend_backward_kernel

        q, k, v, index, valid, weight, lse = ctx.saved_tensors
        b, h, count, _ = q.shape
        sizes, strides, blocks = _layout(q, k, v, index, weight)
        dq, dk, dv = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (q, k, v))
        programs = -(-count // blocks["BQ"]) * b * h
        parts = min(programs, 64)  # copies of dw that programs add to atomically, so that fewer wait for one another
        dw = None if weight is None else lse.new_zeros(parts, *sizes[1:])
        with on_device(q.device):
            attend_backward_kernel[(programs,)](
                q, k, v, index, valid, weight, lse, dy.contiguous(), dq, dk, dv, dw, ctx.scale, h, count, k.shape[2],
                *sizes, parts, *strides, **blocks, BK=block_size(sizes[2]),
                MASKED=valid is not None, WEIGHED=weight is not None,
            )  # fmt: skip
        grad = None if dw is None else dw.sum(0).to(weight.dtype)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, grad, None


def _layout(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, weight: Tensor | None
) -> tuple[list[int], list[int], dict[str, int]]:
    """Return the sizes D, C, K, the strides and the block sizes of both attention kernels."""
    sizes = [q.shape[-1], v.shape[-1], index.shape[-1]]
    strides = [stride for t in (q, k, v, index) for stride in t.stride()[:3]]
    strides.append(0 if weight is None else weight.stride(0))
    bd, bc = block_size(sizes[0]), block_size(sizes[1])
    return sizes, strides, {"BQ": block_size(2048 // max(bd, bc), 1, 32), "BD": bd, "BC": bc}
