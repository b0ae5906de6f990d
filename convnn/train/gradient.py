"""The gradient of a step, computed from the batch at once or in parts, and the norms of gradients and parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from convnn.models.swap import neighbor_layers


def backward(
    forward: Callable[[Tensor], Tensor],
    criterion: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    targets: Tensor,
    parts: int,
    autocast: Callable[[], Any],
    unsynchronised: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[Tensor, Tensor]:
    """Add the gradient of a batch's mean loss to the parameters; return loss and outputs (B, classes), detached.

    The batch is cut into parts of as equal a size as can be, each of which makes and frees its own activations. Their
    losses count by their images, so that without batch normalisation the sum is the gradient of the whole batch.

    Args:
        forward: the model.
        criterion: mean loss of outputs and targets.
        images: (B, C, h, w).
        targets: (B,) classes or (B, classes) shares.
        parts: at most this many; fewer images make fewer.
        autocast: context of the forward pass.
        unsynchronised: context in which a backward pass leaves the other processes alone; for all parts but the last.
    """
    parts = max(1, min(parts, len(images)))
    if parts == 1:
        with autocast():
            output = forward(images)
            loss = criterion(output.float(), targets)
        loss.backward()
        return loss.detach(), output.detach()
    losses, outputs = [], []
    for number, (some, wanted) in enumerate(zip(images.tensor_split(parts), targets.tensor_split(parts), strict=True)):
        with nullcontext() if number == parts - 1 else unsynchronised():
            with autocast():
                output = forward(some)
                loss = criterion(output.float(), wanted) * (len(some) / len(images))
            loss.backward()
        losses.append(loss.detach())
        outputs.append(output.detach())
    return torch.stack(losses).sum(), torch.cat(outputs)


def parts_of_step(asked: int, images: int, batch_size: int, processes: int) -> int:
    """Return in how many parts a step goes through the network: of a short last batch in fewer, of the usual size.

    All processes make the same number, whatever their own share of the images: with synchronised batch normalisation
    they meet in each part.

    Args:
        asked: ``train.grad_accumulation``.
        images: of the step, over all processes.
        batch_size: of a whole step, over all processes.
        processes: that share the images.
    """
    return max(1, min(asked * images // batch_size, images // processes))


def gradient_summary(norms: list[Tensor]) -> dict[str, float | None]:
    """Return mean and largest of the norms of an epoch's gradients, of those that are finite."""
    values = torch.stack(norms).cpu().double() if norms else torch.zeros(0)
    values = values[values.isfinite()]
    if not len(values):
        return {"grad_norm": None, "grad_norm_max": None}
    return {"grad_norm": values.mean().item(), "grad_norm_max": values.max().item()}


def parameter_norm(parameters: Iterable[nn.Parameter]) -> float | None:
    """Return the norm of all parameters that are trained."""
    return _number(nn.utils.get_total_norm([p.detach() for p in parameters if p.requires_grad]))


def layer_norms(model: nn.Module) -> dict[str, dict[str, float | None]]:
    """Return of each layer that took another's place the norms of its parameters and of the gradient that they hold."""
    found = {}
    for name, layer in neighbor_layers(model).items():
        own = [p for p in layer.parameters() if p.requires_grad]
        gradients = [p.grad for p in own if p.grad is not None]
        norms = [nn.utils.get_total_norm(gradients), nn.utils.get_total_norm([p.detach() for p in own])]
        found[name] = dict(zip(("grad_norm", "param_norm"), map(_number, norms), strict=True))
    return found


def _number(norm: Tensor) -> float | None:
    value = norm.item()
    return value if math.isfinite(value) else None
