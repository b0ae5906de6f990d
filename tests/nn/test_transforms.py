"""Layers in other people's machinery: export with a dynamic batch, tracing, and gradients of each sample by vmap."""

import pytest
import torch
from torch import nn

from convnn import ConvNN2d, ConvNNAttention, swap_layers

CONV = {
    "features": {},
    "between": {"blend": 0.5},
    "position": {"k": 9, "blend": 0.0},
    "learned blend": {"blend": 0.4, "learn_blend": "layer"},
    "window slots": {"k": 9, "blend": 0.5, "slots": "window"},
    "softmax": {"weighting": "softmax", "aggregation": "separable"},
    "window candidates": {"candidates": "window", "num_candidates": 1, "k_policy": "clamp"},
    "grid candidates": {"candidates": "grid", "num_candidates": 2, "k": 30, "k_policy": "clamp"},
    "concatenated": {"blend": 0.5, "mix": "concat", "coordinates": True},
}
ATTENTION = {"attention": {}, "sum": {"aggregation": "sum"}, "by position": {"blend": 0.3}}


def cases():
    torch.manual_seed(0)
    for name, options in CONV.items():
        yield pytest.param(ConvNN2d(3, 4, **({"k": 5} | options)).eval(), torch.randn(3, 3, 6, 5), id=name)
    for name, options in ATTENTION.items():
        yield pytest.param(ConvNNAttention(8, 2, 4, **options).eval(), torch.randn(3, 9, 8), id=name)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)).eval()
    swap_layers(net, {}, {"name": "hybrid", "target": "convnn.HybridConvNN2d", "branch_ratio": 0.5, "k": 9})
    yield pytest.param(net, torch.randn(3, 3, 6, 5), id="hybrid network")


@pytest.mark.parametrize("layer, x", list(cases()))
@pytest.mark.long
def test_export_with_a_dynamic_batch(layer, x):
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    for other in (x[:1], torch.cat([x, x.flip(0), x[:1]])):
        torch.testing.assert_close(program.module()(other), layer(other), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("layer, x", list(cases()))
def test_a_trace_serves_other_batches(layer, x):
    traced = torch.jit.trace(layer, x)
    for other in (x[:1], torch.cat([x, x.flip(0), x[:1]])):
        torch.testing.assert_close(traced(other), layer(other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer, x", list(cases()))
def test_gradients_of_each_sample(layer, x):
    parameters = dict(layer.named_parameters())

    def loss(values, sample):
        return torch.func.functional_call(layer, values, (sample[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, sample in enumerate(x):
        layer.zero_grad()
        layer(sample[None]).square().sum().backward()
        for name, parameter in layer.named_parameters():
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(found[name][i], own, rtol=1e-4, atol=1e-4)
