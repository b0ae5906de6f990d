"""A model examined before training: its operations, and the parameters that will get no gradient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from convnn.config.schema import ScheduleConfig
from convnn.errors import ConfigError, first_line
from convnn.models.flops import Cost, count_operations, on_meta
from convnn.models.schedule import apply_schedule
from convnn.models.swap import neighbor_layers


@contextmanager
def _name_failing_layer(model: nn.Module) -> Iterator[None]:
    """Turn a ValueError from inside a swapped layer into a ConfigError that names the layer."""
    running: list[str] = []
    hooks = []
    for name, layer in neighbor_layers(model).items():
        hooks.append(layer.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
        hooks.append(layer.register_forward_hook(lambda *_: running.pop() and None))
    try:
        yield
    except ValueError as error:
        where = f"layer '{running[-1]}': " if running else ""
        raise ConfigError(f"{where}{error}") from error
    finally:
        for hook in hooks:
            hook.remove()


def forward_cost(model: nn.Module, channels: int, image_size: int, watch: Iterable[str] = ()) -> Cost:
    """Return the operations of the forward pass of one image (see ``convnn.models.flops``), without computing it.

    Raises:
        ConfigError: if the model cannot process an image of this size, for instance for lack of candidates.
    """
    model = on_meta(model)
    image = torch.empty(1, channels, image_size, image_size, device="meta")
    with _name_failing_layer(model):
        try:
            return count_operations(model, image, watch)
        except ValueError:
            raise
        except Exception as error:  # whatever a backbone makes of arguments that its constructor let pass
            raise ConfigError(
                f"the model cannot process a {image_size}x{image_size} image: {first_line(error)}"
            ) from error


def parameters_without_gradient(model: nn.Module, schedule: ScheduleConfig, channels: int, image_size: int) -> set[str]:
    """Return the trainable parameters that get no gradient at the start, the middle or the end of a schedule.

    DistributedDataParallel has to be told of them. An example: at blend 1 a layer with ``weighting=ones`` uses queries
    and keys only to select neighbours; no gradient passes a selection, so their projections get none.
    """
    # Found in the graph of a forward pass, whose leaves are the parameters; a backward pass would need memory for all.
    training, device = model.training, next(model.parameters()).device
    idle: set[str] = set()
    model.eval()
    for time in (0.5, 1.0, 0.0):
        apply_schedule(model, schedule, time)
        with torch.random.fork_rng():
            output = model(torch.zeros(1, channels, image_size, image_size, device=device))
        seen: set[Any] = set()
        left = [output.grad_fn]
        while left:
            node = left.pop()
            if node is not None and node not in seen:
                seen.add(node)
                left += [function for function, _ in node.next_functions]
        reached = {id(node.variable) for node in seen if hasattr(node, "variable")}
        idle |= {name for name, p in model.named_parameters() if p.requires_grad and id(p) not in reached}
    model.train(training)
    return idle
