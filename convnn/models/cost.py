"""A model examined before training: its output, its operations, and the parameters that will get no gradient."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from convnn.config.schema import ScheduleConfig
from convnn.errors import ConfigError, first_line
from convnn.models.flops import Cost, count_operations, on_meta
from convnn.models.inspect import evaluating
from convnn.models.memory import training_memory
from convnn.models.schedule import apply_schedule
from convnn.models.swap import SwapReport, neighbor_layers
from convnn.ops.neighborhood import same_draws

log = logging.getLogger("convnn")
DEAR = 5
"""Times the operations of the plain network from which a swap is worth a warning."""


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


def check_output(model: nn.Module, channels: int, image_size: int, classes: int) -> None:
    """Let a model process an image where it is, so that what it cannot do shows before the first step.

    Raises:
        ConfigError: if it fails, for instance for lack of candidates, or does not return a logit for each class.
    """
    device = next(model.parameters()).device
    with _name_failing_layer(model), evaluating(model):
        try:
            output = model(torch.zeros(1, channels, image_size, image_size, device=device))
        except (ValueError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a backbone makes of arguments that its constructor let pass
            raise ConfigError(
                f"the model cannot process a {image_size}x{image_size} image: {first_line(error)}"
            ) from error
    _check_logits(output, 1, classes, "")
    try:
        with torch.no_grad(), same_draws(torch.device("cpu")):
            output = on_meta(model).train()(torch.empty(2, channels, image_size, image_size, device="meta"))
    except Exception:  # for lack of data, which says nothing about training
        return
    _check_logits(output, 2, classes, " in training")


def _check_logits(output: Any, images: int, classes: int, when: str) -> None:
    shape = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
    if shape != (images, classes):
        raise ConfigError(
            f"the model returns {shape}{when} for {images} image(s), not {(images, classes)}, a logit for each class; "
            "change backbone.name or backbone.kwargs"
        )


def forward_cost(model: nn.Module, channels: int, image_size: int, watch: Iterable[str] = ()) -> Cost:
    """Return the operations of the forward pass of one image (see ``convnn.models.flops``), without computing it.

    Raises:
        ConfigError: if they cannot be counted. That says nothing about training: see ``check_output``.
    """
    try:
        image = torch.empty(1, channels, image_size, image_size, device="meta")
        copy = on_meta(model)
        with _name_failing_layer(copy):
            return count_operations(copy, image, watch)
    except ConfigError:
        raise
    except Exception as error:  # whatever a backbone, or torch's counter, makes of tensors without data
        raise ConfigError(f"the operations cannot be counted: {first_line(error)}") from error


def count_cost(model: nn.Module, channels: int, image_size: int, report: SwapReport) -> tuple[float | None, SwapReport]:
    """Return GFLOPs of the forward pass of one image, and the report with those of each layer.

    Where they cannot be counted, which is no reason not to train, a warning says so: None, and the report as it was.
    """
    try:
        cost = forward_cost(model, channels, image_size, [row.name for row in report.rows])
        return cost.total / 1e9, report.with_costs(cost)
    except Exception as error:  # a layer that the forward pass leaves out, an operation that needs data
        log.warning("GFLOPs unknown: %s", first_line(error))
        return None, report


def count_memory(model: nn.Module, channels: int, image_size: int, report: SwapReport, batch: int) -> SwapReport:
    """Return the report with the memory of a training step of ``batch`` images (see ``convnn.models.memory``).

    Without replaced layers, or where it cannot be counted, which is no reason not to train, the report stays as it was.
    """
    plain = {row.name: row.plain for row in report.rows}
    try:
        image = channels, image_size, image_size
        return replace(report, memory=training_memory(model, plain, image, batch)) if plain else report
    except Exception as error:  # an operation that needs data
        log.info("memory unknown: %s", first_line(error))
        return report


def dear_swap(gflops: float | None, report: SwapReport) -> str | None:
    """Say so if a swap multiplies the operations of a forward pass by more than ``DEAR``, and what is cheaper.

    Args:
        gflops: of the swapped model, see ``count_cost``; None: unknown.
        report: of the swap, with costs.
    """
    times = cost_ratio(gflops, report)
    if gflops is None or times is None or times <= DEAR:
        return None
    return (
        f"the swap takes {times:.0f} times the operations of the plain network "
        f"({gflops / times:.3g} -> {gflops:.3g} GFLOPs an image); cheaper: swap=last_half, "
        "or operator.candidates=random operator.num_candidates=64"
    )


def cost_ratio(gflops: float | None, report: SwapReport) -> float | None:
    """Return how many times the operations of the plain network the swapped one takes; None: unknown."""
    before, after = (sum(getattr(row, f"flops_{when}") or 0 for row in report.rows) for when in ("before", "after"))
    plain = None if gflops is None else gflops - (after - before) / 1e9
    return gflops / plain if gflops and plain else None


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
