"""Calling the kernels of selection with tensors.

Shapes: B batch, H heads, Q queries, N tokens, M candidates, K neighbours, D channels per head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from convnn.ops.geometry import Geometry
from convnn.ops.neighbors import Neighbors
from convnn.ops.scores import Search, Terms, prepare, whole_range
from convnn.ops.similarity import ALIKE, score_terms
from convnn.ops.triton.dispatch import interpreted
from convnn.ops.triton.launch import block_size, on_device

ROOM = 32, 128
"""Survivors that are held for a query: three for each of its neighbours, within these bounds."""


@dataclass(frozen=True)
class Tiles:
    """How the kernel that bounds, filters and sorts divides its work."""

    queries: int
    candidates: int
    warps: int
    programs: int
    """On each multiprocessor."""
    registers: int | None = None
    """At most so many for a thread; None: as many as there are."""
    stages: int = 3

    def __str__(self) -> str:
        limit = "" if self.registers is None else f", {self.registers} registers"
        return f"{self.queries}x{self.candidates}, {self.warps} warps, {self.programs} programs{limit}"


TILES = (Tiles(64, 64, 4, 3, 168), Tiles(64, 64, 4, 4, 128), Tiles(128, 64, 8, 2, 128), Tiles(128, 128, 8, 1))
"""Fastest first, as an H200 had them for 256 maps of 1,024 tokens of 64 channels; the last for float32."""

CHANNELS = {2: 128, 4: 32}
"""Channels multiplied at once, at most, by the bytes of a number."""


def best_tokens(search: Search, tiles: Tiles | None = TILES[0]) -> Neighbors:
    """Return what ``convnn.ops.selection.rank`` returns for a blend above 0, from kernels.

    Scores are float32 sums of products of the inputs in their own precision, in which those products are exact for 16
    bits; norms and means are float32. So the order is that of float32, as in the plain path.

    Args:
        search: queries and where they look.
        tiles: of the kernel that bounds, filters and sorts; None: the one that keeps the best as it goes, alone.
    """
    geometry, selection, candidates = search.geometry, search.selection, search.candidates
    b, h, count, _ = search.q.shape
    terms = prepare(search)
    operands = _operands(terms, selection.similarity)
    device = search.q.device
    index = torch.empty(b * h, count, selection.k, dtype=torch.int64, device=device)
    low, high = (terms.floor.new_empty(b * h, count) for _ in range(2)) if search.ranged else (None, None)
    share = None
    if terms.mixed:
        share = (
            terms.share.float().flatten()
            if isinstance(terms.share, Tensor)
            else terms.floor.new_full((b * h,), terms.share)
        )
    floor = terms.floor if search.ranged else None
    common = search.queries, candidates, share, floor, *_steps(terms, geometry, selection.distance), index, low, high
    flags = {
        "COSINE": selection.similarity == "cosine",
        "BIASED": operands[2] is not None,
        "LISTED": candidates is not None,
        "SELF": int(selection.self_first),
        "RANGED": search.ranged,
        "MIXED": terms.mixed,
        "EUCLIDEAN": selection.distance == "euclidean",
        "WIDEN": operands[0].dtype == torch.bfloat16 and interpreted(),
    }
    numbers = geometry.prefix, geometry.padded_shape[1], geometry.padded_shape[0], geometry.extent, ALIKE
    with on_device(device):
        if tiles is None:
            _merged(operands, common, selection.k, numbers, flags)
        else:
            _filtered(operands, common, selection.k, numbers, flags, tiles)
    if low is not None and high is not None:
        if selection.similarity == "dot":  # the kernel multiplies the features as they are
            low, high = (t / math.sqrt(operands[0].shape[2]) for t in (low, high))
        low, high = low[..., None], high[..., None]
        low, high = whole_range(low, high, operands[0], terms.own, selection.similarity)
        low, high = low.unflatten(0, (b, h)), high.unflatten(0, (b, h))
    return Neighbors(index.unflatten(0, (b, h)), None, low, high)


def _filtered(
    operands: tuple[Tensor, Tensor, Tensor | None],
    common: tuple[Any, ...],
    k: int,
    numbers: tuple[Any, ...],
    flags: dict[str, Any],
    tiles: Tiles,
) -> None:
    """Run the kernel that bounds, filters and sorts."""
    from convnn.ops.triton.select_kernel import select_kernel

    queries, keys, bias = operands
    items, count, channels = queries.shape
    candidates = common[1]
    if candidates is not None:
        keys, bias = (None if t is None else t[:, candidates].contiguous() for t in (keys, bias))
    inverse = _inverse_norm(keys) if flags["COSINE"] else None
    available = keys.shape[1]
    bq, bm = block_size(count, 16, tiles.queries), block_size(available, 16, tiles.candidates)
    bd, room = block_size(channels, 16, CHANNELS[queries.element_size()]), block_size(3 * k, *ROOM)
    blocks = -(-count // bq) * items
    programs = min(blocks, tiles.programs * _multiprocessors(queries.device))
    held = queries.new_empty(programs, bq, room, dtype=torch.int64)
    counts = queries.new_empty(programs, bq, dtype=torch.int32)
    select_kernel[(programs,)](
        queries, keys, inverse, bias, *common, held, counts, count, available, channels, k, blocks, *numbers,
        BQ=bq, BM=bm, BD=bd, NB=min(bm, block_size(4 * k, 32)), ONE=channels <= bd, LIST=room,
        EVEN=available % bm == 0, PTX=torch.version.cuda is not None and not interpreted(), **flags,
        num_warps=tiles.warps, num_stages=tiles.stages, maxnreg=tiles.registers,
    )  # fmt: skip


def _merged(
    operands: tuple[Tensor, Tensor, Tensor | None],
    common: tuple[Any, ...],
    k: int,
    numbers: tuple[Any, ...],
    flags: dict[str, Any],
) -> None:
    """Run the kernel that keeps the best as it goes."""
    from convnn.ops.triton.kernels import topk_kernel

    queries, keys, bias = operands
    items, count, channels = queries.shape
    candidates = common[1]
    available = keys.shape[1] if candidates is None else len(candidates)
    inverses = (_inverse_norm(x) if flags["COSINE"] else None for x in (queries, keys))
    bq, bm = block_size(count, 16, 32), block_size(available, 16, 64)
    topk_kernel[(-(-count // bq) * items,)](
        queries, keys, *inverses, bias, *common, count, keys.shape[1], available, channels, k, *numbers,
        BQ=bq, BM=bm, BD=block_size(channels, 16, 32), BK=block_size(k - flags["SELF"] or 1), **flags,
    )  # fmt: skip


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _operands(terms: Terms, similarity: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return queries and keys as the kernels multiply them, and the bias of the keys."""
    q, k, bias = terms.q, terms.k, None
    if similarity == "euclidean":
        q, k, bias = score_terms(q.float(), k.float(), similarity)
        bias = bias.squeeze(-2)
    dtype = torch.promote_types(q.dtype, k.dtype)
    return q.to(dtype).contiguous(), k.to(dtype).contiguous(), bias


def _steps(terms: Terms, geometry: Geometry, distance: str) -> list[Tensor | None]:
    """Return the distances between rows and between columns of the grid, where position is mixed in."""
    if not terms.mixed:
        return [None, None]
    axes = [torch.arange(side, device=terms.q.device) for side in geometry.padded_shape]
    tables = [geometry.steps(axis, line[:, None], line).contiguous() for axis, line in enumerate(axes)]
    # Squared here: in the kernel a product and a sum may round once, and swapped offsets would no longer tie.
    return [t.square() if distance == "euclidean" else t / geometry.extent for t in tables]


def _inverse_norm(x: Tensor) -> Tensor:
    """Return 1 / length along the last axis in float32, 0 where ``convnn.ops.similarity.unit`` gives zeros."""
    from convnn.ops.triton.select_kernel import inverse_norm_kernel

    inverse = x.new_empty(x.shape[:-1], dtype=torch.float32)
    bd = block_size(x.shape[-1], 16, 128)
    rows = 4096 // bd
    inverse_norm_kernel[(-(-inverse.numel() // rows),)](x, inverse, inverse.numel(), x.shape[-1], BR=rows, BD=bd)
    return inverse
