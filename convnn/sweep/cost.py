"""An estimate of what a set of runs will cost, before any of them starts."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from convnn.config.identity import fingerprint_of, identity
from convnn.config.schema import Config
from convnn.data.datasets import load_dataset
from convnn.data.splits import Dataset
from convnn.errors import ConfigError
from convnn.models.build import build_model
from convnn.models.cost import DEAR, cost_ratio, forward_cost
from convnn.runs.folder import RunFolder
from convnn.runs.record import read_result
from convnn.runs.status import COMPLETE
from convnn.runtime.device import explain_out_of_memory, explain_small_batches
from convnn.text import duration, size
from convnn.train.disk import checkpoint_bytes
from convnn.train.trainer import Trainer


def estimate_cost(configs: Sequence[Config], folders: Sequence[Path]) -> str:
    """Return the operations of training all of ``configs``, and the time at the rate of the finished runs.

    A training step counts as three forward passes: one forward, two backward. The forward pass is counted by
    torch's FLOP counter, once for each distinct model.

    Args:
        configs: runs that are to be made.
        folders: run folders; finished ones tell the rate.
    """
    datasets: dict[str, Dataset | None] = {}
    models: dict[str, ModelCost | ConfigError] = {}
    total, stored, unknown = 0.0, 0, []
    for config in configs:
        data = json.dumps(asdict(config.data), sort_keys=True)
        try:
            if data not in datasets:
                datasets[data] = load_dataset(replace(config.data, download=False))
            dataset = datasets[data]
            if dataset is None:
                continue
            names = ("backbone", "operator", "swap", "optim", "checkpoint")
            key = data + json.dumps([*(asdict(getattr(config, name)) for name in names), config.train.ema])
            if key not in models:
                models[key] = _cost_or_reason(config, dataset)
            cost = models[key]
            if isinstance(cost, ConfigError):
                raise cost
        except ConfigError as error:
            datasets.setdefault(data, None)
            unknown.append(str(error))
            continue
        steps = len(dataset.train) // config.train.batch_size * config.train.epochs
        images = min(steps, config.train.max_steps or steps) * config.train.batch_size
        total += 3 * cost.gflops * images
        stored += cost.stored
    known = [cost for cost in models.values() if isinstance(cost, ModelCost)]
    lines = [f"to compute: {len(configs)} runs, " + (f"about {_operations(total)}" if known else "cost unknown")]
    if known:
        lines.append(f"to store: {size(stored)} of checkpoints when all are complete (checkpoint.keep)")
    dear = [cost.times for cost in known if cost.times > DEAR]
    if dear:
        lines.append(f"some swaps take up to {max(dear):.0f} times the operations of their plain network")
    rates = [
        3 * r["gflops"] * r["images_per_second"]
        for r in map(read_result, folders)
        if r and r["status"] == COMPLETE and r.get("gflops") and r.get("images_per_second")
    ]
    if rates:
        rate = statistics.median(rates)
        lines.append(f"at the {_operations(rate)}/s of the {len(rates)} finished runs: about {duration(total / rate)}")
    if unknown:
        lines.append(f"{len(unknown)} of them could not be counted: {unknown[0]}")
    return "\n".join(lines)


def estimate_time(configs: Sequence[Config]) -> str:
    """Return the time of training all of ``configs`` here, one after another, from a few steps of each distinct model.

    An evaluated image counts as a third of a trained one: a forward pass without the backward pass. What comes before
    the first step of a run is not counted.
    """
    timed: dict[str, Timed] = {}
    total, unknown = 0.0, []
    for config in configs:
        parts = {key: value for key, value in identity(config).items() if key not in ("seed", "schedule")}
        parts["train"] = {key: value for key, value in parts["train"].items() if key not in ("epochs", "max_steps")}
        key = fingerprint_of(parts)
        try:
            if key not in timed:
                timed[key] = _timed(config)
            total += timed[key].of_run(config)
        except ConfigError as error:
            unknown.append(str(error))
    if not timed:
        return f"no step could be timed: {unknown[0]}"
    low, high = (pick(t.step for t in timed.values()) for pick in (min, max))
    span = f"{low:.3g} s" if len(timed) == 1 else f"{low:.3g} to {high:.3g} s"
    text = (
        f"timed: {span} a training step ({len(timed)} distinct models); one run after another about {duration(total)}"
    )
    return text + (f"; without {len(unknown)} that could not be timed: {unknown[0]}" if unknown else "")


@dataclass(frozen=True)
class Timed:
    """What was measured of a model."""

    step: float
    """Seconds of a training step."""
    steps_per_epoch: int
    evaluated: int
    """Images that are evaluated after an epoch."""

    def of_run(self, config: Config) -> float:
        """Return the seconds of a run."""
        train = config.train
        steps = min(self.steps_per_epoch * train.epochs, train.max_steps or self.steps_per_epoch * train.epochs)
        evaluations = math.ceil(steps / self.steps_per_epoch)
        return self.step * (steps + evaluations * self.evaluated / train.batch_size / 3)


def _timed(config: Config) -> Timed:
    with tempfile.TemporaryDirectory() as place:
        trainer = Trainer(config, RunFolder(Path(place), resume=False, writes=False))
        parts = config.train.batch_size, config.train.grad_accumulation
        with explain_out_of_memory(*parts), explain_small_batches(*parts):
            step = trainer.time_steps()
    evaluated = sum(len(batches.split) for name, batches in trainer.batches.items() if name != "train")
    return Timed(step, trainer.steps_per_epoch, evaluated)


@dataclass(frozen=True)
class ModelCost:
    """What a run costs whose model this is."""

    gflops: float
    """Of the forward pass of one image."""
    times: float
    """Operations as a multiple of the plain network's."""
    stored: int
    """Bytes of the checkpoints of a complete run."""


def _cost_or_reason(config: Config, dataset: Dataset) -> ModelCost | ConfigError:
    try:
        return _model_cost(config, dataset)
    except ConfigError as error:  # asked once, too
        return error


def _model_cost(config: Config, dataset: Dataset) -> ModelCost:
    model, report, image_size = build_model(config, dataset)
    cost = forward_cost(model, dataset.train.shape[0], image_size, [row.name for row in report.rows])
    gflops = cost.total / 1e9
    times = cost_ratio(gflops, report.with_costs(cost)) or 1.0
    return ModelCost(gflops, times, checkpoint_bytes(model, config).complete)


def _operations(gflops: float) -> str:
    for unit in ("GFLOP", "TFLOP", "PFLOP"):
        if gflops < 1000:
            return f"{gflops:.3g} {unit}"
        gflops /= 1000
    return f"{gflops:.3g} EFLOP"
