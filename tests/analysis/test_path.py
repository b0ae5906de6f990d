"""The loss between two sets of weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convnn.analysis.base import NotApplicable
from convnn.analysis.path import PLACES, headline, largest_rise, loss_between, recompute_statistics


def batches(n=24, size=8):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, 4, 4, generator=generator)
    return list(zip(x.split(size), (torch.arange(n) % 2).split(size), strict=True))


def net():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.9), nn.Flatten(), nn.Linear(16, 2)
    return nn.Sequential(*layers).eval()


def test_the_way_of_a_linear_model_is_known():
    """Along a line the logits of a linear model are interpolated."""
    data = [(x.flatten(1), y) for x, y in batches()]
    model = nn.Linear(48, 2)
    first, last = (dict(nn.Linear(48, 2).named_parameters()) for _ in range(2))
    found = loss_between(model, first, last, [0.0, 0.3, 1.0], [], {"all": data})["all"]
    x, y = (torch.cat(part) for part in zip(*data, strict=True))
    ends = [F.linear(x, w["weight"], w["bias"]) for w in (first, last)]
    expected = [F.cross_entropy((1 - t) * ends[0] + t * ends[1], y).item() for t in (0.0, 0.3, 1.0)]
    assert found == pytest.approx(expected, rel=1e-5)


def test_statistics_are_the_average_over_batches_without_dropout():
    model, data = net(), batches()
    recompute_statistics(model, data)
    with torch.no_grad():
        maps = [model[0](x) for x, _ in data]
    mean = torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0)
    variance = torch.stack([m.transpose(0, 1).flatten(1).var(1) for m in maps]).mean(0)
    assert torch.allclose(model[1].running_mean, mean, atol=1e-6)
    assert torch.allclose(model[1].running_var, variance, atol=1e-6)
    assert not any(module.training for module in model.modules()) and model[1].momentum == 0.1


def test_a_single_image_that_is_left_over_makes_no_statistics():
    model = nn.Sequential(nn.Conv2d(3, 4, 4), nn.BatchNorm2d(4))  # of one image a 1x1 map has no variance
    whole, left = batches(8), batches(9)
    left[0] = whole[0]
    assert len(left) == 2 and len(left[1][0]) == 1
    means = []
    for given in (whole, left):
        recompute_statistics(model.eval(), given)
        means.append(model[1].running_mean.clone())
    assert torch.equal(*means)


def test_a_single_image_has_no_statistics():
    model, (image, label) = net(), batches(1)[0]
    with pytest.raises(NotApplicable, match="2 images or more"):
        recompute_statistics(model, [(image, label)])
    assert not any(module.training for module in model.modules()) and model[1].momentum == 0.1
    recompute_statistics(nn.Flatten(), [(image, label)])  # without BatchNorm none are needed


def test_the_model_is_left_as_it_was():
    model, data = net(), batches()
    model[1].running_mean.fill_(0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss_between(model, {name: 2 * p for name, p in own.items()}, own, [0.0, 0.5], data, {"train": data})
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("values, rise", [([3, 2, 1], 0), ([3, 1, 2, 1.5, 4, 0], 3), ([1], 0), ([1, 5], 4)])
def test_the_largest_rise(values, rise):
    assert largest_rise(values) == rise


@pytest.mark.parametrize(("last", "half"), [(1.0, 0.5), (1.96, None), (2.0, None), (2.5, None)])
def test_half_of_a_fall_is_known_where_the_loss_falls(last, half):
    losses = [2 + t * (last - 2) for t in PLACES]
    found = headline({"series": {"train": {"at": list(PLACES), "values": losses}}})
    assert found.get("path_half") == (half and pytest.approx(half)) and "path_rise" in found
