"""An estimate of what a set of runs will cost, before any of them starts."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from convnn.config.schema import Config
from convnn.data.datasets import load_dataset
from convnn.data.splits import Dataset
from convnn.errors import ConfigError
from convnn.models.build import build_model
from convnn.models.cost import forward_cost
from convnn.runs.record import read_result
from convnn.runs.status import COMPLETE
from convnn.text import duration


def estimate_cost(configs: Sequence[Config], folders: Sequence[Path]) -> str:
    """Return the operations of training all of ``configs``, and the time at the rate of the finished runs.

    A training step counts as three forward passes: one forward, two backward. The forward pass is counted by
    torch's FLOP counter, once for each distinct model.

    Args:
        configs: runs that are to be made.
        folders: run folders; finished ones tell the rate.
    """
    datasets: dict[str, Dataset | None] = {}
    gflops: dict[str, float] = {}
    total, unknown = 0.0, []
    for config in configs:
        data = json.dumps(asdict(config.data), sort_keys=True)
        try:
            if data not in datasets:
                datasets[data] = load_dataset(replace(config.data, download=False))
            dataset = datasets[data]
            if dataset is None:
                continue
            model_key = data + json.dumps([asdict(config.backbone), asdict(config.operator), asdict(config.swap)])
            if model_key not in gflops:
                gflops[model_key] = _forward_gflops(config, dataset)
        except ConfigError as error:
            datasets.setdefault(data, None)
            unknown.append(str(error))
            continue
        size = len(dataset.train)
        steps = size // config.train.batch_size * config.train.epochs
        images = min(steps, config.train.max_steps or steps) * config.train.batch_size
        total += 3 * gflops[model_key] * images
    lines = [f"to compute: {len(configs)} runs, " + (f"about {_operations(total)}" if gflops else "cost unknown")]
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


def _forward_gflops(config: Config, dataset: Dataset) -> float:
    model, _, image_size = build_model(config, dataset)
    return forward_cost(model, dataset.train.shape[0], image_size).total / 1e9


def _operations(gflops: float) -> str:
    for unit in ("GFLOP", "TFLOP", "PFLOP"):
        if gflops < 1000:
            return f"{gflops:.3g} {unit}"
        gflops /= 1000
    return f"{gflops:.3g} EFLOP"
