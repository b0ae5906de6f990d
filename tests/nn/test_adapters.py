"""Each kind of attention, read through its adapter, against the layer itself."""

import copy
import pickle

import pytest
import torch
from attention_kinds import KINDS, best_scores, unfused, without_positions
from attention_kinds_apart import APART
from comparing import close
from torch import nn

from convnn import ConfigError, ConvNNAttention, OperatorConfig
from convnn.config.presets import operator_of
from convnn.nn.adapters.registry import adapter_of, stand_in
from convnn.nn.base import Site

KINDS = KINDS | APART
ALL = sorted(KINDS)


def replaced(kind, k, init="transfer", **settings):
    """Return the layer and its replacement."""
    layer = kind.layer()
    config = operator_of({"kind": "attention", "k": k, "aggregation": "sum"} | settings)
    source, site = stand_in(layer, init, Site("here"), True)
    return layer, ConvNNAttention.from_layer(source, config, init, site).eval()


def results(function, module, x, given):
    """Return output and gradients of the input, of the other arguments and of the parameters."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    given = {n: v.clone().requires_grad_() if is_bias(n, v) else v for n, v in given.items()}
    y = output(function(x, **given))
    (y * torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape)).sum().backward()
    parameters = {n.removeprefix("plain."): p.grad for n, p in module.named_parameters()}
    return y.detach(), x.grad, {n: v.grad for n, v in given.items() if is_bias(n, v)}, parameters


def output(y):
    """The tensor alone: some return the map's size besides."""
    return y[0] if isinstance(y, tuple) else y


def is_bias(name, value):
    return isinstance(value, torch.Tensor) and name not in ("mask", "rope", "rope_cos", "rope_sin", "attn_mask")


def alike(one, other):
    close(one[0], other[0])
    close(one[1], other[1])
    for own, theirs in zip(one[2:], other[2:], strict=True):
        shared = {n for n, g in theirs.items() if g is not None}
        assert shared == {n for n, g in own.items() if g is not None and n != "slot_weight"}
        for name in shared:
            close(own[name], theirs[name])


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_with_all_neighbours_it_is_the_layer(name, fast):
    kind = KINDS[name]
    layer, new = replaced(kind, kind.tokens)
    new.fast = fast
    x, given = kind.call()
    alike(results(new, new, x, given), results(layer, layer, x, given))


@pytest.mark.parametrize("name", ["eva", "beit", "swin shifted", "levit", "talking heads"])
def test_slot_weights_of_one_change_nothing(name):
    kind = KINDS[name]
    layer, new = replaced(kind, kind.tokens, aggregation="depthwise")
    x, given = kind.call()
    assert new.slot_weight is not None
    alike(results(new, new, x, given), results(layer, layer, x, given))


WATCHED = [n for n in ALL if KINDS[n].plain_softmax]
IN_TURN = ["cascaded"]


@pytest.mark.parametrize("name, selects", [(n, b) for n in WATCHED for b in (True, False) if b or n not in IN_TURN])
def test_fewer_neighbours_are_the_best_of_the_scores(name, selects, monkeypatch):
    kind, k = KINDS[name], 3
    layer, new = replaced(kind, k, bias_selects=selects)
    x, given = kind.call()
    chosen, seen = None, []
    if not selects:
        bare, others = without_positions(layer, kind, given)
        with best_scores(monkeypatch, k, seen=seen):
            bare(x, **others)
        chosen = seen
    dense = unfused(layer)
    with best_scores(monkeypatch, k, chosen):
        want = results(dense, dense, x, given)
    alike(results(new, new, x, given), want)


@pytest.mark.parametrize("name", IN_TURN)
def test_each_head_in_turn_chooses_by_its_scores_alone(name, monkeypatch):
    kind, k = KINDS[name], 3
    layer, new = replaced(kind, k, bias_selects=False)
    (x, _), chosen = kind.call(), []
    for head in range(layer.num_heads):  # whose features are those that the heads before it have made
        seen = []
        with best_scores(monkeypatch, k, [*chosen, *[torch.zeros(2, 9, 9)] * layer.num_heads], seen):
            layer(x)
        chosen.append(seen[head] - layer.attention_biases[head, layer.attention_bias_idxs])
    with best_scores(monkeypatch, k, chosen):
        want = results(layer, layer, x, {})
    alike(results(new, new, x, {}), want)
    found = new.neighborhood(x)
    assert found.index.shape == (2, layer.num_heads, 9, k)
    for head, score in enumerate(chosen):
        best = score.detach().topk(k).indices
        assert torch.equal(found.index[:, head], best)


