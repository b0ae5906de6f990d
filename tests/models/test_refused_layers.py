"""Layers that cannot be replaced are named at once, with what leaves them out."""

import re

import pytest
import timm
from torch import nn

from convnn import swap_layers
from convnn.config.schema import SwapConfig
from convnn.errors import ConfigError


class Twice(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def net():
    """Convolutions of which 1 and 4 compute something else, 2 pads by reflection and 3 has a hook."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        Twice(4, 4, 2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3),
        Twice(4, 4, 2),
        nn.Conv2d(4, 4, 3, padding=1),
    )
    model[3].register_forward_hook(print)
    return model


def refusal(model, *args):
    before = str(model)
    with pytest.raises(ConfigError) as error:
        swap_layers(model, *args)
    assert str(model) == before and "\n" not in str(error.value)
    return str(error.value)


def test_all_are_named_and_the_exclude_will_do():
    text = refusal(net(), SwapConfig())
    assert "'1', '4' is a Twice with a forward pass" in text and "'2' pads with padding_mode=reflect" in text
    assert "'3' has forward hooks" in text
    names = re.search(r"to leave them out, set swap\.exclude=\[(.*)\]$", text).group(1).split(",")
    assert names == ["1", "2", "3", "4"]
    assert [row.name for row in swap_layers(net(), SwapConfig(exclude=names)).rows] == ["0", "5"]


def test_what_was_excluded_before_stays_excluded():
    text = refusal(net(), SwapConfig(exclude=["2", "5"]))
    assert text.endswith("swap.exclude=[2,5,1,3,4]")
    assert len(swap_layers(net(), SwapConfig(exclude=["2", "5", "1", "3", "4"])).rows) == 1


def test_each_rule_has_its_own():
    rules = {"a": {"match": "[012]"}, "b": {"match": "[345]", "exclude": ["3"]}}
    text = refusal(net(), SwapConfig(rules=rules))
    assert text.endswith("set swap.rules.a.exclude=[1,2] swap.rules.b.exclude=[3,4]")
    assert refusal(net(), [{"match": "[01]"}]).endswith("set rules[0].exclude=[1]")


def test_where_none_can_be_replaced_nothing_is_left_out():
    assert "exclude=[" not in refusal(net(), {"match": "[14]"})
    text = refusal(timm.create_model("resnet18"), {"min_kernel": 3}, {"k": 9}, "transfer")
    assert "conv1" in text and "7x7 kernel and needs operator.k >= 49" in text and text.endswith("exclude=[conv1]")
