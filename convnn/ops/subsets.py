"""Random subsets of tokens. Processes that train one model draw the same ones, whatever else they draw."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, library

_generator: torch.Generator | None = None
_drawn: dict[tuple[int, int, int], Tensor] = {}
"""Subsets of this step by total, count and the number that torch's global generator gave when they were drawn."""
_KEPT = 4096
"""Subsets kept at most: more than layers draw in any step."""


def seed_subsets(seed: int | None, device: torch.device | None = None) -> None:
    """Draw from a generator of their own on ``device``, seeded here; None: from torch's global one, as at first."""
    global _generator
    _generator = None if seed is None else torch.Generator(device or "cpu").manual_seed(seed)
    _drawn.clear()


@contextmanager
def same_subsets() -> Iterator[None]:
    """Leave the subsets' own generator as it was, so that what follows draws what was drawn inside."""
    generator, drawn = _generator, dict(_drawn)
    state = None if generator is None else generator.get_state()
    try:
        yield
    finally:
        if generator is not None and state is not None:
            generator.set_state(state)
            _drawn.clear()
            _drawn.update(drawn)


# An operator to the compiler, which cannot trace generators.
@library.custom_op("convnn::random_subset", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def random_subset(total: int, count: int, device: torch.device) -> Tensor:
    """Return ``count`` of ``range(total)`` drawn at random, sorted: (count,) int64.

    A forward pass that is computed again in the backward pass (``torch.utils.checkpoint``) gets the subset that it had:
    checkpointing puts the state of torch's global generator back, which the own generator knows nothing of. So each
    draw takes a number of the global generator along, and a number that came before brings its subset again.
    """
    if _generator is None or _generator.device.type != device.type:
        return torch.randperm(total, device=device)[:count].sort().values
    mark = int(torch.randint(2**62, (1,)))
    key = (total, count, mark)
    if key not in _drawn:
        while len(_drawn) >= _KEPT:
            _drawn.pop(next(iter(_drawn)))
        _drawn[key] = torch.randperm(total, generator=_generator, device=device)[:count].sort().values
    return _drawn[key].clone()  # what an operator returns is its caller's


@random_subset.register_fake
def _(total: int, count: int, device: torch.device) -> Tensor:
    return torch.empty(count, dtype=torch.int64, device=device)
