"""``measure_choices``: a pass that measures what a graph would choose among, and leaves the model as it was."""

import pytest
import torch
from torch import nn

from convnn import ConvNN2d, measure_choices
from convnn.ops import choice


@pytest.fixture
def model():
    torch.manual_seed(0)
    layer = ConvNN2d(3, 4, 5, candidates="random", num_candidates=8)
    return nn.Sequential(layer, nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU())


def test_the_model_and_the_draws_stay_as_they_were(model, monkeypatch):
    monkeypatch.setattr(choice, "measures", lambda device: True)
    seen = []
    model[1].register_forward_hook(lambda *_: seen.append(choice.measures_for_graphs()))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    wrapped = torch.compile(model, backend=lambda *_: pytest.fail("it was compiled"))
    measure_choices(wrapped, torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.rand(3), expected)
    assert seen == [True] and not choice.measures_for_graphs()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_fails_leaves_it_as_it_was_too(model, monkeypatch):
    monkeypatch.setattr(choice, "measures", lambda device: True)
    model[3].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure_choices(model, torch.randn(2, 3, 6, 6))
    assert not model[1].running_mean.any() and not choice.measures_for_graphs()


def test_where_nothing_is_measured_nothing_runs(model):
    model[0].register_forward_hook(lambda *_: pytest.fail("it ran"))
    measure_choices(model, torch.randn(2, 3, 6, 6))
