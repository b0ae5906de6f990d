"""Small subjects of analyses."""

from pathlib import Path

import numpy as np
import torch

from convnn.analysis.subject import Subject
from convnn.data.splits import Split


def images_of(n, classes, side=8, channels=3):
    """Return n random images, of the classes in turn."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, channels, side, side), dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(n) % classes)


def subject_of(model, split, classes, config, folder=Path("nowhere"), **more):
    """Return a subject on the CPU."""
    config.device = "cpu"
    side, channels = split.shape[1], split.shape[0]
    names = [f"class {i}" for i in range(classes)]
    fields = {"train": split, **more}
    return Subject(folder, config, model.eval(), split, np.arange(len(split)), names, side, channels, 0,
                   torch.device("cpu"), **fields)  # fmt: skip
