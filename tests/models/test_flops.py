"""Costs told in advance against counts by hand."""

import pytest
import timm
import torch
from timm.layers.attention import Attention
from torch import nn

from convnn import ConvNN2d, ConvNNAttention, swap_layers
from convnn.models.cost import forward_cost
from convnn.models.flops import count_operations, on_meta

HAND = {
    # 64 outputs of 4 channels, 9 taps of 3 channels each, 2 per product and sum
    "convolution": (lambda: nn.Conv2d(3, 4, 3, padding=1), (1, 3, 8, 8), 2 * 64 * 4 * 27),
    # 64 queries against 64 tokens of 3 channels, then 9 neighbours of 3 channels to 4
    "neighbours": (lambda: ConvNN2d(3, 4, 9, 1, 0), (1, 3, 8, 8), 2 * 64 * 64 * 3 + 2 * 64 * 9 * 3 * 4),
    "position end": (lambda: ConvNN2d(3, 4, 9, blend=0.0), (1, 3, 8, 8), 2 * 64 * 4 * 27),
    # queries, keys, values and output; scores and weighted sum
    "attention": (lambda: Attention(8, 2), (1, 16, 8), 2 * 16 * 8 * 8 * 4 + 2 * 2 * 16 * 16 * 8),
    # scores once against all and once with the neighbours, then weights (1) and slots (2) times 5 neighbours
    "neighbour attention": (
        lambda: ConvNNAttention(8, 2, 5),
        (1, 16, 8),
        2 * 16 * 8 * 8 * 4 + 2 * 16 * 16 * 8 + 2 * 16 * 5 * 8 + 3 * 16 * 5 * 8,
    ),
}


@pytest.mark.parametrize("case", HAND)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_counts_by_hand(case, device):
    build, shape, want = HAND[case]
    if case == "attention" and device == "cpu":
        pytest.skip("torch's counter does not know fused attention on a CPU")
    assert count_operations(build().to(device), torch.zeros(shape, device=device)).total == want


def test_a_model_without_data_is_a_copy():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    copy = on_meta(model)
    assert {t.device.type for t in [*copy.parameters(), *copy.buffers()]} == {"meta"}
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"cpu"}
    assert copy[0].weight.shape == model[0].weight.shape and copy[0].weight.requires_grad


def test_costs_per_layer_in_the_report():
    """What the layers cost before and after; the rest of the model costs the same."""
    model = timm.create_model("resnet18", num_classes=10, channels=(8, 8, 16, 16), stem_width=8)
    plain = forward_cost(model, 3, 32).total
    report = swap_layers(model, {"match": "layer1.0.*", "min_kernel": 3}, {"k": 9, "blend": 1.0})
    state, draws = model.training, torch.get_rng_state()
    cost = forward_cost(model, 3, 32, [r.name for r in report.rows])
    assert model.training == state and torch.equal(torch.get_rng_state(), draws)
    report = report.with_costs(cost)
    side, tokens = 8, 10 * 10  # the ring is among the candidates
    want = [(2 * side**2 * 9 * c * 8, 2 * side**2 * tokens * c + 2 * side**2 * 9 * c * 8) for c in (64, 8)]
    assert [(r.flops_before, r.flops_after) for r in report.rows] == want
    before, after = map(sum, zip(*want, strict=True))
    assert cost.total == plain + after - before
    lines = str(report).splitlines()
    assert lines[0].split()[-4:] == ["MFLOPs", "before", "after", "ratio"]
    assert lines[-1].split()[-1] == f"{after / before:.2f}"
