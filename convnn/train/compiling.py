"""A network compiled as ``train.compile`` says, each of its graphs after measuring what computes it fastest."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from convnn.models.measuring import measure_choices
from convnn.models.swap import neighbor_layers
from convnn.ops import choice
from convnn.runtime import distributed
from convnn.runtime.device import compiled

log = logging.getLogger("convnn")


def compiled_by_choice(
    model: nn.Module, forward: Callable[[Tensor], Tensor], mode: bool | str
) -> Callable[[Tensor], Tensor]:
    """Return ``forward`` compiled, see ``convnn.models.measuring``.

    Whenever a step is the first at its end of the blend, which is when a graph is made, what is not known of it is
    measured; with a named mode, whose shapes are fixed, also whenever it is the first with its k and size of batch.
    In a group of processes the size does not count, which the last batch has not alike in all; all take what the first
    one measured.

    Args:
        model: with replaced layers.
        forward: the model, or what a group of processes calls in its place.
        mode: of ``train.compile``.
    """
    graph, layers = compiled(forward, mode), list(neighbor_layers(model).values())
    fixed, alone = isinstance(mode, str), distributed.world().size == 1
    seen: set[tuple[Any, ...]] = set()
    ks: set[tuple[int, ...]] = set()

    def step(images: Tensor) -> Tensor:
        k = tuple(layer.k for layer in layers) if fixed else ()
        place = tuple(layer.end for layer in layers), k, images.shape if fixed and alone else None
        if place not in seen:
            seen.add(place)
            if k not in ks and len(ks) == 1:
                log.warning(
                    "train.compile=%s compiles anew for each k of the schedule; train.compile=true does not", mode
                )
            ks.add(k)
            measure_choices(model, images)
            choice.adopt(distributed.broadcast(choice.table()))
        return graph(images)

    return step
