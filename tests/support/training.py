"""Runs that are stopped and resumed."""

import contextlib
import itertools
import signal

from helpers import without_times

from convnn.runs.metrics import read_metrics
from convnn.train import run as running

# All that could break a resume at once.
HARD = [
    "train.epochs=3",
    "schedule=linear",
    "operator=spectrum",
    "swap.init=transfer",
    "operator.candidates=random",
    "operator.num_candidates=24",
    "operator.eval_candidates=resample",
    "data.val_fraction=0.25",
    "data.crop_padding=2",
    "data.flip=true",
    "train.batch_size=16",
    "train.mixup=0.4",
    "train.cutmix=0.5",
    "train.label_smoothing=0.1",
    "train.ema=0.9",
    "backbone.drop_rate=0.2",
    "optim.clip_grad=1.0",
    "swap=first_half",
]


def stop_after(monkeypatch, calls, signum=signal.SIGTERM):
    """Make a run see a signal at the given look at ``StopSignals.seen``, and at all later ones."""

    class Signals(contextlib.nullcontext):
        def __init__(self, *_, **__):
            super().__init__(self)
            self.looks = itertools.count()

        @property
        def seen(self):
            return signum if next(self.looks) >= calls else None

    monkeypatch.setattr(running, "StopSignals", Signals)


def rows(folder):
    return [without_times(row) for row in read_metrics(folder / "metrics.jsonl")]


def rates_of(optimizer, schedule, steps):
    """The learning rate of every step."""
    found = []
    for step in range(steps):
        if schedule is not None:
            schedule.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found
