"""Products with the Hessian of a loss, and its largest eigenvalues by Lanczos' method.

Yao, Gholami, Keutzer & Mahoney, *PyHessian*, 2020 (arXiv 1912.07145). The Hessian itself is never made: a product with
a vector is the gradient of the gradient's product with it (Pearlmutter 1994): a backward pass through the backward one.
Shapes: P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from convnn.models.swap import neighbor_layers

Product = Callable[[Tensor], Tensor]


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Compute layers in ways that have second derivatives: plain torch, and attention without fused kernels.

    The kernels of ``operator.backend=triton`` and torch's fused attention have first derivatives alone. On a CPU our
    layers have second ones as they are.
    """
    layers = list(neighbor_layers(model).values())
    before = [layer.backend for layer in layers]
    try:
        for layer in layers:
            layer.backend = "torch"
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for layer, backend in zip(layers, before, strict=True):
            layer.backend = backend


def hessian_product(losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> Product:
    """Return the function v -> H v, (P,) -> (P,), of the sum of some losses.

    Args:
        losses: each with a graph, which the function keeps alive.
        parameters: that the losses are differentiated by, P numbers together.
    """
    gradients = [
        torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True)
        for loss in losses
    ]
    sizes, shapes = [p.numel() for p in parameters], [p.shape for p in parameters]

    def product(vector: Tensor) -> Tensor:
        parts = [part.view(shape) for part, shape in zip(vector.split(sizes), shapes, strict=True)]
        total = torch.zeros_like(vector)
        for gradient in gradients:
            curved = [(g, v) for g, v in zip(gradient, parts, strict=True) if g.requires_grad]
            if not curved:
                continue
            found = torch.autograd.grad(
                [g for g, _ in curved],
                parameters,
                [v for _, v in curved],
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            total += torch.cat([x.flatten() for x in found])
        return total

    return product


@dataclass(frozen=True)
class Ritz:
    """Eigenvalues that Lanczos' method found, and how far they may be from true ones."""

    values: tuple[float, ...]
    """Of all sizes, the largest first; as many as there were steps."""
    errors: tuple[float, ...]
    """Of each the residual |H v - lambda v| of its vector: an eigenvalue lies no farther away."""

    @property
    def steps(self) -> int:
        """Products that were computed."""
        return len(self.values)


def lanczos(product: Product, start: Tensor, steps: int, tolerance: float, count: int = 1) -> Ritz:
    """Return eigenvalues that Lanczos' method finds, each new vector orthogonal to all before.

    Args:
        product: of a symmetric matrix with a vector.
        start: (P,) vector to begin from, not 0, such as one of random numbers. ``steps`` vectors as long are kept.
        steps: at most so many products.
        tolerance: enough are computed when the residuals of the largest ``count`` eigenvalues are below it, as a share
            of the largest magnitude.
        count: of the eigenvalues that are wanted.
    """
    basis = [start / start.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        found = product(basis[-1])
        diagonal.append(float(found.double() @ basis[-1].double()))
        for _ in range(2):  # once more, for what rounding leaves of the first
            for vector in basis:
                found = found - (found @ vector) * vector
        norm = float(found.double().norm())
        ritz = _ritz(diagonal, beside, norm)
        scale = max(map(abs, ritz.values))
        exhausted = norm <= 1e-7 * scale or len(basis) == len(start)
        enough = len(basis) > count and max(ritz.errors[:count]) <= tolerance * scale
        if exhausted or enough or len(basis) >= steps or not math.isfinite(norm):
            return ritz
        beside.append(norm)
        basis.append(found / norm)


def _ritz(diagonal: Sequence[float], beside: Sequence[float], norm: float) -> Ritz:
    """Return the eigenvalues of the tridiagonal matrix so far; ``norm`` is of what lies outside of its space."""
    n = len(diagonal)
    if not all(map(math.isfinite, [*diagonal, *beside, norm])):
        return Ritz((math.nan,) * n, (math.inf,) * n)
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if n > 1:
        off = torch.tensor(beside, dtype=torch.float64)
        matrix = matrix + torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(matrix)
    return Ritz(tuple(values.flip(0).tolist()), tuple((vectors[-1].abs() * norm).flip(0).tolist()))
