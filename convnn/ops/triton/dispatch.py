"""Plain torch or Triton: what can compute a step. Which is faster is for ``convnn.ops.choice`` to measure.

Triton is imported when a kernel runs, so that everything works without it. There is no kernel for selection by
position alone, nor for other aggregations than the softmax-weighted sum: those are plain with every backend.

Shapes: B batch, H heads, Q queries, N tokens, M candidates, K neighbours, D channels per head, C channels of values.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from convnn.errors import ConfigError
from convnn.ops.triton.limits import MAX_CHANNELS, attention_limit, selection_limit

if TYPE_CHECKING:
    from convnn.ops.settings import Mixing, Selection

_TRITON = "operator.backend=triton: {}; or set operator.backend=auto"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def engaged(backend: str, device: torch.device) -> bool:
    """Return whether a kernel may be used at all.

    Not in an exported graph, which is loaded where convnn is not installed, on the meta device, or under a dispatch
    mode such as the FLOP counter, which sees no operations of a kernel. With ``auto`` on CUDA only, and not under
    torch's deterministic algorithms, where what computes may not depend on a measurement.
    """
    if backend == "torch" or device.type == "meta":
        return False
    if torch.compiler.is_compiling():  # with modes of its own
        if torch.compiler.is_exporting():
            return False
    elif is_in_torch_dispatch_mode():
        return False
    return backend == "triton" or (device.type == "cuda" and not torch.are_deterministic_algorithms_enabled())


def measured(backend: str, device: torch.device) -> bool:
    """Return whether several ways may be timed against one another."""
    return backend == "auto" and not torch.compiler.is_compiling() and engaged(backend, device)


def use_kernel(backend: str, device: torch.device, limit: str | None) -> bool:
    """Return whether the kernel of a step can compute it, for a backend that is ``engaged``.

    Args:
        backend: ``auto`` or ``triton``.
        device: of the tensors.
        limit: why the kernel does not serve the case, or None.

    Raises:
        ConfigError: if ``backend=triton`` and it cannot.
    """
    lack = limit or missing(device)
    if lack is not None and backend == "triton":
        raise ConfigError(_TRITON.format(lack.replace("{p}", "operator")))
    return lack is None


def require(backend: str, device: torch.device) -> None:
    """Raise ConfigError if ``backend=triton`` and no kernel can run on this device."""
    lack = missing(device) if backend == "triton" else None
    if lack is not None:
        raise ConfigError(_TRITON.format(lack))


@torch.compiler.assume_constant_result  # it looks at the installation, which a traced graph cannot
def missing(device: torch.device) -> str | None:
    """Return what is missing to run kernels on this device and how to get it, or None."""
    if not _installed():
        return "triton is not installed; install it (pip install triton)"
    if device.type != "cuda" and not interpreted():
        return f"triton needs a CUDA device, not {device.type}; set device=cuda (or TRITON_INTERPRET=1 to debug)"
    return None


@lru_cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Return whether triton's interpreter runs the kernels; the environment decides before triton is imported."""
    from convnn.ops.triton import kernels

    return type(kernels.topk_kernel).__name__ == "InterpretedFunction"


def selects(backend: str, q: Tensor, k: Tensor, selection: Selection) -> bool:
    """Return whether the kernel can select by features of (B, H, Q, D) and (B, H, N, D); see ``use_kernel``."""
    if not engaged(backend, q.device):
        return False
    limit = selection_limit(selection) or _foreign_dtype(q, k)
    return use_kernel(backend, q.device, limit)


def attends(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    selection: Selection,
    mixing: Mixing,
    *,
    num: int,
    dropout: float = 0.0,
) -> bool:
    """Return whether the kernel can attend to ``num`` neighbours of each query; see ``use_kernel``.

    Args:
        q: (B, H, Q, D).
        k: (B, H, N, D).
        v: (B, H, N, C).
        weight: (C, at least K) or None.
        selection: its similarity is that of the softmax.
        mixing: with ``weighting=softmax``.
        num: K.
        dropout: of the neighbours' weights; not served.
    """
    if not engaged(mixing.backend, q.device):
        return False
    limit = attention_limit(selection, mixing, num)
    tensors = [q, k, v] if weight is None else [q, k, v, weight]
    if limit is None and dropout > 0:
        limit = "dropout of the neighbours' weights is not served; set backbone.drop_rate=0"
    if limit is None and _transformed():  # a custom operator would drop the derivative without a word
        limit = "forward derivatives and the transforms of torch.func are not served"
    if limit is None and max(q.shape[-1], v.shape[-1]) > MAX_CHANNELS:
        limit = f"more than {MAX_CHANNELS} channels per head are not served"
    return use_kernel(mixing.backend, q.device, limit or _foreign_dtype(*tensors))


def _transformed() -> bool:
    """Return whether dual numbers or a transform of ``torch.func`` may be at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _foreign_dtype(*tensors: Tensor) -> str | None:
    other = next((t.dtype for t in tensors if t.dtype not in _DTYPES), None)
    return None if other is None else f"{str(other).removeprefix('torch.')} is not served"
