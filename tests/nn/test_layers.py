"""Modules as users meet them: signatures, errors, sizes, state, and properties that no reference shows."""

import copy

import pytest
import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import nn

from convnn import ConfigError, ConvNN2d, ConvNNAttention, HybridConvNN2d, HybridConvNNAttention, OperatorConfig
from convnn.config.checks import check_operator
from convnn.nn.adapters.layer import AdaptedAttention
from convnn.nn.base import Site


def attention_config(**kwargs):
    base = {"kind": "attention", "similarity": "dot", "self_first": False, "weighting": "softmax", "k": 4}
    return OperatorConfig(**(base | {"aggregation": "depthwise"} | kwargs))


@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
def test_two_sizes_through_one_module(blend):
    conv = ConvNN2d(3, 4, 5, blend=blend)
    for size in ((8, 8), (5, 9), (8, 8)):
        assert conv(torch.randn(2, 3, *size)).shape == (2, 4, *size)
    attention = ConvNNAttention(8, 2, 5, blend=blend, num_prefix_tokens=1)
    for n in (17, 26, 17):
        assert attention(torch.randn(2, n, 8)).shape == (2, n, 8)


def test_output_shape_is_conv2ds():
    for kernel, stride, padding, dilation in [(3, 2, 1, 1), (5, 3, 1, 1), (3, 1, 0, 2), (1, 2, 0, 1), (7, 2, 3, 1)]:
        x = torch.randn(1, 2, 17, 14)
        expected = nn.Conv2d(2, 3, kernel, stride, padding, dilation)(x).shape
        module = ConvNN2d(2, 3, 4, stride, padding, kernel_size=kernel, dilation=dilation)
        assert module(x).shape == expected


@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
def test_output_has_the_memory_format_of_the_input(blend):
    module, x = ConvNN2d(4, 8, 5, padding=1, blend=blend, bias=False), torch.randn(2, 4, 6, 6)
    assert module(x).is_contiguous()
    assert module(x.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)


def test_no_convolution_stands_in_where_the_own_token_comes_twice():
    layer = ConvNN2d(3, 4, 9, blend=0.0, self_again=-0.1)
    plain = ConvNN2d(3, 4, 9, blend=0.0, self_again=-0.1, fast=False)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(layer(x), plain(x))


