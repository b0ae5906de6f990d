"""What is left of a run: the content of its result.json."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from convnn.config.identity import fingerprint
from convnn.models.swap import count_parameters
from convnn.runs.environment import versions
from convnn.runtime import distributed
from convnn.runtime.device import device_name, peak_memory

if TYPE_CHECKING:
    from convnn.train.trainer import Trainer


def result_of(run: Trainer, status: str) -> dict[str, Any]:
    """Return the content of result.json of a run that ends as ``status``; every process must ask.

    Accuracies are in percent; sizes in bytes; times in seconds.
    """
    row, best = run.rows[-1] if run.rows else {}, run.best
    on_val = "val" in run.batches
    return {
        "status": status,
        "fingerprint": fingerprint(run.config),
        "top1_last": row.get("test_top1"),
        "top5_last": row.get("test_top5"),
        "top1_best_on_test": None if on_val else best.get("test_top1"),
        "top1_at_best_val": best.get("test_top1") if on_val else None,
        "val_top1_best": best.get("val_top1"),
        "best_epoch": best.get("epoch"),
        "epochs": run.epoch,
        "steps": run.step,
        "skipped_steps": run.guard.skipped,
        "seconds": round(run.train_seconds, 3),
        "params": count_parameters(run.model),
        "gflops": run.gflops,
        "images_per_second": round(run.train_images / run.train_seconds, 1) if run.train_seconds else None,
        "peak_memory_bytes": max(distributed.gather(peak_memory(run.device))),
        "processes": run.world.size,
        "layers_replaced": len(run.report),
        "classes": run.num_classes,
        "device": device_name(run.device),
        "versions": versions(),
        "environment_changes": run.environment_changes,
    }
