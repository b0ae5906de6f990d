"""A trained model's layers at other settings: its weights stay, and what is not asked for stays where it was."""

import copy
import math
from functools import partial

import pytest
import timm
import torch
from helpers import tiny

from convnn import ConfigError, swap_layers
from convnn.config.continued import changed_config
from convnn.models.build import build_network
from convnn.models.mass import held_by_neighbors, neighbor_mass
from convnn.models.moving import Moving
from convnn.models.swap import neighbor_layers
from convnn.nn.attention import ConvNNAttention

SIZE = (10, 3, 16)
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def trained(*overrides):
    """A swapped ViT of 2 layers and 17 tokens whose weights are none that a new one has."""
    config = tiny(*overrides, vit=True)
    model, _, _ = build_network(config, SIZE[0], (3, 16, 16))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return config, model.eval()


def moved(config, model, *overrides):
    """The layers at these settings."""
    names = {override.partition("=")[0].removeprefix("operator.") for override in overrides}
    return Moving(model, config.backbone, SIZE).layers(changed_config(config, overrides), names, config.operator.k)


def logits(config, model, *overrides):
    with Moving(model, config.backbone, SIZE).placed(moved(config, model, *overrides)), torch.no_grad():
        return model(IMAGES)


@pytest.mark.parametrize("setting", ["operator.k=4", "operator.blend=0.3", "operator.temperature=2"])
def test_what_moves_is_what_the_layers_can_be_set_to(setting):
    config, model = trained("operator.k=9")
    key, value = setting.removeprefix("operator.").split("=")
    other = copy.deepcopy(model)
    for layer in neighbor_layers(other).values():
        layer.set_spectrum(**{key: int(value) if key == "k" else float(value)})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = dict(model.named_modules())
    with torch.no_grad():
        expected, own = other(IMAGES), model(IMAGES)
    assert torch.equal(logits(config, model, setting), expected) and not torch.equal(own, expected)
    assert dict(model.named_modules()) == modules and torch.equal(model(IMAGES), own)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_layer_shares_the_weights_and_stays_where_a_schedule_left_it():
    config, model = trained("operator.k=9")
    for i, layer in enumerate(neighbor_layers(model).values()):
        layer.set_spectrum(blend=0.25 * (i + 1), temperature=3, k=5)
    for name, layer in moved(config, model, "operator.similarity=cosine").items():
        own = model.get_submodule(name)
        assert layer is not own and layer.qkv.weight.data_ptr() == own.qkv.weight.data_ptr()
        assert layer.spectrum() == own.spectrum() and layer.selection.similarity == "cosine"
    layers = moved(config, model, "operator.k=3").values()
    assert [layer.spectrum() for layer in layers] == [{"blend": b, "k": 3, "temperature": 3} for b in (0.25, 0.5)]


def test_any_k_where_no_weight_belongs_to_a_rank():
    config, model = trained("operator.k=9", "operator.aggregation=sum")
    plain = timm.layers.attention.Attention(24, 3, qkv_bias=True)
    layers = moved(config, model, "operator.k=17")
    own = model.blocks[0].attn
    plain.qkv, plain.proj = own.qkv, own.proj
    x = torch.randn(2, 17, 24)
    with torch.no_grad():
        assert torch.allclose(layers["blocks.0.attn"](x), plain.eval()(x), atol=1e-5)


