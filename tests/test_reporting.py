"""Reports: what counts in a mean, what is listed instead, and what hostile or damaged folders can do."""

import json
from dataclasses import asdict

import pytest
import yaml

from convnn.config import Config

pytest.importorskip("pandas")
pytest.importorskip("matplotlib")


def set_key(values, key, value):
    *path, leaf = key.split(".")
    for part in path:
        values = values.setdefault(part, {})
    values[leaf] = value


def write_run(folder, keys=None, top1=80.0, epochs=3, seed=0, status="complete", **result):
    """Write a run folder in the engine's format; ``status=None`` leaves out result.json."""
    from convnn.config import fingerprint_of, identity_of

    config = asdict(Config())
    config["seed"] = seed
    for key, value in (keys or {}).items():
        set_key(config, key, value)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.dump(config, Dumper=yaml.CSafeDumper, sort_keys=False))
    rows = [
        {
            "epoch": e,
            "step": e + 1,
            "train_loss": 2.3 / (e + 1),
            "test_top1": top1 - 30 / (e + 1) + 30 / epochs,
            "layers": [{"name": "conv1", "blend": 1.0, "k": 9}],
        }
        for e in range(epochs)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = {"versions": {"torch": "2.11"}, "gpu": None, "command": [f"seed={seed}"], "started": "2026"}
    (folder / "env.json").write_text(json.dumps(environment))
    values = {
        "status": status,
        "fingerprint": fingerprint_of(identity_of(config)),
        "top1_last": top1,
        "top5_last": 99.0,
        "top1_best_on_test": top1 + 1,
        "top1_at_best_val": None,
        "val_top1_best": None,
        "best_epoch": 1,
        "epochs": epochs,
        "steps": 10,
        "seconds": 5.0,
        "params": 11_000_000,
        "gflops": 1.5,
        "images_per_second": 100.0,
        "peak_memory_bytes": 10**9,
        "device": "cpu",
        "versions": {"python": "3.11", "hydra-core": "1.3"},
        "exit_code": 0,
    } | result
    if status is not None:
        (folder / "result.json").write_text(json.dumps(values))
    return folder
