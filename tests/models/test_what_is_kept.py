"""What a replaced layer had attached to it is kept, or its loss is an error that names it."""

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import prune

from convnn import swap_layers
from convnn.errors import ConfigError

CASES = {
    "convnn": "conv",
    "hybrid": "conv",
    "acmix": "conv",
    "convnn_attention": "attention",
    "hybrid_attention": "attention",
    "convit": "attention",
}


def network(kind):
    """A model whose layer 0.layer is to be replaced."""
    if kind == "conv":
        layer = nn.Conv2d(4, 8, 3, padding=1)
    else:
        vit = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=8, num_heads=2, img_size=32)
        layer = vit.blocks[0].attn
    return nn.Sequential(nn.ModuleDict({"layer": layer})), layer


def swapped(operator, change=lambda layer: None):
    model, layer = network(CASES[operator])
    change(layer)
    swap_layers(model, {"match": "*layer"}, operator)
    new = model[0]["layer"]
    assert new is not layer
    return new


def inner(layer):
    return layer if isinstance(layer, nn.Conv2d) else layer.qkv


def nothing(*_):
    pass


HOOKS = {
    "forward hooks": lambda layer: layer.register_forward_hook(nothing),
    "forward pre hooks": lambda layer: inner(layer).register_forward_pre_hook(nothing),
    "backward hooks": lambda layer: layer.register_full_backward_hook(nothing),
    "backward pre hooks": lambda layer: layer.register_full_backward_pre_hook(nothing),
    "state dict hooks": lambda layer: layer.register_state_dict_post_hook(nothing),
    "load state dict post hooks": lambda layer: layer.register_load_state_dict_post_hook(nothing),
    "backward hooks of its weight": lambda layer: inner(layer).weight.register_hook(nothing),
    "post accumulate grad hooks of its bias": lambda layer: inner(layer).bias.register_post_accumulate_grad_hook(
        nothing
    ),
}


@pytest.mark.parametrize("operator", CASES)
def test_every_kind_of_hook_is_named(operator):
    for what, attach in HOOKS.items():
        with pytest.raises(ConfigError, match=rf"'0.layer' has {what}, which its replacement would lose"):
            swapped(operator, attach)


@pytest.mark.parametrize("operator", CASES)
def test_a_buffer_of_the_users_own_is_named(operator):
    with pytest.raises(ConfigError, match=r"'0.layer' has the buffer count, which its replacement would lose"):
        swapped(operator, lambda layer: layer.register_buffer("count", torch.zeros(())))


@pytest.mark.parametrize("operator", CASES)
def test_a_patched_forward_pass_is_named(operator):
    def patch(layer):
        layer.forward = lambda x: x

    with pytest.raises(ConfigError, match=r"'0.layer' has a forward pass of its own, set on it"):
        swapped(operator, patch)


@pytest.mark.parametrize("operator", CASES)
def test_mode_precision_and_device_are_kept(operator):
    new = swapped(operator, lambda layer: layer.eval())
    assert not any(module.training for module in new.modules())
    assert all(module.training for module in swapped(operator).modules())
    assert {p.dtype for p in swapped(operator, lambda layer: layer.double()).parameters()} == {torch.float64}
    assert {p.device.type for p in swapped(operator, lambda layer: layer.to("meta")).parameters()} == {"meta"}


@pytest.mark.parametrize("operator", CASES)
def test_two_precisions_are_named(operator):
    with pytest.raises(ConfigError, match=r"'0.layer' has parameters of float32 on cpu and float64 on cpu"):
        swapped(operator, lambda layer: setattr(inner(layer), "bias", nn.Parameter(inner(layer).bias.double())))


@pytest.mark.parametrize("operator", CASES)
def test_what_is_frozen_stays_so_or_is_named(operator):
    new = swapped(operator, lambda layer: layer.requires_grad_(False))
    assert not any(p.requires_grad for p in new.parameters())
    assert all(p.requires_grad for p in swapped(operator).parameters())

    def freeze(layer):
        inner(layer).weight.requires_grad_(False)

    if operator == "convnn":  # which has no other parameters
        return
    with pytest.raises(ConfigError, match=r"'0.layer' has frozen parameters \((qkv\.)?weight\) beside others"):
        swapped(operator, freeze)


def test_a_frozen_weight_beside_a_bias():
    new = swapped("convnn", lambda layer: layer.weight.requires_grad_(False))
    assert {name: p.requires_grad for name, p in new.named_parameters()} == {"weight": False, "bias": True}


def test_pruning_is_named_with_the_way_out():
    def pruned(layer):
        prune.l1_unstructured(layer, "weight", 0.5)

    with pytest.raises(ConfigError, match=r"'0.layer' is pruned; call torch.nn.utils.prune.remove first"):
        swapped("convnn", pruned)

    def removed(layer):
        pruned(layer)
        prune.remove(layer, "weight")

    swapped("convnn", removed)
