"""Calling the kernels of selection with tensors.

Shapes: B batch, H heads, Q queries, N tokens, M candidates, K neighbours, D channels per head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, library

from convnn.ops import choice
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
    """How a kernel divides its work."""

    queries: int
    candidates: int
    registers: int | None = None
    """At most so many for a thread; None: as many as there are."""
    warps: int = 4
    stages: int = 3

    def __str__(self) -> str:
        limit = "" if self.registers is None else f", {self.registers} registers"
        return f"{self.queries}x{self.candidates}{limit}"


FILTER = Tiles(64, 64, 168)
"""Of the kernel that bounds, filters and sorts: the best of twelve on an H200, in 16 bits."""
FILTERS = 3
"""Programs of it on each multiprocessor."""
BUCKETS = Tiles(64, 32, 128), Tiles(64, 32)
"""Of the kernel that keeps the best of each bucket. No GPU has timed it yet."""
MERGE = Tiles(32, 64)
"""Of the kernel that keeps the best as it goes."""

CHANNELS = {2: 128, 4: 32}
"""Channels multiplied at once, at most, by the bytes of a number."""

FASTEST = -1
"""In place of a number of ``WAYS``: what was measured to be fastest."""


def best_tokens(search: Search, way: int = FASTEST) -> Neighbors:
    """Return what ``convnn.ops.selection.rank`` returns for a blend above 0, from a kernel.

    Scores are float32 sums of products of the inputs in their own precision, in which those products are exact for 16
    bits; norms and means are float32. So the order is that of float32, as in the plain path.

    Args:
        search: queries and where they look.
        way: one of ``WAYS``, or ``FASTEST``.
    """
    geometry, selection = search.geometry, search.selection
    b, h = search.q.shape[:2]
    terms = prepare(search)
    q, k, bias = _operands(terms, selection.similarity)
    share = None
    if terms.mixed:
        share = terms.share if isinstance(terms.share, Tensor) else terms.floor.new_full((), terms.share)
        share = share.to(torch.float32).flatten().expand(b * h).contiguous()
    floor = terms.floor if search.ranged else None
    steps = _steps(terms, geometry, selection.distance)
    numbers = geometry.prefix, geometry.padded_shape[1], geometry.padded_shape[0], geometry.extent, selection.k
    flags = selection.similarity == "cosine", selection.self_first, selection.distance == "euclidean"
    index, low, high = best_keys(
        q, k, bias, search.queries, search.candidates, share, floor, *steps, *numbers, *flags, way
    )
    if not search.ranged:
        return Neighbors(index.unflatten(0, (b, h)))
    if selection.similarity == "dot":  # the kernel multiplies the features as they are
        low, high = (t / math.sqrt(q.shape[2]) for t in (low, high))
    low, high = low[..., None], high[..., None]
    low, high = whole_range(low, high, q, terms.own, selection.similarity)
    return Neighbors(index.unflatten(0, (b, h)), None, low.unflatten(0, (b, h)), high.unflatten(0, (b, h)))


# A custom operator, which ``torch.compile`` calls as it is, see ``attention``; what is computed around it fuses with
# the rest of the network.
@library.custom_op("convnn::best_keys", mutates_args=())
def best_keys(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    own: Tensor,
    candidates: Tensor | None,
    share: Tensor | None,
    floor: Tensor | None,
    row_steps: Tensor | None,
    column_steps: Tensor | None,
    prefix: int,
    columns: int,
    rows: int,
    extent: int,
    num: int,
    cosine: bool,
    self_first: bool,
    euclidean: bool,
    way: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ``num`` best of the candidates, (B H, Q, K) int64, and least and largest score, (B H, Q) or empty.

    The arguments are those of ``kernels.topk_kernel``; position is mixed in with a ``share``, the range is looked for
    with a ``floor``.
    """
    if way == FASTEST:
        rest = bias, own, candidates, share, floor, row_steps, column_steps, prefix, columns, rows, extent, num, cosine
        way = _fastest(q, k, *rest, self_first, euclidean)
    index, low, high = _keys_of(q, floor, num)
    common = own, candidates, share, floor, row_steps, column_steps, index, low, high
    numbers = prefix, columns, rows, extent, ALIKE
    flags = {
        "COSINE": cosine,
        "BIASED": bias is not None,
        "LISTED": candidates is not None,
        "SELF": int(self_first),
        "RANGED": floor is not None,
        "MIXED": share is not None,
        "EUCLIDEAN": euclidean,
        "WIDEN": q.dtype == torch.bfloat16 and interpreted(),
    }
    _name, kernel, tiles = WAYS[way]
    with on_device(q.device):
        kernel(q, k, bias, common, num, numbers, flags, tiles)
    return index, low, high