@pytest.mark.parametrize("name", ["swin shifted", "swin v2 shifted", "torchvision swin"])
@pytest.mark.parametrize("settings", [{}, {"blend": 0.5}, {"blend": 0.0}, {"bias_selects": True}], ids=str)
def test_no_neighbour_lies_across_a_border(name, settings):
    kind = KINDS[name]
    _, new = replaced(kind, 9, **settings)
    x, given = kind.call()
    blocked = new.adapter.read(new.plain, x, **given).blocked
    found = new.neighborhood(x, **given)
    across = blocked.expand(-1, 2, -1, -1).gather(-1, found.index)
    assert blocked.any() and not (across & found.valid).any()
    reachable = (~blocked).sum(-1).clamp(max=9)
    assert torch.equal(found.valid.sum(-1), reachable.expand(-1, 2, -1))
    assert (found.weights[~found.valid] == 0).all()
    close(found.weights.sum(-1), torch.ones(found.weights.shape[:-1], dtype=torch.float64))


def test_borders_keep_a_far_end_of_the_map_from_every_output():
    kind = KINDS["swin shifted"]
    _, new = replaced(kind, 9)
    x, given = kind.call()
    before = new(x, **given)
    mask = given["mask"][2]  # of the last window, cut in four
    first = (mask[0] == 0).nonzero().flatten()
    changed = x.clone()
    others = (mask[0] != 0).nonzero().flatten()
    changed[2, others] += 3.0
    after = new(changed, **given)
    assert torch.equal(after[2, first], before[2, first]) and not torch.equal(after[2, others], before[2, others])


@pytest.mark.parametrize("name", ["gated", "eva", "rope"])
def test_masks_are_refused(name):
    _, new = replaced(KINDS[name], 3)
    x, given = KINDS[name].call()
    with pytest.raises(ValueError, match="attn_mask is not supported"):
        new(x, attn_mask=torch.zeros(7, 7), **given)
    with pytest.raises(ValueError, match="is_causal is not supported"):
        new(x, is_causal=True, **given)


@pytest.mark.parametrize("name", ALL)
def test_the_plain_layer_comes_back(name):
    kind = KINDS[name]
    layer, new = replaced(kind, kind.tokens)
    if new.adapter.tokens(new.plain) is None:
        with pytest.raises(ValueError, match="without grid_size"):
            new.to_layer()
        new.grid_size = (1, kind.tokens - new.num_prefix_tokens)
    back = new.to_layer()
    assert type(back) is type(layer) and back is not new.plain
    x, given = kind.call()
    close(output(back(x, **given)), output(layer(x, **given)))
    new.set_spectrum(k=2)
    with pytest.raises(ValueError, match="k=2 is less than"):
        new.to_layer()


@pytest.mark.parametrize("name", ALL)
def test_fresh_layers_run_and_train(name):
    kind = KINDS[name]
    layer, new = replaced(kind, 2, init="fresh", aggregation="depthwise", blend=0.5 if new_grid(kind) else 1.0)
    assert new.plain is not layer
    x, given = kind.call()
    y = output(new(x, **given))
    assert y.shape == output(layer(x, **given)).shape and y.dtype == x.dtype and y.isfinite().all()
    (y**2).sum().backward()
    assert new.slot_weight.grad.abs().sum() > 0
    again = pickle.loads(pickle.dumps(copy.deepcopy(new)))
    close(output(again(x, **given)), y)


def new_grid(kind):
    """Whether the input or the layer tells where the tokens are."""
    _, new = replaced(kind, 2)
    x, given = kind.call()
    return new.adapter.read(new.plain, x, **given).grid is not None


def test_positions_without_a_grid_are_refused():
    _, new = replaced(KINDS["hiera"], 2, blend=0.5)
    with pytest.raises(ValueError, match="where the 6 tokens of MaskUnitAttention lie is not known; set its grid_size"):
        new(KINDS["hiera"].call()[0])


def test_a_learned_blend_gets_a_gradient_through_a_bias_that_selects():
    kind = KINDS["swin shifted"]
    _, new = replaced(kind, 5, blend=0.5, learn_blend="head", bias_selects=True)
    x, given = kind.call()
    (new(x, **given) ** 2).sum().backward()
    assert new.blend_logit.grad.abs().min() > 0 and new.blend_logit.dtype == torch.float64
    assert new.plain.relative_position_bias_table.grad.abs().sum() > 0


@pytest.mark.parametrize("key, value", [("bias", False), ("head_dim", 4)])
def test_what_the_layer_keeps_cannot_be_set(key, value):
    with pytest.raises(ConfigError, match=f"operator.{key}={value}: 'here' is a WindowAttention, which keeps its own"):
        replaced(KINDS["swin"], 2, **{key: value})


def test_other_operators_say_who_can():
    with pytest.raises(ConfigError, match="'here' is a WindowAttention, which only operators of ConvNNAttention"):
        stand_in(KINDS["swin"].layer(), "fresh", Site("here"), False)


def test_a_subclass_with_a_forward_of_its_own_is_another_kind():
    from timm.layers.attention import Attention

    class Louder(Attention):
        def forward(self, x, attn_mask=None, is_causal=False):
            return 2 * super().forward(x, attn_mask, is_causal)

    class Same(Attention):
        pass

    assert adapter_of(Louder(8, 2)) is None and adapter_of(Same(8, 2)) is not None
    with pytest.raises(ConfigError, match="is a Linear"):
        ConvNNAttention.from_layer(nn.Linear(2, 2), OperatorConfig(kind="attention"), "fresh", Site("here"))
