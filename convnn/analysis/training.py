"""The training images of a run, for analyses of its loss."""

from __future__ import annotations

import numpy as np
import torch

from convnn.analysis.base import NotApplicable
from convnn.analysis.subject import Subject
from convnn.data.splits import AnySplit, balanced


def training_images(subject: Subject) -> AnySplit:
    """Return as many training images as there are test images, evenly over the classes, the same ones each time.

    Raises:
        NotApplicable: without training images.
    """
    if subject.train is None or not len(subject.train):
        raise NotApplicable("there are no training images")
    rows = balanced(subject.train.labels.cpu().numpy(), len(subject.split), np.random.default_rng(0))
    return subject.train.take(torch.from_numpy(rows))
