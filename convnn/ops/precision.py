"""Products in true float32, whatever the process allows elsewhere; what autocast does; which devices know float64.

``torch.set_float32_matmul_precision`` and its relatives let a GPU multiply float32 with the 10 bits of TF32, and a CPU
with bfloat16. For the weights of a network that is a fair trade; the ranking of neighbours it changes: of CIFAR-10
pixels a third of the neighbours. So selection multiplies in full precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, library

_SWITCHES: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]


_WITHOUT_FLOAT64 = {"mps"}


def has_float64(device: torch.device | str | None) -> bool:
    """Return whether a device (None: torch's default one) computes in float64; Apple's GPUs do not."""
    return device is None or torch.device(device).type not in _WITHOUT_FLOAT64


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the precision that autocast lowers products on a tensor's device to; None: it is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind) else None


@contextmanager
def as_given(x: Tensor) -> Iterator[None]:
    """Compute in the precision of what is given inside, whatever autocast is on around, on the device of ``x``."""
    if autocast_dtype(x) is None:
        yield
        return
    with torch.autocast(x.device.type, enabled=False):
        yield


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 as float32 inside. Not for compiled graphs, which have no such state: see ``product``."""
    before = [switch.fp32_precision for switch in _SWITCHES]
    try:
        for switch, value in zip(_SWITCHES, before, strict=True):
            if value not in ("ieee", "none"):
                switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, value in zip(_SWITCHES, before, strict=True):
            if switch.fp32_precision != value:
                switch.fp32_precision = value


@library.custom_op("convnn::full_precision_product", mutates_args=())
def _product(a: Tensor, b: Tensor) -> Tensor:
    with full_precision():
        return a @ b


@_product.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` in its type's full precision: (..., n, d), (..., d, m) -> (..., n, m). No gradient passes.

    An exported program has a plain product instead, so that it needs no convnn where it runs; its precision is then
    that of the process that runs it.
    """
    if torch.compiler.is_exporting():
        return a @ b
    if torch.compiler.is_compiling():
        return _product(a, b)
    with full_precision():
        return a @ b
