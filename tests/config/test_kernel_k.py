"""``k=kernel``: the area of each layer's own window, wherever a number of neighbours may stand."""

from dataclasses import asdict

import pytest
import timm
import torch
from helpers import tiny

from convnn import ConfigError, ConvNN2d, ConvNNAttention, OperatorConfig, neighbor_layers, preset, swap_layers
from convnn.config.identity import fingerprint, identity, run_name
from convnn.config.load import to_config
from convnn.sweep.options import SweepConfig
from convnn.sweep.plan import make_plan


def test_the_word_is_kept_in_a_configuration_and_its_identity():
    config = tiny("operator.k=kernel")
    assert config.operator.k == "kernel" and identity(config)["operator"]["k"] == "kernel"
    assert fingerprint(config) != fingerprint(tiny()) and run_name(config).endswith("-convnn-kernel-b1-s0")
    assert to_config(asdict(config)) == config
    assert tiny("+swap.operator.k=kernel").swap.operator == {"k": "kernel"}


def test_each_layer_has_its_own_number():
    model = timm.create_model("resnet18")
    report = swap_layers(model, "*", k="kernel")
    assert len(report) == 20
    assert [layer.k for layer in neighbor_layers(model).values()].count(49) == 1
    assert {layer.k for layer in neighbor_layers(model).values()} == {1, 9, 49}
    rules = [{"match": "conv1", "operator": {"k": "kernel"}}, {"match": "layer1.*"}]
    model = timm.create_model("resnet18")
    swap_layers(model, rules, k=4)
    assert {layer.k for layer in neighbor_layers(model).values()} == {4, 49}
    assert ConvNN2d(3, 4, "kernel", kernel_size=(3, 5)).k == 15
    assert preset("spectrum", k="kernel").k == "kernel"


def test_a_network_of_many_kernels_keeps_its_function_in_one_command():
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv3_small_050", num_classes=5).double().eval()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    before = model(x)
    swap_layers(model, "*", k="kernel", blend=0, init="transfer")
    assert {layer.k for layer in neighbor_layers(model).values()} == {1, 9, 25}
    assert (model(x) - before).abs().max() < 1e-10


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["operator.k=kernal"], r"operator\.k=kernal must be a number or kernel"),
        (["+swap.operator.k=kern"], r"swap\.operator\.k=kern must be a number or kernel"),
        (["operator.k=true"], r"operator\.k"),
        (["operator.k=kernel", "schedule=shrink_k"], r"schedule\.k needs operator\.k to be a number"),
    ],
)
def test_other_words_and_schedules_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        tiny(*overrides)


def test_attention_has_no_window():
    with pytest.raises(ConfigError, match=r"operator\.k=kernel is for convolutions"):
        tiny("operator=convnn_attention", "operator.k=kernel", vit=True)
    with pytest.raises(ConfigError, match=r"ConvNNAttention\.k=kernel is for convolutions"):
        ConvNNAttention(8, 2, "kernel")


@pytest.mark.parametrize(
    "settings, message",
    [({"candidates": "window", "num_candidates": 2}, "k=49 exceeds"), ({"backend": "triton", "blend": 0.5}, None)],
)
def test_what_depends_on_the_number_is_checked_for_each_layer(settings, message):
    model = timm.create_model("resnet18")
    if message is None:
        swap_layers(model, "*", k="kernel", **settings)
        return
    with pytest.raises(ConfigError, match=rf"'conv1': .*{message}"):
        swap_layers(model, "*", k="kernel", **settings)


def test_a_sweep_has_it_beside_numbers():
    found = make_plan(SweepConfig(), ["operator.k=4,kernel", "swap=all_conv"])
    assert {config.operator.k for config in found.configs.values()} == {4, "kernel"}
    assert not found.invalid and OperatorConfig(k="kernel").k == "kernel"
