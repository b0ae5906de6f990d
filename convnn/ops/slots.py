"""Which weight slot a neighbour meets, and slot weights as convolution kernels.

Shapes: B batch, H heads, Q queries, K neighbours, C input and O output channels, kh x kw the kernel window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convnn.ops.geometry import Geometry, window_order
from convnn.ops.topk import stable_argsort


def in_slots(
    index: Tensor, valid: Tensor | None, slots: str, queries: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor | None]:
    """Return neighbours in rank order, (B, H, Q, K), in the order of their slots, and which of them are valid."""
    if slots == "raster":
        if valid is None:
            return index.sort(dim=-1).values, None
        # Fillers last: they would stand between neighbours, and shift their slots.
        order = stable_argsort(index.masked_fill(~valid, geometry.num_tokens))
        return index.gather(-1, order), valid.gather(-1, order)
    if slots == "window":
        slot = window_slots(index, queries, geometry, valid)
        index = torch.empty_like(index).scatter_(-1, slot, index)
        valid = None if valid is None else torch.empty_like(valid).scatter_(-1, slot, valid)
    return index, valid


def window_slots(index: Tensor, queries: Tensor, geometry: Geometry, valid: Tensor | None = None) -> Tensor:
    """Return the slot of each neighbour when those in the kernel window of their query keep the slot of their tap.

    Slots are numbered as at blend 0, nearest tap first; neighbours outside the window fill the free slots, best
    first. So a neighbour that comes in changes one slot, and a layer moves away from a convolution without a jump.

    Args:
        index: neighbours in rank order, (B, H, Q, K).
        queries: token of each query, (Q,).
        geometry: of the map.
        valid: False for fillers, which are no neighbours and take what slot is left.
    """
    k = index.shape[-1]
    rows, cols = geometry.coordinates(index)
    own_rows, own_cols = (t[:, None] for t in geometry.coordinates(queries))
    tap, inside = torch.zeros_like(index), (index >= geometry.prefix) & (queries >= geometry.prefix)[:, None]
    axes = zip((rows - own_rows, cols - own_cols), geometry.kernel, geometry.centre, geometry.dilation, strict=True)
    for delta, m, centre, d in axes:
        step = delta.div(d, rounding_mode="floor") + centre
        inside = inside & (delta % d == 0) & (step >= 0) & (step < m)
        tap = tap * m + step
    order = window_order(geometry.kernel).argsort().to(index.device)
    slot = order[tap.where(inside, 0)]
    inside = inside & (slot < k)
    inside = inside if valid is None else inside & valid
    taken = torch.zeros_like(index).scatter_add_(-1, slot.where(inside, 0), inside.long())
    free = stable_argsort(taken)  # free slots first, in order
    outsiders = stable_argsort(inside.long())  # positions in the ranking, outsiders first
    slot_of = torch.empty_like(index).scatter_(-1, outsiders, free)
    return torch.where(inside, slot, slot_of)


def slots_to_kernel(weight: Tensor, kernel: tuple[int, int], slots: str) -> Tensor:
    """Return slot weights (O, C, kh * kw) as a convolution kernel (O, C, kh, kw); see ``kernel_to_slots``."""
    if slots != "raster":
        weight = weight[..., window_order(kernel).argsort().to(weight.device)]
    return weight.unflatten(-1, kernel)


def kernel_to_slots(kernel: Tensor, slots: str) -> Tensor:
    """Return a convolution kernel (O, C, kh, kw) as slot weights (O, C, kh * kw), nearest tap first unless raster."""
    weight = kernel.flatten(2)
    if slots != "raster":
        weight = weight[..., window_order((kernel.shape[2], kernel.shape[3])).to(weight.device)]
    return weight
