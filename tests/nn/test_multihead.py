"""``torch.nn.MultiheadAttention`` replaced: self-attention alone, in torch's encoder and by itself."""

import copy

import pytest
import torch
from attention_kinds import best_scores
from comparing import close
from torch import nn

from convnn import ConfigError, swap_layers

SETTINGS = {"kind": "attention", "aggregation": "sum"}


def pair(k=6, **settings):
    """Return a model with one layer, and the same with it replaced."""
    torch.manual_seed(0)
    plain = nn.ModuleList([nn.MultiheadAttention(8, 2, **settings)]).double().eval()
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.3)
    model = copy.deepcopy(plain)
    swap_layers(model, "*", SETTINGS | {"k": k}, init="transfer")
    return plain[0], model[0]


def outcome(layer, x):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y, weights = layer(x, x, x, need_weights=False)
    assert weights is None
    (y * torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape)).sum().backward()
    return y.detach(), x.grad, *(p.grad for p in layer.parameters())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("shape", [(3, 6, 8), (6, 8)], ids=["batch", "single"])
def test_with_all_neighbours_it_is_the_layer(bias, first, shape):
    layer, new = pair(bias=bias, batch_first=first)
    x = torch.randn(*shape, dtype=torch.float64)
    x = x if first or len(shape) == 2 else x.transpose(0, 1).contiguous()
    for mine, theirs in zip(outcome(new, x), outcome(layer, x), strict=True):
        close(mine, theirs)


def test_fewer_neighbours_are_the_best_of_the_scores(monkeypatch):
    layer, new = pair(k=3, batch_first=True)
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    with best_scores(monkeypatch, 3):
        want = layer(x, x, x, need_weights=True)[0]  # without the fused kernel
    close(new(x, x, x, need_weights=False)[0], want)


@pytest.mark.parametrize(
    "given, message",
    [
        ({}, "need_weights is not supported: pass need_weights=False"),
        ({"need_weights": False, "attn_mask": torch.zeros(6, 6)}, "attn_mask is not supported"),
        ({"need_weights": False, "is_causal": True}, "is_causal is not supported"),
        ({"need_weights": False, "key_padding_mask": torch.zeros(3, 6)}, "key_padding_mask is not supported"),
    ],
)
def test_what_cannot_be_answered_is_refused(given, message):
    _, new = pair(batch_first=True)
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        new(x, x, x, **given)
    with pytest.raises(ValueError, match="query, key and value must be the same tensor"):
        new(x, x + 1, x, need_weights=False)


@pytest.mark.parametrize("extra", [{"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 4}])
def test_other_attention_is_refused(extra):
    model = nn.ModuleList([nn.MultiheadAttention(8, 2, **extra)])
    with pytest.raises(ConfigError, match=r"could be replaced: 0 \(MultiheadAttention, which (has|adds)"):
        swap_layers(model, "*", SETTINGS | {"k": 2})


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_an_encoder_layer_takes_no_way_around(first, norm_first, training):
    """In evaluation without gradients torch's layer reads the weights and computes plain attention by itself."""
    torch.manual_seed(0)
    plain = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=first, norm_first=norm_first).double()
    plain.train(training)
    model, few = copy.deepcopy(plain), copy.deepcopy(plain)
    swap_layers(nn.ModuleList([model]), "*", SETTINGS | {"k": 6}, init="transfer")
    swap_layers(nn.ModuleList([few]), "*", SETTINGS | {"k": 2}, init="transfer")
    x = torch.randn(6, 6, 8, dtype=torch.float64)
    with torch.no_grad():
        close(model(x), plain(x))
        assert (few(x) - plain(x)).abs().max() > 1e-3
    assert few.self_attn.batch_first == first


def test_an_encoder_refuses_masks():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    plain = nn.TransformerEncoder(layer, 2).double().eval()
    model = copy.deepcopy(plain)
    report = swap_layers(model, "*", SETTINGS | {"k": 6}, init="transfer")
    assert [row.old for row in report.rows] == ["MultiheadAttention"] * 2
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    padding = torch.tensor([[False] * 5 + [True]] * 3)
    with torch.no_grad():
        close(model(x), plain(x))
        for given in ({"mask": torch.zeros(6, 6).bool()}, {"src_key_padding_mask": padding}):
            with pytest.raises(ValueError, match="not supported"):
                model(x, **given)
