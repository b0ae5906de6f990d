"""Parts of a network that are not trained: no gradient, no rate, and statistics that stand still."""

import copy
import pickle

import pytest
import timm
import torch
from helpers import tiny

from convnn import ConfigError, swap_layers
from convnn.models.freezing import freeze
from convnn.models.swap import count_parameters
from convnn.train.optim import make_optimizer

SIZES = {"channels": [4, 4, 8, 8], "layers": [1, 1, 1, 1], "num_classes": 4, "zero_init_last": False}


def resnet():
    torch.manual_seed(0)
    model = timm.create_model("resnet18", **SIZES)
    swap_layers(model, "layer[23].*.conv1", "convnn", k=4)
    return model


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_modules_and_parameters_by_glob():
    model = resnet()
    freeze(model, ["layer[12]", "conv1", "*.bias"])
    names = dict(model.named_parameters())
    expected = {n for n in names if not n.startswith(("layer1.", "layer2.", "conv1.")) and not n.endswith(".bias")}
    assert trained(model) == expected
    assert "layer2.0.conv1.weight" in names and "layer3.0.conv1.weight" in expected  # replaced layers are met by name


def test_a_step_moves_nothing_that_is_frozen():
    model, images = resnet().train(), torch.randn(8, 3, 16, 16)
    freeze(model, ["bn1", "layer1", "layer2.0.bn1.weight"])
    before = copy.deepcopy(model.state_dict())
    optimizer = make_optimizer(model, tiny("optim.lr=0.1").optim)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    model(images).square().mean().backward()
    optimizer.step()
    after = model.state_dict()
    still = {name for name in before if torch.equal(before[name], after[name]) and "_extra_state" not in name}
    assert still == {n for n in before if n.startswith(("bn1.", "layer1."))} | {"layer2.0.bn1.weight"}


def test_statistics_stand_still_through_modes_copies_and_pickles():
    model = resnet()
    freeze(model, ["layer1", "bn1"])
    for one in (model, copy.deepcopy(model)):
        one.eval().train()
        assert not one.bn1.training and not one.layer1[0].bn2.training and one.layer2[0].bn1.training
        assert one.layer1.training and one.layer1[0].conv1.training
    assert torch.equal(pickle.loads(pickle.dumps(model)).conv1.weight, model.conv1.weight)


def test_what_cannot_be_frozen_is_named():
    with pytest.raises(ConfigError, match=r"backbone.freeze=laier1.\* matches no .* of ResNet; did you mean 'layer1'"):
        freeze(resnet(), ["laier1.*"])
    with pytest.raises(ConfigError, match="leaves nothing to train"):
        freeze(resnet(), ["*"])


def test_a_glob_or_a_list_in_the_configuration():
    assert tiny("backbone.freeze=layer1").backbone.freeze == ["layer1"]
    assert tiny("backbone.freeze=[layer1,conv1]").backbone.freeze == ["layer1", "conv1"]
    assert tiny("backbone.freeze=null").backbone.freeze == []
    with pytest.raises(ConfigError, match=r"backbone.freeze=.*must be a glob"):
        tiny("backbone.freeze=[1]")
    assert count_parameters(resnet()) > 0
