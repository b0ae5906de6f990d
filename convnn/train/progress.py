"""How far an epoch has come: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import logging
import time
from types import TracebackType

from tqdm import tqdm

from convnn.config.schema import Config
from convnn.text import duration
from convnn.train.evaluate import Meter

log = logging.getLogger("convnn")
SECONDS = 30.0
"""Between two lines where ``train.log_every`` names no steps; a bar shows the loss six times as often."""


class Progress:
    """Shows steps of an epoch with loss, images per second and the time that is left of the run's training."""

    def __init__(self, config: Config, epoch: str, left: int, left_in_run: int, shows: bool) -> None:
        """Begin to count.

        Args:
            config: of the run.
            epoch: such as ``epoch 1/10``.
            left: steps of the epoch that are still to come.
            left_in_run: steps of the run that are.
            shows: False in all but the first of several processes.
        """
        self.every, self.batch = config.train.log_every, config.train.batch_size
        self.epoch, self.left, self.left_in_run, self.shows = epoch, left, left_in_run, shows
        self.bar = tqdm(total=left, desc=epoch, leave=False, disable=None if shows else True)  # None: by terminal
        self.done = self.told = 0
        self.start = self.last = time.perf_counter()

    def __enter__(self) -> Progress:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Remove the bar."""
        self.bar.close()

    def step(self, meter: Meter) -> None:
        """Count a step; ``meter`` has the loss of the epoch's steps, which is read, and waited for, if it is shown."""
        self.done += 1
        self.bar.update()
        now = time.perf_counter()
        if not self.shows or self.done >= self.left or not self._due(now):
            return
        loss, steps, seconds = meter.means()[0], self.done - self.told, now - self.last
        self.told, self.last = self.done, now
        if not self.bar.disable:
            self.bar.set_postfix_str(f"loss {loss:.4f}")
            return
        remaining = (now - self.start) / self.done * (self.left_in_run - self.done)
        log.info(
            "%s  step %d of %d  train loss %.4f  %.3g images/s  %s of training left",
            *(self.epoch, self.done, self.left, loss, steps * self.batch / seconds, duration(remaining)),
        )

    def _due(self, now: float) -> bool:
        if self.every is not None:
            return self.done % self.every == 0
        return now - self.last >= (SECONDS if self.bar.disable else SECONDS / 6)