REFUSED = {
    ("operator.k=12",): "operator.k=12: 'blocks.0.attn' has a weight for each of 9 neighbours",
    ("operator.aggregation=conv",): r"slot_weight is \(8, 9\) in the trained model and \(8, 8, 9\) with these settings",
    ("operator.aggregation=sum",): r"slot_weight is \(8, 9\) in the trained model and none",
    ("operator.head_dim=4",): r"proj.weight is \(24, 24\) in the trained model and \(24, 12\)",
    ("operator.learn_blend=layer",): "blend_logit is none in the trained model",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_what_changes_a_parameter_is_refused(overrides):
    config, model = trained("operator.k=9")
    modules = dict(model.named_modules())
    with pytest.raises(ConfigError, match=REFUSED[overrides]):
        moved(config, model, *overrides)
    assert dict(model.named_modules()) == modules


def test_a_learned_blend_is_set_once_it_is_learned_no_more():
    config, model = trained("operator.learn_blend=layer", "operator.blend=0.5")
    with pytest.raises(ConfigError, match=r"has learned its blend; operator\.learn_blend=no lets it be set"):
        moved(config, model, "operator.blend=0.25")
    layers = moved(config, model, "operator.learn_blend=no", "operator.blend=0.25")
    assert [layer.blend for layer in layers.values()] == [0.25, 0.25]
    own = [layer.blend for layer in neighbor_layers(model).values()]
    kept = moved(config, model, "operator.learn_blend=no")
    assert [layer.blend for layer in kept.values()] == pytest.approx(own)


def test_a_hybrid_moves_in_its_branch_alone():
    config, model = trained("operator=hybrid_attention", "operator.k=9", "operator.branch_ratio=0.5")
    layer = moved(config, model, "operator.k=4")["blocks.1.attn"]
    own = model.blocks[1].attn
    assert layer.neighbors.k == 4 and own.neighbors.k == 9
    assert layer.attention.qkv.weight.data_ptr() == own.attention.qkv.weight.data_ptr()


def test_a_convolutional_run_moves_too():
    config = tiny("operator=spectrum", "operator.blend=0", "swap.init=transfer", "swap.first=2")
    model, _, _ = build_network(config, 10, (3, 8, 8))
    moving = Moving(model.eval(), config.backbone, (10, 3, 8))
    layers = moving.layers(changed_config(config, ["operator.blend=1"]), {"blend"}, 9)
    assert list(layers) == moving.swapped and all(layer.blend == 1 for layer in layers.values())
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad(), moving.placed(dict(list(layers.items())[:1])):
        one = model(x)
        inside = [layer.blend for layer in neighbor_layers(model).values()]
    assert inside == [1, 0] and not torch.equal(one, model(x))


# ------------------------------------------------------------------------------------- what neighbours hold


def dense_mass(layer, x, index):
    """The softmax over all tokens, summed at the neighbours, from the definition, in loops: (B, H, N)."""
    b, n, c = x.shape
    h = layer.num_heads
    q, k, _ = (x @ layer.qkv.weight.T + layer.qkv.bias).view(b, n, 3, h, c // h).permute(2, 0, 3, 1, 4)
    held = torch.zeros(b, h, n, dtype=torch.float64)
    for image in range(b):
        for head in range(h):
            for query in range(n):
                scores = [
                    math.exp(float(q[image, head, query] @ other) / math.sqrt(c // h) / layer.temperature)
                    for other in k[image, head]
                ]
                held[image, head, query] = sum(scores[j] for j in index[image, head, query]) / sum(scores)
    return held


@pytest.mark.parametrize(("blend", "prefix"), [(1.0, 1), (0.5, 1), (0.0, 0)])
def test_the_mass_is_that_of_a_dense_softmax(blend, prefix):
    torch.manual_seed(0)
    layer = ConvNNAttention(8, 2, 4, blend, qkv_bias=True, num_prefix_tokens=prefix, aggregation="sum", temperature=0.5)
    layer = layer.double().eval()
    with torch.no_grad():
        layer.qkv.weight *= 2
        x = torch.randn(2, 9 + prefix, 8, dtype=torch.float64)
        found = layer.neighborhood(x)
        mass = neighbor_mass(layer, partial(layer.neighborhood, x), found)
        assert torch.allclose(mass, dense_mass(layer, x, found.index), atol=1e-12) and mass.min() < 0.9
    assert layer.k == 4 and layer.selection.candidates == "all"


def test_all_tokens_hold_all_of_it_and_more_neighbours_hold_more():
    torch.manual_seed(0)
    x = torch.randn(2, 17, 24)
    means = []
    for k in (1, 4, 9, 17):
        layer = ConvNNAttention(24, 3, k, aggregation="sum", num_prefix_tokens=1).eval()
        layer.qkv.weight.data.normal_(generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            means.append(neighbor_mass(layer, partial(layer.neighborhood, x), layer.neighborhood(x)).mean().item())
    assert means == sorted(means) and means[0] < 0.99 and means[-1] == pytest.approx(1, abs=1e-9)


def test_padding_is_no_part_of_plain_attention():
    layer = ConvNNAttention(8, 2, 9, 0.0, aggregation="sum", border="zeros").double().eval()
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        found = layer.neighborhood(x)
        mass = neighbor_mass(layer, partial(layer.neighborhood, x), found)
    assert found.is_padding.any() and mass[0, 0, 4] == pytest.approx(1) and mass[0, 0, 0] < 0.99


def test_layers_without_a_softmax_tell_of_their_window():
    model = timm.create_model("resnet18", num_classes=2)
    swap_layers(model, {"match": "layer4.*", "min_kernel": 3}, {"k": 9, "blend": 0.0})
    held = held_by_neighbors(model, [torch.randn(1, 3, 64, 64)])
    assert len(held) == 4 and {one.mass for one in held.values()} == {None}
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, num_classes=2)
    swap_layers(vit, "*", "convnn_attention", k=9, blend=0.0)
    found = held_by_neighbors(vit, [torch.randn(1, 3, 32, 32)] * 2)["blocks.0.attn"]
    assert 0 < found.mass < 1 and 0.4 < found.window < 1  # at the border a window has fewer tokens than 9


def test_the_mass_inside_shifted_windows_with_the_own_token_first():
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 12, "depths": (2,), "num_heads": (2,)}
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **shape).double()
    settings = {"kind": "attention", "aggregation": "sum", "k": 5, "self_first": True}
    swap_layers(model, "*", settings, init="transfer")
    layer, call = model.layers[0].blocks[1].attn, {}
    hook = layer.register_forward_pre_hook(lambda _, args, given: call.update(args=args, given=given), with_kwargs=True)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model.eval()(images)
    hook.remove()
    heads = layer.adapter.read(layer.plain, *call["args"], **call["given"])
    score = heads.q @ heads.k.mT / heads.q.shape[-1] ** 0.5 + heads.bias
    weights = score.masked_fill(heads.blocked, -torch.inf).softmax(-1)
    found = layer.neighborhood(*call["args"], **call["given"])
    wanted = (weights.gather(-1, found.index) * found.valid).sum(-1).mean()
    held = held_by_neighbors(model, [images])["layers.0.blocks.1.attn"]
    assert held.mass == pytest.approx(wanted.item(), abs=1e-12) and 0.1 < held.mass < 0.99


# ------------------------------------------------------------------------------------- what the layers were told


def test_moved_layers_know_the_grid_that_the_run_was_told():
    told = ["backbone.token_grid=[2,8]", "backbone.prefix_tokens=1"]
    config, model = trained("operator=convnn_attention", "operator.k=5", "operator.blend=0.5", *told)
    before = model(IMAGES)
    assert torch.equal(logits(config, model, "operator.k=5"), before)
    layer = moved(config, model, "operator.k=3")["blocks.0.attn"]
    assert layer.geometry(17).height == 2 and layer.geometry(17).width == 8
    attention = ["operator=convnn_attention", "swap=all_attention", "operator.aggregation=sum", "operator.blend=0.5"]
    plain, model = trained("swap=none", *told)
    found = Moving(model, plain.backbone, SIZE).layers(changed_config(plain, attention), {"blend"}, 9)
    assert found["blocks.1.attn"].geometry(17).width == 8


def test_a_setting_that_a_rule_has_of_its_own_is_refused():
    rules = ["+swap.rules.a={match:blocks.0.*,operator:{k:4}}", "+swap.rules.b={match:blocks.1.*}"]
    config, model = trained("operator=convnn_attention", "operator.k=9", "swap=none", *rules)
    with pytest.raises(ConfigError, match=r"operator\.k: swap\.rules\.a sets its own"):
        moved(config, model, "operator.k=2")
    assert moved(config, model, "operator.blend=0.5")["blocks.0.attn"].k == 4
