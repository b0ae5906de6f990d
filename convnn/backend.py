"""Plain torch or Triton kernels: which one computes, and the kernels as functions of tensors.

Triton is imported when a kernel runs, so that everything works without it. There is no kernel for selection by
position alone, nor for other aggregations than the softmax-weighted sum: those are plain with every backend.

Shapes: B batch, H heads, Q queries, N tokens, M candidates, K neighbours, D channels per head, C channels of values.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from convnn.config import ConfigError
from convnn.geometry import Geometry
from convnn.kernel_limits import MAX_CHANNELS, attention_limit, selection_limit
from convnn.similarity import ALIKE, deviation, pair_similarity, score_terms, unit, with_positions

if TYPE_CHECKING:
    from convnn.selection import Selection

SELECTION, ATTENTION = "selection", "attention"
"""The two steps that have kernels."""
_TRITON = "operator.backend=triton: {}; or set operator.backend=auto"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Faster:
    """A measurement in which the kernel of a step beat plain torch, eager and compiled."""

    gpu: str
    """Glob over ``torch.cuda.get_device_name()``."""
    step: str
    """``selection`` or ``attention``."""
    tokens: int
    """From so many tokens on."""
    k: int
    """Up to so many neighbours."""


FASTER: tuple[Faster, ...] = ()
"""Where ``backend=auto`` takes the kernels. Nothing has been measured on a GPU yet, so it takes them nowhere;
``scripts/benchmark.py groups=backend*`` on a CUDA machine measures what belongs here."""


# ------------------------------------------------------------------------------------------------- the choice


def engaged(backend: str, device: torch.device) -> bool:
    """Return whether kernels come into question at all.

    They do not in a traced graph (torch.compile fuses the plain path itself), on the meta device, and under a dispatch
    mode such as the FLOP counter, which sees no operations of a kernel.
    """
    if backend == "torch" or torch.compiler.is_compiling() or device.type == "meta" or is_in_torch_dispatch_mode():
        return False
    return backend == "triton" or (bool(FASTER) and device.type == "cuda")


def use_kernel(backend: str, step: str, device: torch.device, limit: str | None, *, tokens: int, num: int) -> bool:
    """Return whether the kernel of a step computes it, for a backend that is ``engaged``.

    Args:
        backend: ``auto`` or ``triton``.
        step: ``selection`` or ``attention``.
        device: of the tensors.
        limit: why the kernel does not serve the case, or None.
        tokens: N.
        num: K.

    Raises:
        ConfigError: if ``backend=triton`` and it cannot.
    """
    lack = limit or missing(device)
    if backend == "auto":
        return lack is None and measured_faster(step, device, tokens, num)
    if lack is not None:
        raise ConfigError(_TRITON.format(lack.replace("{p}", "operator")))
    return True


def require(backend: str, device: torch.device) -> None:
    """Raise ConfigError if ``backend=triton`` and no kernel can run on this device."""
    lack = missing(device) if backend == "triton" else None
    if lack is not None:
        raise ConfigError(_TRITON.format(lack))


def measured_faster(step: str, device: torch.device, tokens: int, num: int) -> bool:
    """Return whether ``FASTER`` has a measurement that covers the case."""
    name = torch.cuda.get_device_name(device)
    return any(f.step == step and fnmatch.fnmatch(name, f.gpu) and tokens >= f.tokens and num <= f.k for f in FASTER)


def missing(device: torch.device) -> str | None:
    """Return what kernels on this device lack and how to get it, or None."""
    if not _installed():
        return "triton is not installed; install it (pip install triton)"
    if device.type != "cuda" and not _interpreted():
        return f"triton needs a CUDA device, not {device.type}; set device=cuda (or TRITON_INTERPRET=1 to debug)"
    return None


@lru_cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    """Return whether triton's interpreter runs the kernels; the environment decides before triton is imported."""
    from convnn import kernels

    return type(kernels.topk_kernel).__name__ == "InterpretedFunction"


