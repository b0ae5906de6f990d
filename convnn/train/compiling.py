"""A network compiled as ``train.compile`` says, each of its graphs after measuring what computes it fastest."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from convnn.models.measuring import measure_choices
from convnn.models.swap import neighbor_layers
from convnn.ops import choice
from convnn.runtime import distributed
from convnn.runtime.device import compiled


def compiled_by_choice(
    model: nn.Module, forward: Callable[[Tensor], Tensor], mode: bool | str
) -> Callable[[Tensor], Tensor]:
    """Return ``forward`` compiled, see ``convnn.models.measuring``.

    Whenever a step is the first with its k, end of the blend and size of batch, which is when a graph may be made, what
    is not known of it is measured. In a group of processes the size does not count, which the last batch has not alike
    in all; all take what the first one measured.

    Args:
        model: with replaced layers.
        forward: the model, or what a group of processes calls in its place.
        mode: of ``train.compile``.
    """
    graph, layers, seen = compiled(forward, mode), list(neighbor_layers(model).values()), set()

    def step(images: Tensor) -> Tensor:
        place = tuple((layer.k, layer.end) for layer in layers)
        met = (place, images.shape) if distributed.world().size == 1 else place
        if met not in seen:
            seen.add(met)
            measure_choices(model, images)
            choice.adopt(distributed.broadcast(choice.table()))
        return graph(images)

    return step
