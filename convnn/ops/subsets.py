"""Random subsets of tokens. Processes that train one model draw the same ones, whatever else they draw."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, library

_generator: torch.Generator | None = None


def seed_subsets(seed: int | None, device: torch.device | None = None) -> None:
    """Draw from a generator of their own on ``device``, seeded here; None: from torch's global one, as at first."""
    global _generator
    _generator = None if seed is None else torch.Generator(device or "cpu").manual_seed(seed)


@contextmanager
def same_subsets() -> Iterator[None]:
    """Leave the subsets' own generator as it was, so that what follows draws what was drawn inside."""
    generator = _generator
    state = None if generator is None else generator.get_state()
    try:
        yield
    finally:
        if generator is not None and state is not None:
            generator.set_state(state)


# An operator to the compiler, which cannot trace generators.
@library.custom_op("convnn::random_subset", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def random_subset(total: int, count: int, device: torch.device) -> Tensor:
    """Return ``count`` of ``range(total)`` drawn at random, sorted: (count,) int64."""
    own = _generator is not None and _generator.device.type == device.type
    order = torch.randperm(total, generator=_generator if own else None, device=device)
    return order[:count].sort().values


@random_subset.register_fake
def _(total: int, count: int, device: torch.device) -> Tensor:
    return torch.empty(count, dtype=torch.int64, device=device)
