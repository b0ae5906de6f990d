"""Errors on corrupted images."""

import numpy as np
import pytest
import torch
from helpers import tiny
from subjects import images_of, subject_of
from torch import nn

from convnn.analysis import robustness
from convnn.data.corruptions import FAMILIES, LEVELS, corrupted


class Brightest(nn.Module):
    """Chooses the channel of the largest mean."""

    def forward(self, x):
        return x.mean((2, 3))


@pytest.fixture
def subject():
    split = images_of(9, 3)
    split.labels = split.images.float().mean((2, 3)).argmax(1)
    return subject_of(Brightest(), split, 3, tiny("data.mean=[0,0,0]", "data.std=[1,1,1]"))


def test_errors_of_all_kinds_and_severities(subject):
    found = robustness.measure(subject)
    assert found["clean"] == 0 and set(found["series"]) == {*LEVELS, *FAMILIES, "mean"}
    for name in ("impulse_noise", "fog"):
        for severity in (1, 5):
            images = corrupted(subject.split.images, range(9), name, severity)
            chosen = images.float().mean((2, 3)).argmax(1)
            wrong = (chosen != subject.split.labels).double().mean().item()
            assert found["series"][name]["values"][severity] == pytest.approx(wrong)
    errors = np.array([found["series"][name]["values"] for name in LEVELS])
    assert found["series"]["mean"]["values"] == pytest.approx(errors.mean(0).tolist())
    numbers = robustness.headline(found)
    assert numbers["corruption_error"] == pytest.approx(errors[:, 1:].mean())
    assert numbers["relative_corruption_error"] == pytest.approx(errors[:, 1:].mean() - found["clean"])
    noise = [found["series"][name]["values"][1:] for name in FAMILIES["noise"]]
    assert numbers["noise_error"] == pytest.approx(np.mean(noise))


def test_copies_are_made_once_for_the_same_images(subject, monkeypatch):
    made = []
    monkeypatch.setattr(
        robustness, "corrupted", lambda images, index, *which: made.append(which) or images + len(index)
    )
    copies, split = robustness.Copies(), subject.split
    first = {(name, severity): one.images for name, severity, one in copies(split, subject.index)}
    again = {(name, severity): one.images for name, severity, one in copies(split, subject.index)}
    assert len(made) == len(first) == 60 and all(again[key] is value for key, value in first.items())
    other = split.take(torch.arange(4))
    assert all(len(one.images) == 4 for _, _, one in copies(other, subject.index[:4])) and len(made) == 120
    list(copies(other, subject.index[1:5]))
    assert len(made) == 180  # the same images under other numbers draw otherwise
    monkeypatch.setattr(robustness, "MOST_BYTES", 1)
    list(robustness.Copies()(split, subject.index))
    assert len(made) == 240


def test_what_is_left_of_rounding_is_nothing():
    errors = {name: {"values": [0.3] + [0.1 + 0.2] * 5} for name in ("mean", *FAMILIES)}
    assert 0.1 + 0.2 != 0.3
    for clean, more in ((0.3, 0), (0.2, 0.1)):
        found = robustness.headline({"clean": clean, "series": errors})["relative_corruption_error"]
        assert found == pytest.approx(more, abs=1e-300)
