"""The memory that a swap takes in training, counted before it starts.

Counted are the activations that autograd keeps for the backward pass, which grow with the batch, of the swapped model
and of the plain one; and the most that a replaced layer holds besides while it works on a GPU, which is bounded. Both
in float32: 16-bit activations are half as large. Parameters, their gradients and the optimizer's state are not counted,
nor what plain layers need while they work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from convnn.models.flops import Aggregated, aggregated, on_meta
from convnn.nn.base import first_tensor
from convnn.nn.conv import ConvNN2d
from convnn.nn.neighbor_attention import NeighborAttention
from convnn.ops.edges import CHUNK_BYTES
from convnn.ops.neighborhood import same_draws
from convnn.ops.scores import CHUNK_SCORES_ELSEWHERE
from convnn.text import size

_NUMBER = 4
"""Bytes of a float32."""
_IMAGES = 127
"""Counted at a time. It is prime, so that what grows with the batch is known from what does not, copies of weights."""
_RANKED = 24
"""Bytes that a score takes while it is ranked: itself, its key of 64 bits, and steps on the way to that."""
_CHUNKS = 3
"""Chunks of gathered neighbours that a backward pass holds: the neighbours, their gradient, and the product of both."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step, counted."""

    batch: int
    """Images of the step."""
    kept: int
    """Activations that autograd keeps of the swapped model."""
    kept_plain: int
    """The same of the model before the swap."""
    working: int
    """The most that a replaced layer holds besides, on a GPU with plain torch."""

    @property
    def extra(self) -> int:
        """What the swap adds to the peak of the plain model, at most."""
        return max(0, self.kept - self.kept_plain) + self.working

    def __str__(self) -> str:
        return (
            f"memory of a training step of {self.batch} images in float32: {size(self.kept)} kept for the backward "
            f"pass ({size(self.kept_plain)} by the plain network), and on a GPU up to {size(self.working)} while a "
            "replaced layer works"
        )


def training_memory(
    model: nn.Module, plain: Mapping[str, nn.Module], image: tuple[int, int, int], batch: int
) -> Memory:
    """Return what a training step needs, without computing it; the model is left as it is.

    Args:
        model: with replaced layers.
        plain: what they replaced, without data, by name.
        image: channels, height and width.
        batch: images of a step.
    """
    swapped, before = on_meta(model).train(), on_meta(model).train()
    for name, layer in plain.items():
        replaced = before.get_submodule(name)
        for other, module in list(before.named_modules(remove_duplicate=False)):
            if module is replaced:
                before.set_submodule(other, on_meta(layer).train())
    working = [0]

    def note(layer: Any, args: tuple[Any, ...], given: dict[str, Any], _: Any) -> None:
        work = aggregated(layer, first_tensor(args, given))
        working.append(0 if work is None else _working(work, batch))

    for module in swapped.modules():
        if isinstance(module, (ConvNN2d, NeighborAttention)):
            module.register_forward_hook(note, with_kwargs=True)
    kept, kept_plain = (_kept(m, image, batch) for m in (swapped, before))
    return Memory(batch, kept, kept_plain, max(working))


def kept_for_backward(model: nn.Module, images: Tensor) -> list[int]:
    """Return the bytes of each storage that autograd keeps of a forward pass, parameters and buffers left out."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # alive, so that its number is not given to another
        return x

    with saved_tensors_hooks(pack, lambda x: x), _FusedAttention():
        model(images)
    return [storage.nbytes() for storage in kept.values()]


class _Attention(torch.autograd.Function):
    """Fused attention without data: it keeps what goes in, what comes out, and a number for each query and head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        # As the kernels do, so that the heads of a token lie side by side.
        out = q.new_empty(*q.shape[:-3], q.shape[-2], q.shape[-3], v.shape[-1]).transpose(-2, -3)
        ctx.save_for_backward(q, k, v, bias, out, q.new_empty(q.shape[:-1]))
        return out


class _FusedAttention(TorchFunctionMode):
    """Let fused attention without data keep what kernels keep; torch composes it there, with all pairs of tokens."""

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), given: Any = None) -> Any:
        given = given or {}
        if function is not F.scaled_dot_product_attention or args[0].device.type != "meta":
            return function(*args, **given)
        bias = args[3] if len(args) > 3 else given.get("attn_mask")
        return _Attention.apply(*args[:3], bias)


def _kept(model: nn.Module, image: tuple[int, int, int], batch: int) -> int:
    """Return the bytes that are kept of a batch."""
    with torch.enable_grad(), same_draws(torch.device("cpu")):
        found = kept_for_backward(model, torch.empty(_IMAGES, *image, device="meta"))
    return sum(count if count % _IMAGES else count // _IMAGES * batch for count in found)


def _working(work: Aggregated, batch: int) -> int:
    """Return the most that a layer holds while it works on a GPU: scores to be ranked, or gathered neighbours."""
    scores = min(batch * work.queries * work.candidates, CHUNK_SCORES_ELSEWHERE)
    gathered = min(batch * work.queries * work.neighbors * work.channels * _NUMBER, CHUNK_BYTES)
    return max(_RANKED * scores, _CHUNKS * gathered)
