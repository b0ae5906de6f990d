"""Run folders and sweep folders as the engine and the sweeps write them, without training."""

import json
from dataclasses import asdict

import yaml

from convnn.config.identity import fingerprint_of, identity_of
from convnn.config.schema import Config
from convnn.runs.metrics import MEASURES


def set_key(values, key, value):
    *path, leaf = key.split(".")
    for part in path:
        values = values.setdefault(part, {})
    values[leaf] = value


def fake_layers(blend, epoch, layers):
    """Rows of metrics as the diagnostics write them, of layers that leave the window with rising blend and depth."""
    rows = []
    for i in range(layers):
        moved = blend * (i + 1) / layers
        measures = dict.fromkeys(MEASURES, 0.1) | {"overlap": 1 - moved, "distance_mean": 0.1 + 0.4 * moved}
        measures |= {"entropy": None, "agreement": None if epoch == 0 else 1 - 0.5 * moved}
        rows.append({"name": f"layer{i + 1}.conv1", "blend": blend, "k": 9, **measures})
    return rows


def write_run(folder, keys=None, top1=80.0, epochs=3, seed=0, status="complete", layers=0, **result):
    """Write a run folder in the engine's format; ``status=None`` leaves out result.json."""
    config = asdict(Config())
    config["seed"] = seed
    for key, value in (keys or {}).items():
        set_key(config, key, value)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.dump(config, Dumper=yaml.CSafeDumper, sort_keys=False))
    accuracies = [top1 - 30 / (e + 1) + 30 / epochs for e in range(epochs - 1)] + [top1]
    accuracies[1:-1] = [top1 + 1] * len(accuracies[1:-1])  # the best epochs lie a point above the last
    rows = [
        {
            "epoch": e,
            "step": e + 1,
            "train_loss": 2.3 / (e + 1),
            "test_top1": accuracies[e],
            "test_loss": 2.0 / (e + 1),
            "layers": fake_layers(config["operator"]["blend"], e, layers) or [{"name": "conv1", "blend": 1.0, "k": 9}],
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
        "top1_best_on_test": max(accuracies),
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


def grid(root, blends=(0.0, 0.5, 1.0), ks=(4, 9, 16), seeds=(0, 1), layers=0):
    """Write blends x ks x seeds; top-1 is 80 + k, and a point more for each seed."""
    for blend in blends:
        for k in ks:
            for seed in seeds:
                keys = {"operator.blend": blend, "operator.k": k}
                result = {"gflops": k / 4, "seconds": float(k), "layers": layers}
                write_run(root / f"b{blend}-k{k}-s{seed}", keys, 80.0 + k + seed, seed=seed, **result)
    return root


def write_sweep(root, points, invalid=(), **more):
    """Write plan.json, with ``more`` in it, and status files; a point is (name, overrides, status or None[, label])."""
    (root / "status").mkdir(parents=True, exist_ok=True)
    planned = []
    for i, (name, overrides, status, *label) in enumerate(points):
        print_ = f"{i:016x}"
        planned.append({"name": name, "fingerprint": print_, "folder": f"points/{name}", "overrides": overrides})
        planned[-1] |= {"label": label[0]} if label else {}
        if status is not None:
            values = {"exit_code": 1, "reason": None, "log": f"logs/{name}.log", "attempts": 1} | status
            (root / "status" / f"{print_}.json").write_text(json.dumps(values))
    plan = {"command": ["sweep.py", "grid=spectrum"], "axes": {}, "points": planned, "invalid": list(invalid)} | more
    (root / "plan.json").write_text(json.dumps(plan))
    return root


def by_name(frame):
    return {row["name"]: row for row in frame.to_dict("records")}
