"""Presets by name in the library are those of the command line."""

from dataclasses import asdict

import pytest
import timm
import torch
from presets import PRESETS
from torch import nn

import convnn
from convnn import ConfigError, HybridConvNN2d, OperatorConfig, preset, swap_layers
from convnn.config.compose import compose_config
from convnn.config.presets import operator_of


def test_every_preset_is_that_of_the_command_line():
    assert convnn.presets() == sorted(PRESETS)
    for name, operator in PRESETS.items():
        assert preset(name) == operator_of({"name": name}) == operator, name


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_networks_are_those_of_the_command_line(name):
    operator = PRESETS[name]

    def network(*given, **settings):
        torch.manual_seed(0)
        if operator.kind == "conv":
            model, rule = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), "*"
        else:
            kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "num_heads": 4, "depth": 1}
            model, rule = timm.create_model("vit_tiny_patch16_224", **kwargs), "blocks.*"
        swap_layers(model, rule, *given, **settings)
        return model.state_dict()

    own = {"k": 1} if operator.border == "nearest" else {}
    a, b = network(name, **own), network({**vars(operator), **own})
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_name_and_settings():
    model = timm.create_model("resnet18", channels=(4, 4, 8, 8), num_classes=3)
    report = swap_layers(model, "layer4.*", "hybrid", k=4)
    layer = model.get_submodule(report.rows[0].name)
    assert isinstance(layer, HybridConvNN2d) and layer.neighbors.k == 4
    changed = operator_of(OperatorConfig(k=3), blend=0.5)
    assert (changed.k, changed.blend) == (3, 0.5) and operator_of(changed) is changed
    assert operator_of({"name": "mine", "target": "convnn.ACmix2d"}).target == "convnn.ACmix2d"  # a name of one's own


def test_attention_by_its_kind_is_the_papers():
    operator = operator_of({"kind": "attention", "k": 5})
    assert (operator.similarity, operator.weighting, operator.aggregation) == ("dot", "softmax", "depthwise")
    assert operator.k == 5 and not operator.self_first and operator.target == "convnn.ConvNNAttention"


@pytest.mark.parametrize(
    "given, message",
    [
        ("hybird", "operator=hybird: no such option; did you mean 'hybrid'"),
        (
            {"name": "hybrid", "target": "convnn.ConvNN2d"},
            "operator.target=.* contradicts operator.name=hybrid",
        ),
        ({"name": "kvt", "kind": "conv"}, "operator.kind=conv contradicts operator.name=kvt, whose kind is attention"),
        ({"name": "kvt", "kk": 3}, "unknown key 'operator.kk'"),
    ],
)
def test_what_contradicts_a_name_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        operator_of(given)


def test_an_operator_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "operator").mkdir()
    (tmp_path / "operator" / "mine.yaml").write_text("defaults: [/operator/kvt, _self_]\nname: mine\nk: 5\n")
    monkeypatch.setenv("CONVNN_CONFIG_PATH", str(tmp_path))
    own = preset("mine")
    assert "mine" in convnn.presets() and (own.k, own.target) == (5, "convnn.ConvNNAttention")


def test_a_whole_mapping_of_another_kind_is_taken_as_it_is():
    given = asdict(OperatorConfig(kind="attention", target="convnn.ConvNNAttention", k=4))
    assert operator_of(given) == OperatorConfig(**given)


@pytest.mark.parametrize(
    "text, k, ratio",
    [
        ("defaults: [_self_, hybrid]\nk: 4\nbranch_ratio: 0.25\n", 9, 0.5),
        ("defaults: [hybrid, _self_]\nk: ${operator.num_candidates}\nnum_candidates: 7\n", 7, 0.5),
        ("defaults: [hybrid]\nk: 3\n", 3, 0.5),
    ],
)
def test_files_mean_what_they_mean_on_the_command_line(text, k, ratio, tmp_path, monkeypatch):
    (tmp_path / "operator").mkdir()
    (tmp_path / "operator" / "mine.yaml").write_text(text)
    monkeypatch.setenv("CONVNN_CONFIG_PATH", str(tmp_path))
    own = preset("mine")
    composed = compose_config(["operator=mine"]).operator
    assert (own.k, own.branch_ratio) == (composed.k, composed.branch_ratio) == (k, ratio)
    (tmp_path / "operator" / "mine.yaml").write_text("defaults: [mine, _self_]\n")
    with pytest.raises(ConfigError, match="mine is among its own defaults"):
        preset("mine")
    (tmp_path / "operator" / "mine.yaml").write_text("defaults: [{a: b}]\n")
    with pytest.raises(ConfigError, match="names of operators as defaults"):
        preset("mine")
