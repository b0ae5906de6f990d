"""What an adapter tells of one kind of attention layer. A new kind is one file and one ``register_adapter``.

Shapes: B batch, H heads, Q queries, N tokens (Q is N but where said), D channels per head of queries and keys, C of
values.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from timm.layers.attention import Attention
from torch import Tensor, nn

from convnn.nn.neighbor_attention import Heads


class Adapter:
    """Reads layers of some classes, so that ``ConvNNAttention`` can take their place.

    The layer itself stays inside its replacement: ``read`` makes queries, keys and values with its parameters,
    neighbours are chosen and mixed, and ``write`` makes the layer's output of what comes out. An adapter keeps nothing.
    """

    layers: tuple[str, ...] = ()
    """The classes, as ``package.module:Class``. They are looked up among the modules that were imported, so that
    nothing is imported for an adapter. Subclasses count as long as they have the same ``forward``."""
    grid_from_model = True
    """The tokens after the prefix are the model's patches. False: ``read`` tells their grid, or they have none."""
    in_turn = False
    """Heads come one after another, each made of the output of those before; see ``attend``."""

    def refusal(self, layer: Any) -> str | None:
        """Return why this layer cannot be replaced ("mixes channels, not tokens"), or None."""
        return None

    def loss(self, layer: Any) -> str | None:
        """Return what of the layer a replacement does not have, so that its function is not transferred, or None."""
        return None

    def attention(self, layer: Any) -> Attention | None:
        """Return timm's plain ``Attention`` of the same function, which every operator can replace, or None."""
        return None

    def prefix(self, layer: Any) -> int | None:
        """Return the number of tokens before the grid that the layer sees, or None: as many as the model says."""
        return None

    def tokens(self, layer: Any) -> int | None:
        """Return N, of the keys, where the layer is made for one number of tokens, such as a window's, else None."""
        return None

    def size(self, layer: Any) -> tuple[int, int]:
        """Return H and C."""
        return layer.num_heads, layer.proj.in_features // layer.num_heads

    def dropout(self, layer: Any) -> float:
        """Return the probability of dropping an attention weight."""
        drop = getattr(layer, "attn_drop", None)
        return drop.p if isinstance(drop, nn.Dropout) else 0.0

    def stands_for(self, layer: Any) -> dict[str, Any]:
        """Return attributes of the layer that the modules around it read, and that the replacement has otherwise."""
        return {}

    def start(self, layer: Any) -> None:
        """Fill what begins at neither the values of the layer's ``reset_parameters`` nor zeros, for ``init=fresh``."""

    def read(self, layer: Any, *args: Any, **given: Any) -> Heads:
        """Return what the layer compares and mixes. Here its ``qkv`` of what it is called with, (B, N, channels).

        Args:
            layer: one of ``layers``.
            *args: what the model calls it with; an adapter declares the arguments that its layers take.
            **given: by name.

        Raises:
            ValueError: for an argument that has no meaning with fewer neighbours, such as a causal mask.
        """
        return Heads(*split(layer.qkv(*args, **given), layer.num_heads))

    def write(self, layer: Any, y: Tensor, heads: Heads) -> Any:
        """Return the layer's output: (B, H, Q, C) -> what its ``forward`` returns. Here its ``proj`` and dropout."""
        return layer.proj_drop(layer.proj(merged(y)))

    def attend(self, layer: Any, mix: Callable[[Heads], Tensor], *args: Any, **given: Any) -> Any:
        """Return the layer's output; ``mix`` gives what queries get from their neighbours, (B, H, Q, C).

        Only layers that are ``in_turn`` need more than this: they call ``mix`` for each head, with its number in
        ``Heads.head``.
        """
        heads = self.read(layer, *args, **given)
        return self.write(layer, mix(heads), heads)


class Refusal(Adapter):
    """Layers that are called attention, but have no k nearest tokens to choose."""

    def __init__(self, reason: str, *layers: str) -> None:
        self.reason, self.layers = reason, layers

    def refusal(self, layer: Any) -> str | None:
        """Return the reason."""
        return self.reason


def classes_of(adapter: Adapter) -> tuple[type, ...]:
    """Return the classes of an adapter whose modules were imported."""
    found = (name.split(":") for name in adapter.layers)
    classes = (getattr(sys.modules.get(module), name, None) for module, name in found)
    return tuple(c for c in classes if isinstance(c, type))


def split(x: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values: (B, N, 3 * H * D) -> three (B, H, N, D)."""
    b, n, _ = x.shape
    q, k, v = x.reshape(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def halves(x: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Return two parts of the channels, per head: (B, N, 2 * H * D) -> two (B, H, N, D)."""
    one, other = x.chunk(2, dim=-1)
    return per_head(one, heads), per_head(other, heads)


def per_head(x: Tensor, heads: int) -> Tensor:
    """Return (B, N, H * D) as (B, H, N, D)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merged(y: Tensor) -> Tensor:
    """Return (B, H, N, C) as (B, N, H * C)."""
    return y.transpose(1, 2).flatten(2)


def scaled(q: Tensor, scale: float) -> Tensor:
    """Return queries such that q.k / sqrt(D) is ``scale`` times the product of before."""
    factor = scale * math.sqrt(q.shape[-1])
    return q if abs(factor - 1) < 1e-12 else q * factor


def biased(layer: Any, x: Tensor) -> Tensor:
    """Return ``layer.qkv`` of x with the biases that BEiT and its kin keep apart, none for the keys."""
    qkv = layer.qkv(x)
    return qkv if layer.q_bias is None else qkv + torch.cat([layer.q_bias, layer.k_bias, layer.v_bias])


def refuse(**given: Any) -> None:
    """Raise ValueError for an argument that is given (neither None nor False)."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise ValueError(f"{name} is not supported: neighbours are chosen among all tokens")
