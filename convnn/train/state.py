"""How far a run has come: what each checkpoint holds besides the weights, so that a run goes on exactly there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from convnn.runtime import distributed
from convnn.train.evaluate import Meter

_AS_THEY_ARE = ("epoch", "step_in_epoch", "step", "best", "train_seconds", "train_images", "skipped_steps")


@dataclass
class RunState:
    """How far a run has come.

    Random generators are no part of it: every step and every evaluation seeds them anew from the run's seed and the
    number of the step (``seed_step``), so that a run can be entered at any step.
    """

    meter: Meter
    """Loss and accuracy since the epoch began; of the images of this process alone."""
    epoch: int = 0
    """Epochs that have been trained and evaluated; also the number of the epoch that is under way."""
    step_in_epoch: int = 0
    """Steps taken in the epoch that is under way."""
    step: int = 0
    """Steps taken in all, skipped ones among them."""
    best: dict[str, float] = field(default_factory=dict)
    """``epoch``, ``val_top1`` and ``test_top1`` of the best epoch so far; empty before the first evaluation."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """The rows of metrics.jsonl, one an epoch."""
    train_seconds: float = 0.0
    """Time spent in training steps."""
    train_images: int = 0
    """Images trained on, over all processes."""
    skipped_steps: int = 0
    """Steps left out, as their loss or gradient was not finite."""
    grad_norms: list[Tensor] = field(default_factory=list)
    """Norm of the whole gradient, before clipping, of each step since the epoch began. They stay on the device."""
    layer_norms: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """By the name of a replaced layer its norms after the epoch's last step; empty before."""
    neighbors: dict[str, Tensor] = field(default_factory=dict)
    """What each layer chose at the last measurement, by name, see ``convnn.train.probe``."""

    def to_checkpoint(self) -> dict[str, Any]:
        """Return the state as plain types and tensors; every process must ask, for the meters of all are gathered."""
        values = {name: getattr(self, name) for name in _AS_THEY_ARE}
        meters = distributed.gather(self.meter.sums.tolist())
        norms = torch.stack(self.grad_norms).tolist() if self.grad_norms else []
        values |= {"grad_norms": norms, "layer_norms": self.layer_norms}
        return values | {"meter": meters, "rows": json.dumps(self.rows), "neighbors": self.neighbors}

    @classmethod
    def from_checkpoint(cls, saved: Mapping[str, Any], device: torch.device) -> RunState:
        """Return the state in a checkpoint, for this process; ``device``: of the meter."""
        world = distributed.world()
        sums = torch.tensor(saved["meter"], dtype=torch.float64).view(-1, 4)
        if len(sums) != world.size:  # written by another number of processes: the first goes on with what all had
            sums = torch.cat([sums.sum(0, keepdim=True), sums.new_zeros(world.size - 1, 4)])
        return cls(
            meter=Meter.of(sums[world.rank].tolist(), device),
            rows=json.loads(saved["rows"]),
            # Older checkpoints have none of these.
            grad_norms=list(torch.tensor(saved.get("grad_norms", []), device=device)),
            layer_norms=saved.get("layer_norms", {}),
            neighbors=saved.get("neighbors", {}),
            **{name: saved[name] for name in _AS_THEY_ARE},
        )
