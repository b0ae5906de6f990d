"""The grid that a swapped layer uses against the true one, over models, sizes and wrappers; and where none is known."""

import pytest
import timm
import torch
from torch import nn

from convnn import ConfigError, ConvNNAttention, export_layers, set_token_grid, swap_layers
from convnn.nn.base import NeighborLayer

POSITIONAL = {"kind": "attention", "target": "convnn.ConvNNAttention", "similarity": "dot", "self_first": False,
              "weighting": "softmax", "aggregation": "sum", "k": 4, "blend": 0.3}  # fmt: skip
TINY = {"embed_dim": 24, "depth": 2, "num_heads": 3}


def swapped(name, operator=POSITIONAL, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, **(TINY | kwargs)).eval()
    swap_layers(model, {"kind": "attention"}, operator)
    return model


def grids_used(model, images):
    """Run a model; return rows, columns and prefix of what each layer selected on."""
    found = set()

    def note(layer, args):
        geometry = layer.geometry(args[0].shape[1])
        found.add((geometry.height, geometry.width, geometry.prefix))

    hooks = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, NeighborLayer)]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


TRUE = [  # model, arguments, image size, rows, columns, prefix
    ("vit_tiny_patch16_224", {"dynamic_img_size": True}, (144, 256), 9, 16, 1),
    ("vit_tiny_patch16_224", {"dynamic_img_size": True, "dynamic_img_pad": True}, (140, 250), 9, 16, 1),
    ("vit_tiny_patch16_224", {"img_size": (144, 256)}, (144, 256), 9, 16, 1),
    ("vit_tiny_patch16_224", {"img_size": (48, 32), "reg_tokens": 43}, (48, 32), 3, 2, 44),
    ("vit_tiny_patch16_224", {"img_size": (48, 32), "class_token": False, "global_pool": "avg", "reg_tokens": 43},
     (48, 32), 3, 2, 43),
    ("vit_tiny_patch16_224", {"dynamic_img_size": True, "pos_embed": "none"}, (64, 144), 4, 9, 1),
    ("vit_medium_patch16_reg4_gap_256", {"dynamic_img_size": True}, (64, 144), 4, 9, 4),
    ("vit_small_patch14_reg4_dinov2", {"img_size": (56, 126)}, (56, 126), 4, 9, 5),
    ("deit_tiny_distilled_patch16_224", {"img_size": (64, 144)}, (64, 144), 4, 9, 2),
    ("deit3_small_patch16_224", {"img_size": (64, 144)}, (64, 144), 4, 9, 1),
]  # fmt: skip


@pytest.mark.parametrize("name, kwargs, size, rows, columns, prefix", TRUE)
def test_the_grid_used_is_the_true_one(name, kwargs, size, rows, columns, prefix):
    model = swapped(name, **kwargs)
    assert grids_used(model, torch.randn(1, 3, *size)) == {(rows, columns, prefix)}
    patches = model.patch_embed(torch.randn(1, 3, *size))
    assert patches.numel() == rows * columns * model.embed_dim


def test_layers_before_the_class_token_have_no_prefix():
    model = timm.create_model("convit_tiny", img_size=64, num_classes=5).eval()
    swap_layers(model, {"kind": "attention"}, POSITIONAL)
    assert grids_used(model, torch.randn(1, 3, 64, 64)) == {(4, 4, 0), (4, 4, 1)}


