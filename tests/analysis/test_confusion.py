"""Confusion and the accuracy of classes, as scikit-learn counts them."""

import numpy as np
from helpers import tiny
from sklearn.metrics import confusion_matrix, recall_score
from subjects import images_of, subject_of
from torch import nn

from convnn.analysis import classes
from convnn.analysis.base import ArmResults
from convnn.analysis.outputs import class_outputs


def test_confusion_is_exact():
    assert classes.confusion(np.array([0, 0, 1, 2]), np.array([0, 2, 1, 1]), 4).tolist() == [
        [1, 0, 1, 0],
        [0, 1, 0, 0],
        [0, 1, 0, 0],
        [0, 0, 0, 0],
    ]
    rng = np.random.default_rng(0)
    label, predicted = rng.integers(0, 5, (2, 400))
    assert np.array_equal(classes.confusion(label, predicted, 5), confusion_matrix(label, predicted))


def test_a_run_is_counted(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    subject = subject_of(model, images_of(30, 3), 3, tiny(), tmp_path)
    subject.classes.append("without images")
    model[1] = nn.Linear(192, 4)
    found, expected = classes.measure(subject), class_outputs(subject)
    recall = recall_score(expected.label, expected.predicted, average=None, labels=range(3), zero_division=0)
    assert found["series"]["accuracy"]["at"][-1] == "without images"
    assert found["series"]["accuracy"]["values"] == [*recall.tolist(), None]
    counts = found["arrays"]["confusion"]
    most = found["most_mistaken"]
    off = counts - np.diag(np.diag(counts))
    i, j = subject.classes.index(most["class"]), subject.classes.index(most["for"])
    assert i != j and most["images"] == off[i, j] == off.max()
    numbers = classes.headline(found)
    assert numbers["worst_class"] == recall.min() and numbers["best_class"] == recall.max()


def test_shares_are_averaged_over_seeds():
    counts = [np.array([[3, 1], [0, 0]]), np.array([[1, 1], [2, 0]])]
    arm = ArmResults("a", {}, {seed: {"arrays": {"confusion": c}} for seed, c in enumerate(counts)})
    assert classes.mean_shares(arm).tolist() == [[0.625, 0.375], [0.5, 0]]
