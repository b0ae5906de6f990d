"""Operations of a forward pass, counted before training: torch's FLOP counter, and what that does not see.

Shapes: N tokens, Q queries, K neighbours, H heads, C input channels, D channels per head.

Counted are matrix products and convolutions, 2 for a multiplication and an addition, and the elementwise products
and sums of an aggregation, H Q K D each: 1 for the weights of the neighbours, 1 for their sum, 2 for depthwise slot
weights. Norms, activations, biases and the ordering of the scores are not.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from convnn.nn.attention import ConvNNAttention
from convnn.nn.conv import ConvNN2d
from convnn.ops.aggregation import in_blocks
from convnn.ops.candidates import most_candidates


@dataclass(frozen=True)
class Cost:
    """Operations of one forward pass."""

    total: int
    layers: dict[str, int]
    """Of each watched module, by name."""
    inputs: dict[str, tuple[int, ...]]
    """Input shape of each watched module, by name."""


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


def count_operations(model: nn.Module, image: Tensor, watch: Iterable[str] = ()) -> Cost:
    """Return the operations of ``model(image)`` in evaluation mode, and those of the modules named in ``watch``.

    The model and the random generators are left as they were.
    """
    missed, start = 0, {}
    layers: dict[str, int] = {}
    inputs: dict[str, tuple[int, ...]] = {}
    counter = FlopCounterMode(display=False)

    def add(layer: ConvNN2d | ConvNNAttention, args: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal missed
        missed += elementwise_operations(layer, args[0])

    def before(name: str, args: tuple[Tensor, ...]) -> None:
        start[name], inputs[name] = counter.get_total_flops() + missed, tuple(args[0].shape)

    def after(name: str) -> None:
        layers[name] = layers.get(name, 0) + counter.get_total_flops() + missed - start[name]

    hooks = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, (ConvNN2d, ConvNNAttention))]
    for name in watch:
        module = model.get_submodule(name)
        hooks.append(module.register_forward_pre_hook(lambda _, args, name=name: before(name, args)))
        hooks.append(module.register_forward_hook(lambda *_, name=name: after(name)))
    training = model.training
    model.eval()
    try:
        with _frozen(model), torch.no_grad(), torch.random.fork_rng(), in_blocks(), counter:
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    return Cost(counter.get_total_flops() + missed, layers, inputs)


def elementwise_operations(layer: ConvNN2d | ConvNNAttention, x: Tensor) -> int:
    """Return the elementwise operations of a layer's aggregation, which the FLOP counter does not see."""
    if isinstance(layer, ConvNN2d):
        sides = x.shape[-2:] if x.ndim == 4 else (1, x.shape[-1])
        height, width = (side // layer.shuffle for side in sides)
        geometry = layer.geometry(height, width)
        if layer.fast and layer.weight is not None and layer.is_convolution(geometry, layer.k):
            return 0
        channels, heads = x.shape[1] * layer.shuffle**2 + 2 * layer.coordinates, 1
        single = layer.weight is None or layer.mix_groups == channels == layer.weight.shape[0]
        sums = {"depthwise": 2, "separable": 2, "conv": 2}.get(layer.aggregation, 1) if single else 0
    else:
        geometry = layer.layout_of(x.shape[1])
        if layer.is_fused(geometry):
            return 0
        channels, heads = layer.head_dim, layer.num_heads
        sums = {"depthwise": 2, "separable": 2, "sum": 1}.get(layer.aggregation, 0)
    neighbors = min(layer.k, most_candidates(geometry, layer.selection, None)[1])
    weights = int(layer.mixing.weighting != "ones")
    return (weights + sums) * heads * len(geometry.query_index()) * neighbors * channels
