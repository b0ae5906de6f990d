"""Sweeps of named arms with predictions, without training."""

import numpy as np
from fake_runs import write_run, write_sweep

PLAIN = {"swap.match": None, "swap.rules": {}}


def write_predictions(folder, right, *, labels=None, index=None, prefix=""):
    """Write a run's predictions.npz: which images it has right, of ten classes."""
    labels = np.arange(len(right)) % 10 if labels is None else labels
    predicted = np.where(right, labels, (labels + 1) % 10)
    index = np.arange(len(right)) if index is None else index
    np.savez(folder / "predictions.npz", index=index, label=labels, **{f"{prefix}predicted": predicted})


def arms(root, right, keys=None, names=True, predictions=True, **result):
    """Write a sweep.

    Args:
        root: its folder.
        right: share of images that are right by arm and seed, {"plain": {0: 0.81, ...}, ...}; 1,000 images.
        keys: overrides by arm; "plain" has no swap, others a blend by their place.
        names: whether the points bear the arms' names.
        predictions: whether the runs have predictions.npz.
        result: more values of result.json.
    """
    points = []
    for place, (name, seeds) in enumerate(right.items()):
        own = PLAIN if name == "plain" else {"operator.blend": place / 10}
        for seed, share in seeds.items():
            generator = np.random.default_rng(1000 * place + seed)
            hits = generator.permutation(1000) < round(1000 * share)
            point, more = f"{name}-s{seed}", {"seconds": 10.0 + place, "gflops": 1 + place / 10} | result
            folder = write_run(
                root / "points" / point, own | (keys or {}).get(name, {}), 100 * hits.mean(), 3, seed, **more
            )
            if predictions:
                write_predictions(folder, hits)
            points.append((point, [f"seed={seed}"], None, name if names else None))
    return write_sweep(root, points)


def shares(mean, spread=0.01, seeds=5, first=0):
    """Shares of images by seed, around a mean."""
    return {first + i: mean + spread * ((i * 7) % 5 - 2) / 2 for i in range(seeds)}