@pytest.mark.parametrize("size", [(64, 144), (144, 64), (32, 32), (48, 192)])
def test_a_new_input_size_is_taken_at_once(size):
    model = swapped("vit_tiny_patch16_224")
    model.set_input_size(size)
    assert grids_used(model, torch.randn(1, 3, *size)) == {(size[0] // 16, size[1] // 16, 1)}
    model.set_input_size((32, 64), patch_size=8)
    assert grids_used(model, torch.randn(1, 3, 32, 64)) == {(4, 8, 1)}


class Own(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.parts = nn.ModuleDict({"body": inner})

    def forward(self, x):
        return self.parts["body"](x.flip(-1))


def features(**kwargs):
    return timm.create_model(
        "vit_tiny_patch16_224", features_only=True, out_indices=(1,), dynamic_img_size=True, **TINY, **kwargs
    )


def plain(**kwargs):
    return timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **(TINY | kwargs))


WRAPPERS = {
    "features": features,
    "sequential": lambda: nn.Sequential(nn.Identity(), plain()),
    "own class": lambda: Own(plain()),
    "own class of features": lambda: Own(features()),
    "data parallel": lambda: nn.DataParallel(plain()),  # whose names are those of DistributedDataParallel
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models_tell_it_too(wrapper):
    model = WRAPPERS[wrapper]().eval()
    swap_layers(model, {"kind": "attention"}, POSITIONAL)
    for size in ((144, 256), (64, 144)):
        assert grids_used(model, torch.randn(1, 3, *size)) == {(size[0] // 16, size[1] // 16, 1)}


# --------------------------------------------------------------------------------- networks that do not tell


class Plain(nn.Module):
    """A ViT without a patch embedding of timm: tokens come in, ``prefix`` before ``rows x columns``."""

    def __init__(self, dim=24):
        super().__init__()
        self.blocks = nn.Sequential(timm.layers.Attention(dim, 3), timm.layers.Attention(dim, 3))

    def forward(self, x):
        return self.blocks(x)


POSITIONS = [
    {"blend": 0.3},
    {"blend": 0.0},
    {"candidates": "grid", "num_candidates": 3},
    {"candidates": "window", "num_candidates": 1},
    {"candidates": "stride", "num_candidates": 2},
    {"border": "zeros", "k": 9},
    {"learn_blend": "layer"},
]


@pytest.mark.parametrize("settings", POSITIONS)
@pytest.mark.parametrize("tokens", [16, 49])  # squares, by accident or not
def test_an_unknown_grid_is_an_error_that_says_how_to_pass_it(settings, tokens):
    model = Plain()
    swap_layers(model, {"kind": "attention"}, POSITIONAL | {"blend": 1.0, "k_policy": "clamp"} | settings)
    x = torch.randn(1, tokens, 24)
    with pytest.raises(ValueError, match=rf"where {tokens} tokens lie is not known.*convnn.set_token_grid\(model"):
        model(x)
    set_token_grid(model, "square")
    assert model(x).shape == x.shape


def test_features_alone_need_no_grid():
    for settings in ({}, {"candidates": "random", "num_candidates": 8}):
        model = Plain()
        swap_layers(model, {"kind": "attention"}, POSITIONAL | {"blend": 1.0} | settings)
        assert model(torch.randn(1, 15, 24)).shape == (1, 15, 24)


def test_what_the_user_says_counts():
    model = Plain()
    swap_layers(model, {"kind": "attention"}, POSITIONAL)
    assert set_token_grid(model, (3, 2), num_prefix_tokens=43) == ["blocks.0", "blocks.1"]
    assert grids_used(model, torch.randn(1, 49, 24)) == {(3, 2, 43)}
    with pytest.raises(ValueError, match=r"50 tokens less 43 prefix tokens are neither grid_size=\(3, 2\)"):
        model(torch.randn(1, 50, 24))
    set_token_grid(model.blocks[0], (7, 7), num_prefix_tokens=0)
    assert grids_used(model, torch.randn(1, 49, 24)) == {(7, 7, 0), (3, 2, 43)}
    for grid in ((0, 3), (2, 2, 2)):
        with pytest.raises(ConfigError, match="must be"):
            set_token_grid(model, grid)
    with pytest.raises(ConfigError, match="no layer of this model asks for a grid"):
        set_token_grid(nn.Linear(2, 2), (1, 2))


def test_a_patch_embedding_that_tells_nothing_is_no_guess():
    class Patches(nn.Module):
        def forward(self, x):
            return x

    model = Plain()
    model.patch_embed = Patches()
    model.forward = lambda x: model.blocks(model.patch_embed(x))
    swap_layers(model, {"kind": "attention"}, POSITIONAL)
    with pytest.raises(ValueError, match="where 16 tokens lie is not known"):
        model(torch.randn(1, 16, 24))
    model.patch_embed.grid_size = (2, 8)
    assert grids_used(model, torch.randn(1, 16, 24)) == {(2, 8, 0)}
    with pytest.raises(ValueError, match="where 18 tokens lie is not known"):
        model(torch.randn(1, 18, 24))


def test_other_prefix_tokens_than_the_model_says_are_no_guess():
    model = swapped("vit_tiny_patch16_224", img_size=64)
    for layer in (block.attn for block in model.blocks):
        layer.num_prefix_tokens = 0
    with pytest.raises(ValueError, match=r"17 tokens less 0 prefix tokens are not the 4x4 grid .*num_prefix_tokens"):
        model(torch.randn(1, 3, 64, 64))
    set_token_grid(model, None, num_prefix_tokens=1)
    assert grids_used(model, torch.randn(1, 3, 64, 64)) == {(4, 4, 1)}


def test_an_export_counts_the_tokens_of_the_present_size():
    model = swapped("vit_tiny_patch16_224", POSITIONAL | {"k": 17}, img_size=64)
    model.set_input_size((64, 144))
    with pytest.raises(ConfigError, match="k=17 is less than the 37 tokens"):
        export_layers(model)


# ----------------------------------------------------------------------------------------- compiled and exported


@pytest.mark.long
def test_a_compiled_model_is_swapped_too():
    model = torch.compile(plain(), backend="eager").eval()
    swap_layers(model, {"kind": "attention"}, POSITIONAL)
    assert grids_used(model, torch.randn(1, 3, 64, 144)) == {(4, 9, 1)}


@pytest.mark.long
def test_a_compiled_vit_has_the_grid_of_each_image():
    model = swapped("vit_tiny_patch16_224", dynamic_img_size=True, num_classes=5)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for size in ((64, 144), (96, 96), (64, 144)):  # 36 tokens each
        images = torch.randn(2, 3, *size)
        assert torch.allclose(compiled(images), model(images), atol=1e-5)
        assert model.blocks[0].attn.token_grid.size == (size[0] // 16, size[1] // 16)


@pytest.mark.long
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_vit_computes_the_same(strict):
    model = swapped("vit_tiny_patch16_224", img_size=(64, 144), num_classes=5)
    images = torch.randn(2, 3, 64, 144)
    program = torch.export.export(model, (images,), strict=strict)
    assert torch.allclose(program.module()(images), model(images), atol=1e-5)


def test_a_layer_alone_is_a_square_by_contract():
    layer = ConvNNAttention(8, 2, 4, blend=0.3, num_prefix_tokens=1)
    assert grids_used(layer, torch.randn(1, 17, 8)) == {(4, 4, 1)}
