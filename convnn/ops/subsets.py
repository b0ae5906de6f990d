"""Random subsets of tokens, drawn from a generator of their own.

Processes that train one model must draw the same candidates, but each its own dropout; one generator cannot do both.
"""

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
    """Seed the generator of the subsets, on ``device``; None: use torch's global generator again, as by default."""
    global _generator
    _generator = None if seed is None else torch.Generator(device or "cpu").manual_seed(seed)
    _drawn.clear()


@contextmanager
def same_subsets() -> Iterator[None]:
    """Restore the generator of the subsets on exit, so that the code after it draws the same subsets again."""
    generator, drawn = _generator, dict(_drawn)
    state = None if generator is None else generator.get_state()
    try:
        yield
    finally:
        if generator is not None and state is not None:
            generator.set_state(state)
            _drawn.clear()
            _drawn.update(drawn)


# A custom operator, which torch.compile calls as it is: it cannot trace a generator. A CUDA graph would
# repeat one draw.
_TAGS = torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe


@library.custom_op("convnn::random_subset", mutates_args=(), tags=_TAGS)
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
