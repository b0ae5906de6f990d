"""The k best under a total order.

Shapes: M candidates, K neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convnn.ops import native


def runs_at_once() -> bool:
    """Return whether values can be looked at: not in compiled or traced graphs, nor in transforms of ``torch.func``."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return not torch._C._are_functorch_transforms_active()


def _becomes_onnx() -> bool:
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def stable_argsort(values: Tensor) -> Tensor:
    """Return the indices that put the last axis in ascending order, ties to the lower index."""
    if _becomes_onnx():  # see ``_packed_topk``
        return values.topk(values.shape[-1], dim=-1, largest=False).indices
    return values.argsort(dim=-1, stable=True)


def stable_topk(score: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest of the last axis, larger first, ties to the lower index.

    ``torch.topk`` leaves ties open and breaks them differently on each device. On a CPU ``native`` keeps the rule as it
    goes; without numba the choice of ``torch.topk`` is put right where the values show ties, at a cost that grows with
    the rows that have them. Elsewhere, where looking would wait for the device, and in graphs the score and the index
    are packed into one key, so that no two keys are equal. Apple's GPUs promise neither an order of ties nor keys of 64
    bits, so their scores are ranked on the CPU.
    """
    if score.device.type == "mps":
        return stable_topk(score.cpu(), k).to(score.device)
    if score.device.type == "cpu" and k < score.shape[-1] and runs_at_once():
        found = native.best_of_rows(score.reshape(-1, score.shape[-1]), k)
        if found is not None:
            return found.view(*score.shape[:-1], k)
        values, index = score.topk(k + 1, dim=-1)
        if bool((values[..., 1:] < values[..., :-1]).all()):
            return index[..., :k]
        if not values[..., 0].isnan().any():  # which comes first
            rows = (t.reshape(-1, t.shape[-1]) for t in (score, values, index))
            return _repaired(*rows).view(*score.shape[:-1], k)
    return _packed_topk(score, k)


def _repaired(score: Tensor, values: Tensor, index: Tensor) -> Tensor:
    """Put ties right: score (R, M), its k + 1 largest values and their index, both (R, k + 1) -> index (R, k)."""
    k = values.shape[-1] - 1
    ties, index = values[:, 1:] == values[:, :-1], index[:, :k]
    at_border = ties[:, -1].nonzero().squeeze(-1)
    if 2 * len(at_border) > len(score):
        return _packed_topk(score, k)
    if len(at_border):  # others, left out, are as good as the last that were taken
        last = values[at_border, k:]
        column = torch.arange(score.shape[-1], dtype=torch.float32)
        first = torch.where(score[at_border] == last, -column, -torch.inf).topk(k, dim=-1).indices
        slot = torch.arange(k) - (values[at_border, :k] > last).sum(-1, keepdim=True)
        index[at_border] = index[at_border].where(slot < 0, first.gather(-1, slot.clamp(min=0)))
    tied = ties[:, :-1].any(-1).nonzero().squeeze(-1)
    if len(tied):
        columns = index[tied].sort(dim=-1).values
        order = score[tied].gather(-1, columns).sort(dim=-1, descending=True, stable=True).indices
        index[tied] = columns.gather(-1, order)
    return index


def _packed_topk(score: Tensor, k: int) -> Tensor:
    """Return ``stable_topk`` by one key per score."""
    if _becomes_onnx():
        # ONNX has neither a view of other bits nor a stable sort; its TopK puts the lower index first by itself.
        return score.topk(k, dim=-1).indices
    if score.dtype != torch.float32 or torch.jit.is_tracing():  # whose graphs have no view of other bits
        return score.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    # The bits of a float, read as an integer, order positive numbers as they are and negative ones backwards: turning
    # the lower 31 bits of negative ones round makes integers compare as the floats do. The upper half of the key is
    # this, the lower half counts down along the axis, so that of equal scores the lower index has the larger key.
    bits = (score + 0.0).view(torch.int32)  # + 0.0 turns -0.0, which equals 0.0, into it
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = bits.long()
    key <<= 32
    key |= torch.arange(score.shape[-1] - 1, -1, -1, device=score.device)
    return key.topk(k, dim=-1).indices
