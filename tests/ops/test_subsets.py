"""Random subsets: alike in all processes, and in a forward pass that is computed again."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from convnn import ConvNN2d, ConvNNAttention
from convnn.ops.subsets import random_subset, same_subsets, seed_subsets

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def global_generator_afterwards():
    yield
    seed_subsets(None)


def nets():
    torch.manual_seed(0)
    conv = {"candidates": "random", "num_candidates": 12}
    yield nn.Sequential(*(ConvNN2d(4, 4, 5, **conv) for _ in range(3))), torch.randn(2, 4, 6, 6)
    attention = (ConvNNAttention(8, 2, 4, candidates="random", num_candidates=6, attn_drop=0.2) for _ in range(3))
    yield nn.Sequential(*attention), torch.randn(2, 16, 8)


def gradients(net, x, run, seeded):
    torch.manual_seed(3)
    seed_subsets(7 if seeded else None, CPU)
    leaf = x.clone().requires_grad_()
    net.zero_grad()
    run(net, leaf).square().sum().backward()
    return [leaf.grad, *(p.grad.clone() for p in net.parameters())]


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_computes_the_same_gradients(seeded, reentrant):
    for net, x in nets():
        net.double().train()
        plain = gradients(net, x.double(), lambda n, v: n(v), seeded)

        def pieces(n, v):
            for layer in n:
                v = checkpoint(layer, v, use_reentrant=reentrant)
            return v

        again = gradients(net, x.double(), pieces, seeded)
        whole = gradients(net, x.double(), lambda n, v: checkpoint(n, v, use_reentrant=reentrant), seeded)
        for a, b, c in zip(plain, again, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-12)


def test_layers_and_steps_draw_their_own_subsets():
    seed_subsets(1, CPU)
    torch.manual_seed(0)
    first = [random_subset(40, 10, CPU) for _ in range(4)]
    assert all(not torch.equal(a, b) for i, a in enumerate(first) for b in first[:i])
    seed_subsets(1, CPU)
    torch.manual_seed(5)  # another rank: its dropout differs, its subsets do not
    assert all(torch.equal(a, random_subset(40, 10, CPU)) for a in first)


def test_what_is_drawn_inside_is_drawn_again_outside():
    seed_subsets(1, CPU)
    state = torch.get_rng_state()
    with same_subsets():
        inside = random_subset(40, 10, CPU)
    torch.set_rng_state(state)
    assert torch.equal(inside, random_subset(40, 10, CPU))
    assert not torch.equal(inside, random_subset(40, 10, CPU))  # the next one is another
