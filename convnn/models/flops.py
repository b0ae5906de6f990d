"""Operations of a forward pass, counted before training: torch's FLOP counter, and what that does not see.

Shapes: N tokens, Q queries, K neighbours, H heads, C input channels, D channels per head.

Counted are matrix products and convolutions, 2 for a multiplication and an addition, and the elementwise products
and sums of an aggregation, H Q K D each: 1 for the weights of the neighbours, 1 for their sum, 2 for depthwise slot
weights. Norms, activations, biases and the ordering of the scores are not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from convnn.nn.base import first_tensor
from convnn.nn.conv import ConvNN2d
from convnn.nn.neighbor_attention import NeighborAttention
from convnn.ops.aggregation import in_blocks
from convnn.ops.candidates import most_candidates


@dataclass(frozen=True)
class Call:
    """What a module was called with."""

    args: tuple[Any, ...]
    given: dict[str, Any]

    def on_meta(self) -> Call:
        """Return the call without the tensors' data; a tensor that came twice comes twice."""
        bare: dict[int, Tensor] = {}

        def emptied(x: Any) -> Any:
            return bare.setdefault(id(x), torch.empty_like(x, device="meta")) if isinstance(x, Tensor) else x

        return Call(*tree_map(emptied, (self.args, self.given)))


@dataclass(frozen=True)
class Cost:
    """Operations of one forward pass."""

    total: int
    layers: dict[str, int]
    """Of each watched module, by name."""
    calls: dict[str, Call]
    """The last call of each watched module, on the meta device, by name."""


def on_meta(model: nn.Module) -> nn.Module:
    """Return a copy without data, on torch's meta device: it takes no memory, and its forward pass no time."""
    memo: dict[int, Tensor] = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    memo |= {id(b): b.to("meta") for b in model.buffers()}
    return copy.deepcopy(model, memo)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter ask for a gradient: torch's counter fails where a module is called with one, such as CLS."""
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def count_operations(model: nn.Module, image: Tensor | Call, watch: Iterable[str] = ()) -> Cost:
    """Return the operations of ``model(image)`` in evaluation mode, and those of the modules named in ``watch``.

    The model and the random generators are left as they were.
    """
    missed, start = 0, {}
    layers: dict[str, int] = {}
    calls: dict[str, Call] = {}
    call = image if isinstance(image, Call) else Call((image,), {})
    counter = FlopCounterMode(display=False)

    def add(layer: ConvNN2d | NeighborAttention, args: tuple[Any, ...], given: dict[str, Any], out: Any) -> None:
        nonlocal missed
        missed += elementwise_operations(layer, first_tensor(args, given))

    def before(name: str, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        start[name], calls[name] = counter.get_total_flops() + missed, Call(args, given).on_meta()

    def after(name: str) -> None:
        layers[name] = layers.get(name, 0) + counter.get_total_flops() + missed - start[name]

    ours = [m for m in model.modules() if isinstance(m, (ConvNN2d, NeighborAttention))]
    hooks = [m.register_forward_hook(add, with_kwargs=True) for m in ours]
    for name in watch:
        module = model.get_submodule(name)
        pre = partial(_noted, before, name)
        hooks.append(module.register_forward_pre_hook(pre, with_kwargs=True))
        hooks.append(module.register_forward_hook(lambda *_, name=name: after(name)))
    training = model.training
    model.eval()
    try:
        with _frozen(model), torch.no_grad(), torch.random.fork_rng(), in_blocks(), counter:
            model(*call.args, **call.given)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    return Cost(counter.get_total_flops() + missed, layers, calls)


def _noted(note: Callable[..., None], name: str, _: nn.Module, args: Any, given: Any) -> None:
    note(name, args, given)


@dataclass(frozen=True)
class Aggregated:
    """What a layer aggregates of one image."""

    queries: int
    """Of all heads and windows."""
    candidates: int
    """Tokens that a query is compared with, at most."""
    neighbors: int
    """Of a query."""
    channels: int
    """Of a neighbour."""


def aggregated(layer: ConvNN2d | NeighborAttention, x: Tensor) -> Aggregated | None:
    """Return what a layer aggregates of an image, after a call with ``x``; None: a convolution or attention does it."""
    if isinstance(layer, ConvNN2d):
        sides = x.shape[-2:] if x.ndim == 4 else (1, x.shape[-1])
        height, width = (side // layer.shuffle for side in sides)
        geometry = layer.geometry(height, width)
        if layer.fast and layer.weight is not None and layer.is_convolution(geometry, layer.k):
            return None
        channels, heads = x.shape[1] * layer.shuffle**2 + 2 * layer.coordinates, 1
    else:
        windows, geometry = layer.last_call(x)
        if layer.is_fused(geometry):
            return None
        channels, heads = layer.head_dim, layer.num_heads * windows
    selection, tokens = layer.selection, geometry.num_tokens
    chosen = {"random": selection.num_candidates, "grid": selection.num_candidates**2}.get(selection.candidates, tokens)
    neighbors = min(layer.k, most_candidates(geometry, selection, None)[1])
    return Aggregated(heads * len(geometry.query_index()), min(tokens, chosen + geometry.prefix), neighbors, channels)


def elementwise_operations(layer: ConvNN2d | NeighborAttention, x: Tensor) -> int:
    """Return the elementwise operations of a layer's aggregation, which the FLOP counter does not see."""
    work = aggregated(layer, x)
    if work is None:
        return 0
    if isinstance(layer, ConvNN2d):
        single = layer.weight is None or layer.mix_groups == work.channels == layer.weight.shape[0]
        sums = {"depthwise": 2, "separable": 2, "conv": 2}.get(layer.aggregation, 1) if single else 0
    else:
        sums = {"depthwise": 2, "separable": 2, "sum": 1}.get(layer.aggregation, 0)
    weights = int(layer.mixing.weighting != "ones")
    return (weights + sums) * work.queries * work.neighbors * work.channels
