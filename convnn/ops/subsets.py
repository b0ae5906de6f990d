"""Random subsets of tokens, drawn from a generator of their own.

Processes that train one model must draw the same candidates, but each its own dropout; one generator cannot do both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, library

_generator: torch.Generator | None = None


def seed_subsets(seed: int | None, device: torch.device | None = None) -> None:
    """Seed the generator of the subsets, on ``device``; None: use torch's global generator again, as by default."""
    global _generator
    _generator = None if seed is None else torch.Generator(device or "cpu").manual_seed(seed)


@contextmanager
def same_subsets() -> Iterator[None]:
    """Restore the generator of the subsets on exit, so that the code after it draws the same subsets again."""
    generator = _generator
    state = None if generator is None else generator.get_state()
    try:
        yield
    finally:
        if generator is not None and state is not None:
            generator.set_state(state)


# A custom operator, which torch.compile calls as it is: it cannot trace a generator.
@library.custom_op("convnn::random_subset", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def random_subset(total: int, count: int, device: torch.device) -> Tensor:
    """Return ``count`` of ``range(total)`` drawn at random, sorted: (count,) int64."""
    own = _generator is not None and _generator.device.type == device.type
    order = torch.randperm(total, generator=_generator if own else None, device=device)
    return order[:count].sort().values


@random_subset.register_fake
def _(total: int, count: int, device: torch.device) -> Tensor:
    return torch.empty(count, dtype=torch.int64, device=device)