def selects(backend: str, q: Tensor, k: Tensor, selection: Selection, num: int) -> bool:
    """Return whether the kernel selects by features of (B, H, Q, D) and (B, H, N, D); see ``use_kernel``."""
    if not engaged(backend, q.device):
        return False
    limit = selection_limit({"candidates": selection.candidates, "k": num}) or _foreign_dtype(q, k)
    return use_kernel(backend, SELECTION, q.device, limit, tokens=k.shape[2], num=num)


def attends(
    backend: str, q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, *, num: int, similarity: str, **off: Any
) -> bool:
    """Return whether the kernel attends to ``num`` neighbours of each query; see ``use_kernel``.

    Args:
        backend: ``auto``, ``torch`` or ``triton``.
        q: (B, H, Q, D).
        k: (B, H, N, D).
        v: (B, H, N, C).
        weight: (C, at least K) or None.
        num: K.
        similarity: of the softmax.
        **off: ``dropout`` and ``straight_through``, which are not served.
    """
    if not engaged(backend, q.device):
        return False
    settings = {"similarity": similarity, "k": num, "straight_through": off["straight_through"], "learn_blend": "no"}
    limit = attention_limit(settings)
    tensors = [q, k, v] if weight is None else [q, k, v, weight]
    if limit is None and off["dropout"] > 0:
        limit = "dropout of the neighbours' weights is not served; set backbone.drop_rate=0"
    if limit is None and max(q.shape[-1], v.shape[-1]) > MAX_CHANNELS:
        limit = f"more than {MAX_CHANNELS} channels per head are not served"
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if limit is None and trained and torch.are_deterministic_algorithms_enabled():
        limit = "its gradient is summed in no fixed order; set train.deterministic=false"
    return use_kernel(backend, ATTENTION, q.device, limit or _foreign_dtype(*tensors), tokens=k.shape[2], num=num)


def _foreign_dtype(*tensors: Tensor) -> str | None:
    other = next((t.dtype for t in tensors if t.dtype not in _DTYPES), None)
    return None if other is None else f"{str(other).removeprefix('torch.')} is not served"


# ---------------------------------------------------------------------------------------------- the kernels


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _block(size: int, low: int = 1, high: int = 1 << 30) -> int:
    """Return the power of two that holds ``size``, within bounds."""
    return min(max(1 << (size - 1).bit_length(), low), high)