def _fastest(q: Tensor, k: Tensor, *rest: Any) -> int:
    """Return the fastest of ``WAYS`` for the arguments of ``best_keys``, as measured on them or before."""
    candidates, share, num = rest[2], rest[3], rest[11]
    available = k.shape[1] if candidates is None else len(candidates)
    sizes = choice.sized({"k": num}, items=len(q), queries=q.shape[1], candidates=available, channels=q.shape[2])
    kind = "by features" if share is None else "blended"
    ways = {
        name: partial(best_keys, q, k, *rest, number)
        for number, (name, kernel, tiles) in enumerate(WAYS)
        if _serves(kernel, tiles, q, available, num)
    }
    name = choice.fastest(choice.Case("selection kernel", q.device, q.dtype, sizes, kind), ways)
    return next(number for number, way in enumerate(WAYS) if way[0] == name)


def _serves(kernel: Callable[..., None], tiles: Tiles, q: Tensor, candidates: int, num: int) -> bool:
    """Return whether a kernel is worth a measurement."""
    if kernel is _filter:  # what it does in small blocks and in float32 no GPU has shown to be right
        return interpreted() or _own_stores(q, *(block_size(size, 16, 64) for size in (q.shape[1], candidates)))
    if kernel is _buckets:  # with more neighbours, or more blocks, most queries are in doubt
        return 2 * num <= tiles.candidates < candidates <= 256 * tiles.candidates
    return True


@best_keys.register_fake
def _(q: Tensor, k: Tensor, bias: Any, own: Tensor, candidates: Any, share: Any, floor: Any, row_steps: Any,
      column_steps: Any, prefix: int, columns: int, rows: int, extent: int, num: int, cosine: bool, self_first: bool,
      euclidean: bool, way: int) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _keys_of(q, floor, num)


def _keys_of(q: Tensor, floor: Tensor | None, num: int) -> tuple[Tensor, Tensor, Tensor]:
    low, high = (q.new_empty(0 if floor is None else q.shape[:2], dtype=torch.float32) for _ in range(2))
    return q.new_empty(*q.shape[:2], num, dtype=torch.int64), low, high


def _filter(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    common: tuple[Any, ...],
    num: int,
    numbers: tuple[Any, ...],
    flags: dict[str, Any],
    tiles: Tiles,
) -> None:
    """Run the kernel that bounds, filters and sorts."""
    from convnn.ops.triton.select_kernel import select_kernel

    count, channels = q.shape[1:]
    k, bias, inverse = _listed(k, bias, common[1], flags["COSINE"])
    blocks, sizes = _blocks(q, k.shape[1], tiles)
    room = block_size(3 * num, *ROOM)
    programs = min(blocks, FILTERS * _multiprocessors(q.device))
    held = q.new_empty(programs, sizes["BQ"], room, dtype=torch.int64)
    counts = q.new_empty(programs, sizes["BQ"], dtype=torch.int32)
    select_kernel[(programs,)](
        q, k, inverse, bias, *common, held, counts, count, k.shape[1], channels, num, blocks, *numbers,
        NB=min(sizes["BM"], block_size(4 * num, 32)), LIST=room, PTX=_own_stores(q, sizes["BQ"], sizes["BM"]),
        **sizes, **flags, num_warps=tiles.warps, num_stages=tiles.stages, maxnreg=tiles.registers,
    )  # fmt: skip


