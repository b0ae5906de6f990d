"""Divergence: every step's loss and gradient are watched, without waiting for the device."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from convnn.runtime import distributed

log = logging.getLogger("convnn")
_NEVER = torch.iinfo(torch.int64).max


class StepGuard:
    """Clips the gradient, and tells whether a step may be taken."""

    def __init__(self, model: nn.Module, clip_grad: float | None, allowed: int) -> None:
        """Watch a model.

        Args:
            model: on its device.
            clip_grad: largest norm of the whole gradient; None: no clipping.
            allowed: steps that may be skipped in all. Above 0, every step waits for the device.
        """
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.buffers = list(model.buffers()) if allowed else []
        self.clip_grad, self.allowed, self.skipped = clip_grad, allowed, 0
        self._kept: list[Tensor] = []
        # The first step of a loss, and the first of a gradient, that was not finite.
        self._bad = torch.full((2,), _NEVER, device=self.parameters[0].device)

    def before_forward(self) -> None:
        """Note what a forward pass changes, such as the running means of batch normalisation."""
        self._kept = [buffer.clone() for buffer in self.buffers]

    def may_step(self, loss: Tensor, step: int) -> bool:
        """Look at the loss and, after ``backward``, at the gradient; return whether the optimizer may use it."""
        if self.clip_grad is not None:
            norm = nn.utils.clip_grad_norm_(self.parameters, self.clip_grad)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        finite = torch.stack([loss.detach().isfinite(), norm.isfinite()])
        if self.allowed:  # all processes skip, or none
            finite = distributed.reduce(finite.int(), "MIN").bool()
        if self.allowed and not finite.all():
            self.skipped += 1
            for buffer, kept in zip(self.buffers, self._kept, strict=True):
                buffer.copy_(kept)
            if self.skipped <= self.allowed:
                what = _what(*(not f for f in finite.tolist()))
                log.warning("step %d skipped: %s is not finite (%d of %d)", step, what, self.skipped, self.allowed)
                return False
        self._bad = torch.where(finite, self._bad, self._bad.clamp(max=step))
        return True

    def first_bad(self) -> tuple[int, str] | None:
        """Return the step that ended the run and what was not finite there, or None. Waits for the device."""
        loss, gradient = distributed.reduce(self._bad, "MIN").tolist()
        step = min(loss, gradient)
        return None if step == _NEVER else (step, _what(loss == step, gradient == step))


def _what(loss: bool, gradient: bool) -> str:
    return "loss" if loss else "gradient"