def test_set_spectrum_keeps_parameters_and_state_dict():
    module = ConvNN2d(3, 4, 9, blend=0.0)
    keys, ids = module.state_dict().keys(), [id(p) for p in module.parameters()]
    x = torch.randn(1, 3, 6, 6)
    outputs = []
    for blend, k in ((0.0, 9), (0.5, 9), (1.0, 4)):
        module.set_spectrum(blend=blend, k=k)
        outputs.append(module(x))
    assert module.spectrum() == {"blend": 1.0, "k": 4, "temperature": 1.0}
    assert keys == module.state_dict().keys() and ids == [id(p) for p in module.parameters()]
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[1], outputs[2])


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"blend": 1.5}, "blend=1.5"),
        ({"k": 0}, "k=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"similarity": "cos"}, "similarity=cos"),
        ({"groups": 2}, "groups=2"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ConvNN2d(3, 4, **kwargs)


def test_bad_calls_name_the_shape():
    with pytest.raises(ValueError, match=r"expected \(batch, 3, height, width\), got \(1, 2, 8, 8\)"):
        ConvNN2d(3, 4)(torch.randn(1, 2, 8, 8))
    with pytest.raises(ValueError, match="smaller than the window"):
        ConvNN2d(3, 4, kernel_size=7, padding=0)(torch.randn(1, 3, 5, 5))
    with pytest.raises(ValueError, match="12 tokens less 0 prefix tokens"):
        ConvNNAttention(8, 2, 4, blend=0.5)(torch.randn(1, 12, 8))
    with pytest.raises(ValueError, match="num_heads=3 must divide dim=8"):
        ConvNNAttention(8, 3)


def test_masks_are_refused_not_ignored():
    module = ConvNNAttention(8, 2, 4)
    x = torch.randn(1, 9, 8)
    for kwargs in ({"attn_mask": torch.ones(9, 9, dtype=torch.bool)}, {"is_causal": True}):
        with pytest.raises(ValueError, match="not supported"):
            module(x, **kwargs)
    block = Block(8, 2)
    block.attn = module
    assert block(x).shape == x.shape  # timm's block passes attn_mask=None and is_causal=False


@pytest.mark.parametrize(
    "conv, message",
    [
        (nn.Conv2d(2, 2, 3, padding_mode="reflect"), "padding_mode=reflect"),
        (nn.Linear(2, 2), "not a convolution"),
    ],
)
def test_convolutions_that_cannot_be_replaced_say_why(conv, message):
    with pytest.raises(ConfigError, match=message):
        ConvNN2d.from_layer(conv, OperatorConfig(), "fresh", Site("here"))


def test_transfer_needs_enough_slots():
    conv = nn.Conv2d(2, 2, 5, padding=2)
    with pytest.raises(ConfigError, match=r"'here' has a 5x5 kernel and needs operator.k >= 25, not 9"):
        ConvNN2d.from_layer(conv, OperatorConfig(k=9), "transfer", Site("here"))
    with pytest.raises(ConfigError, match=r"needs operator.k = 25"):
        ConvNN2d.from_layer(conv, OperatorConfig(k=26, slots="raster"), "transfer", Site("here"))


def test_gated_attention_is_read_by_an_adapter_and_refused_elsewhere():
    gated = Attention(8, 2, gated=True)
    layer = ConvNNAttention.from_layer(gated, attention_config(), "fresh", Site("a", 1, (3, 3)))
    assert isinstance(layer, AdaptedAttention) and layer.plain.gate is not None
    with pytest.raises(ConfigError, match="gate or output norm"):
        HybridConvNNAttention.from_layer(gated, attention_config(branch_ratio=0.5), "fresh", Site("a", 1, (3, 3)))


def test_hybrid_branch_without_channels_is_refused():
    conv = nn.Conv2d(3, 4, 3, padding=1)
    for ratio in (0.1, 0.999):
        config = OperatorConfig(branch_ratio=ratio)
        if ratio == 0.1:
            with pytest.raises(ConfigError, match="leaves a branch of 'here' without any"):
                HybridConvNN2d.from_layer(conv, config, "fresh", Site("here"))
        else:
            hybrid = HybridConvNN2d.from_layer(conv, config, "fresh", Site("here"))
            assert hybrid.neighbors.out_channels == 3 and hybrid.conv.out_channels == 1


@pytest.mark.parametrize("blend", [0.3, 1.0])
def test_selection_passes_no_gradient_but_every_parameter_gets_one(blend):
    module = ConvNN2d(3, 4, 5, blend=blend)
    x = torch.randn(1, 3, 6, 6, requires_grad=True)
    module(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    assert x.grad.isfinite().all()
    attention = ConvNNAttention(8, 2, 5, blend=blend, qkv_bias=True)
    attention(torch.randn(1, 16, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in attention.parameters())


def test_feature_end_commutes_with_permutations_of_tokens():
    torch.manual_seed(0)
    module = ConvNNAttention(8, 2, 5).double()
    x = torch.randn(2, 16, 8, dtype=torch.float64)
    order = torch.randperm(16)
    assert (module(x)[:, order] - module(x[:, order])).abs().max() < 1e-12


def test_position_end_commutes_with_translation():
    torch.manual_seed(0)
    module = ConvNN2d(2, 3, 6, blend=0.0, fast=False).double()
    x = torch.zeros(1, 2, 12, 12, dtype=torch.float64)
    x[..., 3:7, 3:7] = torch.randn(4, 4)
    moved = torch.roll(x, (2, 1), (-2, -1))
    assert (torch.roll(module(x), (2, 1), (-2, -1)) - module(moved)).abs().max() < 1e-12


def test_constant_and_zero_maps_give_finite_results():
    for similarity in ("cosine", "euclidean", "dot"):
        for blend in (0.5, 1.0):
            module = ConvNN2d(2, 3, 5, blend=blend, similarity=similarity, weighting="softmax")
            for value in (0.0, 1.0):
                x = torch.full((1, 2, 5, 5), value, requires_grad=True)
                y = module(x)
                y.sum().backward()
                assert y.isfinite().all() and x.grad.isfinite().all()


def test_bf16_autocast_keeps_the_choice_of_neighbours_by_position():
    module = ConvNN2d(3, 4, 9, blend=0.0, fast=False)
    x = torch.randn(2, 3, 20, 20)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert (y.float() - module(x)).abs().max() < 0.05


def test_repr_states_the_configuration():
    assert "k=9, blend=0.5, slots=raster" in repr(ConvNN2d(3, 4, 9, blend=0.5, slots="raster"))
    assert "num_heads=2, k=4, blend=1" in repr(ConvNNAttention(8, 2, 4))


def test_attention_without_positions_takes_any_sequence_length():
    module = ConvNNAttention(8, 2, 4)
    assert module(torch.randn(1, 13, 8)).shape == (1, 13, 8)


@pytest.mark.parametrize("learned", ["no", "layer"])
def test_blend_k_and_temperature_travel_with_the_state(learned):
    torch.manual_seed(0)
    a, b = (ConvNN2d(3, 4, 9, learn_blend=learned, weighting="softmax", aggregation="conv") for _ in range(2))
    a.set_spectrum(k=5, temperature=0.3, **({} if learned == "layer" else {"blend": 0.35}))
    b.load_state_dict(a.state_dict())
    x = torch.randn(2, 3, 5, 6)
    assert torch.equal(a(x), b(x)) and a.spectrum() == b.spectrum()
    older = {name: value for name, value in a.state_dict().items() if "extra" not in name}
    b.set_spectrum(k=7)
    b.load_state_dict(older)  # as before there was an extra state: nothing moves
    assert b.k == 7


def test_an_average_of_weights_leaves_the_spectrum_alone():
    from timm.utils import ModelEmaV3

    layer = nn.Sequential(ConvNN2d(3, 4, 9, blend=0.4))
    average = ModelEmaV3(layer, decay=0.5)
    layer[0].set_spectrum(blend=0.8)
    average.update(layer)
    assert average.module[0].blend == 0.4  # of its own, until it is told
    average.module.load_state_dict(average.module.state_dict() | {"0._extra_state": layer[0].get_extra_state()})
    assert average.module[0].blend == 0.8


def test_a_state_is_loaded_without_pickle(tmp_path):
    layer, other = ConvNNAttention(8, 2, 4, blend=0.25), ConvNNAttention(8, 2, 4)
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.blend == 0.25


def test_dropout_on_the_output_drops_channels_and_leaves_the_weights():
    torch.manual_seed(0)
    layer = ConvNNAttention(32, 1, 4, attn_drop=0.5, dropout_on="output").double()
    plain = copy.deepcopy(layer).eval()
    layer.proj, plain.proj = nn.Identity(), nn.Identity()
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    y, whole = layer(x), plain(x)
    dropped = y == 0
    assert 0.4 < dropped.double().mean() < 0.6 and torch.allclose(y[~dropped], 2 * whole[~dropped])
    with pytest.raises(ConfigError, match="dropout_on=output does not apply to operators of kind conv"):
        ConvNN2d(3, 4, 9, dropout_on="output")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"self_again": -0.1, "self_first": False}, "self_again needs .*self_first=true and .*slots=rank"),
        ({"self_score": 1.0, "slots": "raster"}, "self_score needs .*slots=rank"),
        ({"self_score": 1.0}, "self_score needs .*weighting=softmax or score"),
        ({"self_again": 0.1, "similarity": "euclidean"}, "self_again needs .*similarity=cosine or dot"),
        ({"branch_input": "split"}, "branch_input=split does not apply"),
        ({"score_step": 0.0}, "score_step=0.0 must lie in"),
    ],
)
def test_settings_of_scores_that_contradict_each_other(settings, message):
    with pytest.raises(ConfigError, match=message):
        check_operator(OperatorConfig(**settings))
