"""The k best under a total order.

Shapes: M candidates, K neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor


def runs_at_once() -> bool:
    """Return whether values can be looked at: not in compiled or traced graphs, nor in transforms of ``torch.func``."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return not torch._C._are_functorch_transforms_active()


def stable_topk(score: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest of the last axis, larger first, ties to the lower index.

    ``torch.topk`` leaves ties open and breaks them differently on each device. So where the k + 1 largest differ, as
    they mostly do, it is right; else for float32 the score and the index are packed into one int64 whose order is the
    wanted one, so that no two keys are equal. Only a CPU looks first: elsewhere the look would wait for the device.
    """
    if score.device.type == "cpu" and k < score.shape[-1] and runs_at_once():
        values, indices = score.topk(k + 1, dim=-1)
        if bool((values[..., 1:] < values[..., :-1]).all()):
            return indices[..., :k]
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
