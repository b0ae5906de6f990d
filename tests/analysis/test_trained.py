"""Analyses of the outputs and the loss of a trained run."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from figure_checks import texts_outside
from folder_runs import folder_config, write_pets

from convnn.analysis import calibration, hessian, path
from convnn.analysis.base import NotApplicable
from convnn.analysis.measuring import ArmRuns, Asked, measure_arms
from convnn.analysis.outputs import class_outputs
from convnn.analysis.registry import load_analysis
from convnn.analysis.subject import Datasets, open_subject
from convnn.analysis.training import training_images
from convnn.runs.predictions import read_predictions
from convnn.train.run import run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("analysed")
    run(folder_config(write_pets(folder / "pets"), folder / "run", "operator=convnn", "optim.lr=0.01"))
    return folder / "run"


@pytest.fixture
def subject(place):
    return open_subject(place, "last", "cpu", None, Datasets())


def test_kept_predictions_are_those_of_the_model(place, subject, monkeypatch):
    asked = class_outputs(subject)
    subject.own_images = False
    computed = class_outputs(subject)
    assert np.array_equal(asked.predicted, computed.predicted) and np.array_equal(asked.label, computed.label)
    assert np.abs(asked.probabilities - computed.probabilities).max() < 1e-3
    assert np.allclose(asked.probabilities.sum(1), 1)


def test_the_images_of_an_analysis_are_taken_by_number(place, subject, monkeypatch):
    monkeypatch.setattr(subject.model, "forward", None)  # what is kept needs no model
    few, kept = subject.limited(5), read_predictions(place)
    found = class_outputs(few)
    assert found.label.tolist() == kept.label[few.index].tolist()
    assert found.predicted.tolist() == kept.predicted[few.index].tolist()
    result = calibration.measure(few)
    assert result["accuracy"] == pytest.approx((found.predicted == found.label).mean())
    assert sum(result["series"]["images"]["values"]) == pytest.approx(1)


def test_the_way_leads_from_the_first_weights_to_the_last(subject):
    found = path.measure(subject)
    first = path.first_weights(subject)
    assert any(not torch.equal(first[name], p) for name, p in subject.model.named_parameters())
    x, y = subject.images, subject.labels
    path.place_between(subject.model, first, first, 0.0)
    train = [(x, y) for x, y in replace(subject, split=training_images(subject), _images=None).batches()]
    path.recompute_statistics(subject.model, train)
    with torch.no_grad():
        expected = F.cross_entropy(subject.model(x), y).item()
    assert found["series"]["test"]["values"][0] == pytest.approx(expected, rel=1e-4)
    assert found["series"]["train"]["at"] == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]


def test_no_way_from_weights_of_a_file(subject, monkeypatch):
    monkeypatch.setattr(path, "loads_weights", lambda backbone: True)
    with pytest.raises(NotApplicable, match="began from the weights of a file"):
        path.measure(subject)


def test_the_hessian_of_a_run(subject):
    found = hessian.measure(subject)
    values = found["series"]["eigenvalues"]["values"]
    assert values == sorted(values, reverse=True) and values[0] > 0 and found["errors"][0] <= 0.02 * values[0]
    assert found["parameters"] == sum(p.numel() for p in subject.model.parameters())
    assert hessian.measure(subject) == found
    subject.train = None
    with pytest.raises(NotApplicable, match="no training images"):
        hessian.measure(subject)


def test_every_one_is_kept_and_drawn(place, tmp_path):
    names = ["calibration", "classes", "robustness", "hessian", "path"]
    shutil.copytree(place, tmp_path / "run")
    arms = [ArmRuns(f"blend={b}", {"operator.blend": float(b)}, {0: tmp_path / "run"}) for b in (0, 1)]
    found = measure_arms(arms, Asked(names, device="cpu"))
    assert (found.measured, found.kept, found.failed, found.left_out) == (5, 5, [], {})
    for name in names:
        analysis = load_analysis(name)
        first, second = (analysis.headline(arm.results[0]) for arm in found.arms[name])
        assert first == pytest.approx(second) and all(map(math.isfinite, first.values()))
        assert not texts_outside(analysis.draw(found.arms[name]))
        assert analysis.draw(found.arms[name][:1]).axes  # one arm has nothing to be compared with
