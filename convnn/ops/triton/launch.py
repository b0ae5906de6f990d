"""What launching any kernel needs.

Imports no triton.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one, where a kernel is to be launched."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def block_size(size: int, low: int = 1, high: int = 1 << 30) -> int:
    """Return the power of two that holds ``size``, within bounds."""
    return min(max(1 << (size - 1).bit_length(), low), high)
