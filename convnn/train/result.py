"""What is left of a run: the content of its result.json."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from convnn.config.identity import fingerprint
from convnn.config.schema import Config
from convnn.models.sites import network_layers
from convnn.models.swap import count_parameters
from convnn.runs.data_record import DataRecord
from convnn.runs.environment import versions
from convnn.runtime import distributed
from convnn.runtime.device import device_name, peak_memory
from convnn.train.state import RunState


def result_of(
    config: Config,
    state: RunState,
    status: str,
    *,
    model: nn.Module,
    params: int,
    gflops: float | None,
    layers_replaced: int,
    data: DataRecord,
    device: torch.device,
    environment_changes: list[str],
    lengths: list[tuple[int, int]],
) -> dict[str, Any]:
    """Return the content of result.json of a run that ends as ``status``; every process must ask.

    Accuracies are in percent; sizes in bytes; times in seconds.
    """
    row, best = state.rows[-1] if state.rows else {}, state.best
    on_val = "val_top1" in best  # what the best epoch was chosen by
    return {
        "status": status,
        "fingerprint": fingerprint(config),
        "top1_last": row.get("test_top1"),
        "top5_last": row.get("test_top5"),
        "top1_best_on_test": None if on_val else best.get("test_top1"),
        "top1_at_best_val": best.get("test_top1") if on_val else None,
        "val_top1_best": best.get("val_top1"),
        "best_epoch": best.get("epoch"),
        "epochs": state.epoch,
        "steps": state.step,
        "extended_from": [{"epochs": epochs, "steps": steps} for epochs, steps in lengths[:-1]],
        "skipped_steps": state.skipped_steps,
        "seconds": round(state.train_seconds, 3),
        "params": params,
        "params_trained": count_parameters(model),
        "gflops": gflops,
        "images_per_second": round(state.train_images / state.train_seconds, 1) if state.train_seconds else None,
        "peak_memory_bytes": max(distributed.gather(peak_memory(device))),
        "processes": distributed.world().size,
        "layers_replaced": layers_replaced,
        "network_layers": network_layers(model),
        "classes": len(data.classes),
        **data.entry(),
        "device": device_name(device),
        "versions": versions(),
        "environment_changes": environment_changes,
    }