def best_tokens(
    q: Tensor,
    k: Tensor,
    queries: Tensor,
    candidates: Tensor | None,
    geometry: Geometry,
    selection: Selection,
    *,
    num: int,
    blend: float | Tensor,
    ranged: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the ``num`` best candidates of the given queries in rank order, by features or features and position.

    Scores are float32 sums of products of the inputs in their own precision, in which those products are exact for 16
    bits; norms and means are float32. So the order is that of float32, as in the plain path.

    Args:
        q: (B, H, Q, D).
        k: (B, H, N, D), of the same precision or another.
        queries: token of each query, (Q,) int64.
        candidates: in rising order, (M,) int64, or None for all tokens.
        geometry: where they are.
        selection: how they are chosen.
        num: K.
        blend: above 0; a number, or a tensor (H,).
        ranged: return the range of the similarities too.

    Returns:
        (B, H, Q, K) int64, and if ``ranged`` the least and largest similarity, (B, H, Q, 1) float32, as
        ``convnn.selection.Neighbors`` has them.
    """
    from convnn.kernels import topk_kernel

    device, kind = q.device, selection.similarity
    b, h, count, _ = q.shape
    mixed = isinstance(blend, Tensor) or blend < 1
    share = torch.as_tensor(blend, dtype=torch.float32, device=device).detach().expand(h).repeat(b)
    q, k = q.flatten(0, 1), k.flatten(0, 1)
    if mixed and selection.mix == "concat":
        q, k, mixed = q.float(), k.float(), False
        positions, scale, own_share = geometry.positions(device), deviation(k), share[:, None, None]
        q, k = (with_positions(x, p, own_share, scale) for x, p in ((q, positions[queries]), (k, positions)))
    raw_q, raw_k = q, k
    bias = None
    if kind == "euclidean":
        q, k, bias = score_terms(q.float(), k.float(), kind)
    dtype = torch.promote_types(q.dtype, k.dtype)
    q, k = q.to(dtype).contiguous(), k.to(dtype).contiguous()
    inverse_q, inverse_k = (_inverse_norm(x) for x in (q, k)) if kind == "cosine" else (None, None)
    floor = q.new_zeros(b * h, count, dtype=torch.float32)
    if ranged and kind == "euclidean":
        floor = ALIKE**2 * raw_q.float().square().sum(-1)
    steps: list[Tensor | None] = [None, None]
    if mixed:
        axes = [torch.arange(side, device=device) for side in geometry.padded_shape]
        tables = [geometry.steps(axis, line[:, None], line).contiguous() for axis, line in enumerate(axes)]
        # Squared here: in the kernel a product and a sum may round once, and swapped offsets would no longer tie.
        steps = [t.square() if selection.distance == "euclidean" else t for t in tables]
    index = torch.empty(b * h, count, num, dtype=torch.int64, device=device)
    low, high = (q.new_empty(b * h, count, dtype=torch.float32) for _ in range(2)) if ranged else (None, None)
    available = geometry.num_tokens if candidates is None else len(candidates)
    own_first = int(selection.self_first)
    rows, columns = geometry.padded_shape
    bq, bm = _block(count, 16, 32), _block(available, 16, 64)
    with _on(device):
        topk_kernel[(-(-count // bq) * b * h,)](
            q, k, inverse_q, inverse_k, bias, queries, candidates, share, floor, *steps, index, low, high,
            count, k.shape[1], available, q.shape[2], num, geometry.prefix, columns, rows, geometry.extent, ALIKE,
            BQ=bq, BM=bm, BD=_block(q.shape[2], 16, 32), BK=_block(num - own_first or 1),
            COSINE=kind == "cosine", BIASED=bias is not None, LISTED=candidates is not None, SELF=own_first,
            RANGED=ranged, MIXED=mixed, EUCLIDEAN=selection.distance == "euclidean",
            WIDEN=dtype == torch.bfloat16 and _interpreted(),
        )  # fmt: skip
    if low is not None and high is not None:
        if kind == "dot":
            low, high = (t / math.sqrt(q.shape[2]) for t in (low, high))
        elif kind == "euclidean":  # score_terms leaves out the query's own square
            low, high = (t - (q / 2).square().sum(-1) for t in (low, high))
        low, high = low[..., None], high[..., None]
        if selection.self_first and candidates is not None:  # the query's own token need not be a candidate
            own = pair_similarity(raw_q.float(), raw_k[:, queries, None].float(), kind)
            low, high = torch.minimum(low, own), torch.maximum(high, own)
        low, high = low.unflatten(0, (b, h)), high.unflatten(0, (b, h))
    return index.unflatten(0, (b, h)), low, high


def _inverse_norm(x: Tensor) -> Tensor:
    """Return 1 / length along the last axis in float32, 0 where ``convnn.similarity.unit`` gives zeros."""
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
        from convnn.kernels import attend_kernel

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
        with _on(q.device):
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
        from convnn.kernels import attend_backward_kernel

        q, k, v, index, valid, weight, lse = ctx.saved_tensors
        b, h, count, _ = q.shape
        sizes, strides, blocks = _layout(q, k, v, index, weight)
        dq, dk, dv = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (q, k, v))
        programs = -(-count // blocks["BQ"]) * b * h
        parts = min(programs, 64)  # so that fewer programs wait for one another
        dw = None if weight is None else lse.new_zeros(parts, *sizes[1:])
        with _on(q.device):
            attend_backward_kernel[(programs,)](
                q, k, v, index, valid, weight, lse, dy.contiguous(), dq, dk, dv, dw, ctx.scale, h, count, k.shape[2],
                *sizes, parts, *strides, **blocks, BK=_block(sizes[2]),
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
    bd, bc = _block(sizes[0]), _block(sizes[1])
    return sizes, strides, {"BQ": _block(2048 // max(bd, bc), 1, 32), "BD": bd, "BC": bc}
