"""Divergence: whether every step's loss and gradient are finite, checked without waiting for the device."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from convnn.runtime import distributed
from convnn.train.state import RunState

log = logging.getLogger("convnn")
_NEVER = torch.iinfo(torch.int64).max


class DivergenceCheck:
    """Clips the gradient, and tells whether the optimizer may take a step."""

    def __init__(self, model: nn.Module, clip_grad: float | None, allowed: int) -> None:
        """Watch a model.

        Args:
            model: on its device.
            clip_grad: largest norm of the whole gradient; None: no clipping.
            allowed: steps that may be skipped in all. Above 0, every step waits for the device.
        """
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.buffers = list(model.buffers()) if allowed else []
        self.clip_grad, self.allowed = clip_grad, allowed
        self._kept: list[Tensor] = []
        # The first step of a loss, and the first of a gradient, that was not finite. It stays on the device, as to
        # look at it each step would make the host wait for each step.
        self._bad = torch.full((2,), _NEVER, device=self.parameters[0].device)

    def before_forward(self) -> None:
        """Note what a forward pass changes, such as the running means of batch normalisation."""
        self._kept = [buffer.clone() for buffer in self.buffers]

    def may_step(self, loss: Tensor, state: RunState) -> bool:
        """Return whether the optimizer may use the gradient of a loss, after ``backward``; count the step if not."""
        if self.clip_grad is not None:
            norm = nn.utils.clip_grad_norm_(self.parameters, self.clip_grad)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        state.grad_norms.append(norm.detach())
        finite = torch.stack([loss.detach().isfinite(), norm.isfinite()])
        if self.allowed:  # all processes skip, or none
            finite = distributed.reduce(finite.int(), "MIN").bool()
        if self.allowed and not finite.all():
            state.skipped_steps += 1
            for buffer, kept in zip(self.buffers, self._kept, strict=True):
                buffer.copy_(kept)
            if state.skipped_steps <= self.allowed:
                what = _what(*(not f for f in finite.tolist()))
                text = "step %d skipped: %s is not finite (%d of %d)"
                log.warning(text, state.step, what, state.skipped_steps, self.allowed)
                return False
        self._bad = torch.where(finite, self._bad, self._bad.clamp(max=state.step))
        return True

    def first_nonfinite(self) -> tuple[int, str] | None:
        """Return the step that ended the run and what was not finite there, or None. Waits for the device."""
        loss, gradient = distributed.reduce(self._bad, "MIN").tolist()
        step = min(loss, gradient)
        return None if step == _NEVER else (step, _what(loss == step, gradient == step))


def _what(loss: bool, gradient: bool) -> str:
    return "loss" if loss else "gradient"
