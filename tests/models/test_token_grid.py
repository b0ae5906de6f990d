"""Where a ViT's tokens lie is told by its patch embedding at each call, never guessed from their number."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

from convnn import ConfigError, ConvNNAttention, export_layers, neighbors_of, swap_layers

POSITIONAL = {"kind": "attention", "target": "convnn.ConvNNAttention", "similarity": "dot", "self_first": False,
              "weighting": "softmax", "aggregation": "sum", "k": 9}  # fmt: skip


def vit(**kwargs):
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **(size | kwargs)).eval()


def grids(model, images):
    return {(n.geometry.height, n.geometry.width) for n in neighbors_of(model, images).values()}


@pytest.mark.parametrize("height, width", [(16, 36), (36, 16), (32, 32), (8, 72), (4, 40)])
@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
def test_a_dynamic_vit_has_the_grid_of_each_image(height, width, blend):
    model = vit(dynamic_img_size=True)
    swap_layers(model, {"kind": "attention"}, POSITIONAL | {"blend": blend})
    assert grids(model, torch.randn(1, 3, height, width)) == {(height // 4, width // 4)}


def test_neighbours_by_position_are_those_of_the_real_grid():
    model = vit(dynamic_img_size=True)
    swap_layers(model, {"kind": "attention"}, POSITIONAL | {"blend": 0.0})
    found = neighbors_of(model, torch.randn(1, 3, 16, 36))["blocks.0.attn"]
    centre = 1 + 1 * 9 + 4  # row 1, column 4 of 4 x 9, after CLS
    expected = {1 + r * 9 + c for r in (0, 1, 2) for c in (3, 4, 5)}
    assert set(found.index[0, 0, centre].tolist()) == expected


def test_set_input_size_and_wrapped_and_registered_models():
    model = vit(reg_tokens=3)
    swap_layers(model, {"kind": "attention"}, POSITIONAL | {"blend": 0.3})
    model.set_input_size((16, 36))
    assert grids(model, torch.randn(1, 3, 16, 36)) == {(4, 9)}
    wrapped = nn.Sequential(nn.Identity(), vit(dynamic_img_size=True, class_token=False, global_pool="avg"))
    swap_layers(wrapped, {"kind": "attention"}, POSITIONAL | {"blend": 0.3})
    layer = wrapped[1].blocks[0].attn
    assert grids(wrapped, torch.randn(1, 3, 16, 36)) == {(4, 9)} and layer.num_prefix_tokens == 0


@pytest.mark.parametrize("blend, candidates", [(0.0, "all"), (0.5, "all"), (1.0, "grid"), (1.0, "window")])
def test_dropped_patches_have_no_positions(blend, candidates):
    model = vit(patch_drop_rate=0.75).train()  # 16 of 64 patches, which are no 4 x 4 map
    swap_layers(model, {"kind": "attention"}, POSITIONAL | {"blend": blend, "candidates": candidates, "k": 3})
    with pytest.raises(ValueError, match=r"17 tokens less 1 prefix tokens are not the 8x8 grid .*patch_drop_rate=0"):
        model(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("candidates", ["all", "random"])
def test_dropped_patches_need_none_where_features_choose(candidates):
    model = vit(patch_drop_rate=0.75).train()
    settings = {"blend": 1.0, "candidates": candidates, "num_candidates": 8}
    swap_layers(model, {"kind": "attention"}, POSITIONAL | settings)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)


def test_copies_note_their_own_images():
    model = vit(dynamic_img_size=True)
    swap_layers(model, {"kind": "attention"}, POSITIONAL | {"blend": 0.3})
    a, b = torch.randn(1, 3, 16, 36), torch.randn(1, 3, 24, 24)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        want = model(a)
        assert torch.equal(other(a), want)
        other(b)
        assert model.blocks[0].attn.token_grid.size == (4, 9) and other.blocks[0].attn.token_grid.size == (6, 6)


def test_two_swaps_share_one_note_and_an_export_leaves_none():
    model = vit()
    for rule in ({"kind": "attention", "first": 1}, {"kind": "attention", "depths": [0]}):
        swap_layers(model, rule, POSITIONAL | {"k": 65})
    assert len(model.patch_embed._forward_hooks) == 1
    assert model.blocks[0].attn.token_grid is model.blocks[1].attn.token_grid
    export_layers(model)
    assert not model.patch_embed._forward_hooks


def test_a_swap_that_fails_leaves_no_hook():
    model = vit()
    with pytest.raises(ConfigError):
        swap_layers(model, {"kind": "attention"}, POSITIONAL | {"target": "convnn.ConvNN2d"})
    assert not model.patch_embed._forward_hooks


def test_a_layer_alone_takes_its_own_grid_or_a_square():
    layer = ConvNNAttention(8, 2, 4, blend=0.3, grid_size=(2, 6))
    layer(torch.randn(1, 12, 8))
    with pytest.raises(ValueError, match=r"16 tokens less 0 prefix tokens are neither grid_size=\(2, 6\)"):
        layer(torch.randn(1, 16, 8))
