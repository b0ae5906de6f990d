"""Small configurations and files that the tests share."""

import pickle
from functools import lru_cache

import numpy as np
import torch

from convnn.config.composer import Composer

# A model that steps in well under a second on one core.
TINY = [
    "data=synthetic",
    "data.size=64",
    "data.load_size=8",
    "train.batch_size=32",
    "train.epochs=2",
    "optim.warmup_epochs=0",
    "tracker=jsonl",
    "device=cpu",
    "+backbone.kwargs.channels=[4,4,8,8]",
    "+backbone.kwargs.layers=[1,1,1,1]",
]
TINY_VIT = [
    *TINY[:-2],
    "backbone=vit_tiny",
    "operator=convnn_attention",
    "swap=all_attention",
    "data.load_size=16",
    "backbone.image_size=16",
    "+backbone.kwargs.depth=2",
    "+backbone.kwargs.embed_dim=24",
]


def tiny(*overrides, vit=False):
    """Compose a tiny run; what the tests of a process share of it is composed once."""
    return _composer()([*(TINY_VIT if vit else TINY), *overrides])


@lru_cache
def _composer():
    return Composer()


def without_times(row):
    """Drop what differs between two equal runs."""
    return {k: v for k, v in row.items() if not k.endswith("seconds")}


def write_cifar(root, name, monkeypatch, train=100, test=20):
    """Write files in torchvision's on-disk format and make their checksums the expected ones."""
    import hashlib

    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    classes = 10 if name == "cifar10" else 100
    label_key = "labels" if name == "cifar10" else "fine_labels"

    def write(file_name, content):
        data = pickle.dumps(content, protocol=2)
        (folder / file_name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    def batch(n):
        labels = [i % classes for i in range(n)]
        images = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
        return {"data": images, label_key: labels}

    for attribute, n in (("train_list", train), ("test_list", test)):
        files = getattr(kind, attribute)
        each = n // len(files)
        monkeypatch.setattr(kind, attribute, [[f, write(f, batch(each))] for f, _ in files])
    names = {kind.meta["key"]: [f"class{i}" for i in range(classes)]}
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": write(kind.meta["filename"], names)})


def write_image_folder(root, classes=("cat", "dog"), per_class=8, side=12, suffix="png"):
    """Write a small image folder, one colour per class."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for c, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                pixels = rng.integers(0, 80, (side, side + 3, 3), dtype=np.uint8)
                pixels[..., c % 3] += 120
                Image.fromarray(pixels).save(folder / f"{i}.{suffix}")


def equal_states(a, b):
    """Return whether two state dicts are bit-identical."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