def _buckets(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    common: tuple[Any, ...],
    num: int,
    numbers: tuple[Any, ...],
    flags: dict[str, Any],
    tiles: Tiles,
) -> None:
    """Run the kernel that keeps the best of each bucket, then for queries in doubt the one that keeps the best."""
    from convnn.ops.triton.bucket_kernel import bucket_kernel

    doubt = q.new_empty(q.shape[:2], dtype=torch.int32)
    kept, kept_bias, inverse = _listed(k, bias, common[1], flags["COSINE"])
    blocks, sizes = _blocks(q, kept.shape[1], tiles)
    bits = (-(-kept.shape[1] // sizes["BM"]) - 1).bit_length()
    bucket_kernel[(blocks,)](
        q, kept, inverse, kept_bias, *common, doubt, *q.shape[1:2], kept.shape[1], q.shape[2], num, *numbers,
        BITS=bits, **sizes, **flags, num_warps=tiles.warps, num_stages=tiles.stages, maxnreg=tiles.registers,
    )  # fmt: skip
    _merge(q, k, bias, common, num, numbers, flags, Tiles(16, MERGE.candidates), doubt)


def _merge(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    common: tuple[Any, ...],
    num: int,
    numbers: tuple[Any, ...],
    flags: dict[str, Any],
    tiles: Tiles,
    doubt: Tensor | None = None,
) -> None:
    """Run the kernel that keeps the best as it goes; with ``doubt``, for blocks of queries in which there is some."""
    from convnn.ops.triton.kernels import topk_kernel

    items, count, channels = q.shape
    available = k.shape[1] if common[1] is None else len(common[1])
    inverses = (_inverse_norm(x) if flags["COSINE"] else None for x in (q, k))
    bq, bm = block_size(count, 16, tiles.queries), block_size(available, 16, tiles.candidates)
    topk_kernel[(-(-count // bq) * items,)](
        q, k, *inverses, bias, *common, doubt, count, k.shape[1], available, channels, num, *numbers,
        BQ=bq, BM=bm, BD=block_size(channels, 16, 32), BK=block_size(num - flags["SELF"] or 1),
        DOUBTED=doubt is not None, **flags,
    )  # fmt: skip


WAYS = tuple(
    (f"triton {kernel.__name__.strip('_')} {tiles}", kernel, tiles)
    for kernel, tiles in ((_filter, FILTER), (_merge, MERGE), *((_buckets, tiles) for tiles in BUCKETS))
)
"""What each is called, its kernel and tiles; the first that serves is taken where nothing is measured."""


def _listed(
    k: Tensor, bias: Tensor | None, candidates: Tensor | None, cosine: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return keys and bias of the candidates alone, and the inverse lengths of the keys."""
    if candidates is not None:
        k, bias = k[:, candidates].contiguous(), None if bias is None else bias[..., candidates].contiguous()
    return k, bias, _inverse_norm(k) if cosine else None


def _blocks(q: Tensor, candidates: int, tiles: Tiles) -> tuple[int, dict[str, int | bool]]:
    """Return the number of blocks of queries in all items, and the sizes of blocks as constants of a kernel."""
    items, count, channels = q.shape
    bq, bm = block_size(count, 16, tiles.queries), block_size(candidates, 16, tiles.candidates)
    bd = block_size(channels, 16, CHANNELS[q.element_size()])
    sizes = {"BQ": bq, "BM": bm, "BD": bd, "ONE": channels <= bd, "EVEN": candidates % bm == 0}
    return -(-count // bq) * items, sizes


def _own_stores(q: Tensor, bq: int, bm: int) -> bool:
    """Return whether survivors are stored by the kernel's own instructions.

    Those run once for each number that a thread holds. In the layout of tensor cores no two threads hold the same one;
    in that of other products, or of small blocks, they may.
    """
    return torch.version.cuda is not None and not interpreted() and q.element_size() == 2 and min(bq, bm) >= 64


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _operands(terms: Terms, similarity: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return queries and keys as the kernels multiply them, and the bias of the keys."""
    q, k, bias = terms.q, terms.k, None
    if similarity == "euclidean":
        q, k, bias = score_terms(q.float(), k.float(), similarity)
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
    from convnn.ops.triton.score_kernel import inverse_norm_kernel

    inverse = x.new_empty(x.shape[:-1], dtype=torch.float32)
    bd = block_size(x.shape[-1], 16, 128)
    rows = 4096 // bd
    inverse_norm_kernel[(-(-inverse.numel() // rows),)](x, inverse, inverse.numel(), x.shape[-1], BR=rows, BD=bd)
    return inverse
