"""What the checkpoints of a run take on the disk, before the first is written."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from convnn.config.schema import Config, OptimConfig
from convnn.train.optim import make_optimizer


@dataclass(frozen=True)
class CheckpointBytes:
    """Sizes in bytes."""

    training: int
    """The most that lies there while the run trains: for a moment a file that is written beside the one it replaces."""
    complete: int
    """What stays of a complete run."""


def checkpoint_bytes(model: nn.Module, config: Config) -> CheckpointBytes:
    """Return what the checkpoints of a run need, from the sizes of its tensors."""
    tensors = [value for value in model.state_dict().values() if isinstance(value, torch.Tensor)]
    weights = sum(t.numel() * t.element_size() for t in tensors) * (2 if config.train.ema else 1)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    whole = weights + round(trained * state_per_weight(config.optim))
    kept = config.checkpoint
    best = 0 if kept.keep == "last" else weights
    last = 0 if kept.keep == "best" else whole if kept.optimizer else weights
    return CheckpointBytes(3 * whole + best, last + best)


def state_per_weight(optim: OptimConfig) -> float:
    """Return how many numbers an optimizer keeps for each weight, as it does for a small layer: 2 for AdamW."""
    with torch.random.fork_rng(), torch.enable_grad():
        layer = nn.Linear(64, 64, bias=False)
        optimizer = make_optimizer(layer, optim)
        layer(torch.zeros(1, 64)).sum().backward()
        optimizer.step()
    kept = sum(
        value.numel()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    return kept / layer.weight.numel()
