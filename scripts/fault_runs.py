"""Faults on purpose: a small run in forked processes, power cuts inside writes, and comparison to the last bit."""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from convnn.cli.program import guarded, setup_logging
from convnn.config.compose import compose_config
from convnn.runtime.files import read_json

RUN = """
data=digits data.limit=128 data.limit_test=50 data.val_fraction=0.2 data.crop_padding=1 data.flip=true
backbone.stem=small backbone.drop_rate=0.2 +backbone.kwargs.channels=[4,4,8,8] +backbone.kwargs.layers=[1,1,1,1]
operator=spectrum operator.candidates=random operator.num_candidates=24 operator.eval_candidates=resample
swap=first_half swap.init=transfer schedule=linear train.epochs=4 train.batch_size=24 train.mixup=0.4 train.cutmix=0.5
train.label_smoothing=0.1 train.ema=0.9 optim.clip_grad=1.0 optim.warmup_epochs=1 tracker=jsonl device=cpu
run.if_exists=resume
"""

"""The run that is broken: all on that could break a resume."""


def forked(place: Path, call: Callable[[], int]) -> int:
    """Fork a process that writes to ``place``/log and ends with the code that a call returns; return its number."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        log = os.open(place / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = call()
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def start(place: Path, prepare: Callable[[], Any] = lambda: None) -> int:
    """Fork a process that trains in ``place``/run as train.py would, and return its number."""

    def prepared() -> int:
        prepare()
        return train(place)

    return forked(place, prepared)


def train(place: Path) -> Any:
    """Train in ``place``/run as train.py would; return the exit code."""
    code: Any = 70
    try:
        from convnn.train.run import run

        setup_logging()
        code = guarded(lambda: run(compose_config([*RUN.split(), f"run.dir={place}/run"]))).get("exit_code", 0)
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def wait(pid: int) -> int:
    """Return the exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Operations:
    """Counts operations on files in this process, and ends it at the given one as a power cut would."""

    def __init__(self, last: int | None, also: int | None = None) -> None:
        """Begin to count.

        Args:
            last: operation after which this process ends; None: it does not.
            also: number of a process that ends with it.
        """
        self.last, self.also, self.done = last, also, 0
        import torch

        save, fsync, replace, link = torch.save, os.fsync, Path.replace, Path.hardlink_to

        def save_in_parts(state: Any, file: Any) -> None:
            buffer = io.BytesIO()
            save(state, buffer)
            data = buffer.getvalue()
            for i in range(4):
                file.write(data[i * len(data) // 4 : (i + 1) * len(data) // 4])
                file.flush()
                self.count()

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any) -> Any:
                self.count()
                found = call(*args)
                self.count()
                return found

            return wrapped

        torch.save, os.fsync = save_in_parts, counted(fsync)  # type: ignore[assignment]
        Path.replace, Path.hardlink_to = counted(replace), counted(link)  # type: ignore[method-assign]

    def count(self) -> None:
        """Note an operation; never returns from the last one."""
        self.done += 1
        if self.done == self.last:
            if self.also is not None:
                os.kill(self.also, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl without their times."""
    from convnn.runs.metrics import read_metrics

    return [{k: v for k, v in row.items() if "seconds" not in k} for row in read_metrics(folder / "metrics.jsonl")]


def equal(a: Any, b: Any) -> bool:
    """Return whether two nested values are the same to the last bit."""
    import torch

    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(equal, a, b))
    return a == b


def load(folder: Path) -> dict[str, Any]:
    """Return what decides a run in its last checkpoint: all but times."""
    from convnn.runs.checkpoint import load_checkpoint

    state = load_checkpoint(folder / "checkpoints" / "last.pt")
    return {k: v for k, v in state.items() if k not in ("rows", "train_seconds")}


def compare(whole: Path, folder: Path) -> str | None:
    """Return in what a completed run differs from the uninterrupted one in ``whole``, or None."""
    if metrics(folder) != metrics(whole):
        return "metrics"
    results = [read_json(f / "result.json") or {} for f in (whole, folder)]
    keys = ("status", "fingerprint", "top1_last", "top1_at_best_val", "best_epoch", "steps", "skipped_steps")
    if any(results[0][k] != results[1].get(k) for k in keys):
        return "result.json"
    if not equal(load(folder), load(whole)):
        return "weights or state"
    extra = [p.name for p in folder.rglob("*.tmp")]
    return f"leftovers {extra}" if extra else None
