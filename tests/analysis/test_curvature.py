"""Hessians: products and largest eigenvalues against whole matrices in float64, through our layers too."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, hessian

from convnn import ConvNN2d, ConvNNAttention
from convnn.analysis.curvature import hessian_product, lanczos, twice_differentiable


@pytest.fixture
def vector():
    return lambda size: torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def matrix_of(model, x, y):
    """Return the whole Hessian by torch.func, (P, P)."""
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for _, p in model.named_parameters()]
    flat = torch.cat([p.detach().flatten() for _, p in model.named_parameters()])

    def loss(values):
        parts = values.split([s.numel() for s in shapes])
        given = {n: part.view(s) for n, part, s in zip(names, parts, shapes, strict=True)}
        return F.cross_entropy(functional_call(model, given, (x,)), y)

    return hessian(loss)(flat)


def test_eigenvalues_of_a_quadratic(vector):
    """The loss 1/2 w A w has the Hessian A."""
    root = vector(40 * 40).view(40, 40)
    a = (root + root.T) / 2
    w = vector(40).float().requires_grad_()
    found = lanczos(hessian_product([w @ a.float() @ w / 2], [w]), vector(40).float(), 40, 1e-6, 40)
    exact = torch.linalg.eigvalsh(a).flip(0).tolist()
    assert found.values == pytest.approx(exact, abs=1e-4 * max(map(abs, exact)))
    assert found.values[0] == pytest.approx(exact[0], rel=1e-4)


def test_a_few_steps_find_an_eigenvalue_within_the_residual(vector):
    values = torch.cat([torch.linspace(-1, 1, 198), torch.tensor([8.0, -3.0])]).double()
    values[10] = 5.0
    found = lanczos(lambda v: values * v, vector(200), 30, 1e-3, 2)
    assert found.steps < 30 and max(found.errors[:2]) <= 8e-3
    assert found.values[0] == pytest.approx(8, abs=found.errors[0] + 1e-9)
    assert found.values[1] == pytest.approx(5, abs=found.errors[1] + 1e-9)
    assert found.values[-1] == pytest.approx(-3, abs=found.errors[-1] + 1e-9)


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_a_matrix_of_one_eigenvalue_ends_at_once(vector, scale):
    found = lanczos(lambda v: scale * v, vector(5), 10, 1e-6)
    assert found.values == pytest.approx((scale,))


def test_losses_of_parts_add_up(vector):
    x, y = vector(12 * 3).view(12, 3), torch.arange(12) % 2
    model = nn.Linear(3, 2).double()
    parts = [F.cross_entropy(model(x[rows]), y[rows], reduction="sum") / 12 for rows in (slice(0, 5), slice(5, 12))]
    product = hessian_product(parts, list(model.parameters()))
    v = vector(8)
    assert torch.allclose(product(v), matrix_of(model, x, y) @ v, atol=1e-12)


def convolution(**settings):
    layers = ConvNN2d(2, 3, kernel_size=3, **settings), nn.GELU(), nn.Flatten(), nn.Linear(3 * 25, 2)
    return nn.Sequential(*layers).double(), (6, 2, 5, 5)


class Tokens(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.layer, self.head = ConvNNAttention(4, num_heads=2, **settings), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
def test_convolutions_over_neighbours_have_second_derivatives(vector, blend):
    torch.manual_seed(0)
    model, shape = convolution(k=4, blend=blend)
    check_net(model, shape, vector)


@pytest.mark.parametrize("blend, aggregation", [(0.5, "conv"), (1.0, "sum")])
def test_attention_to_neighbours_has_second_derivatives(vector, blend, aggregation):
    torch.manual_seed(0)
    check_net(Tokens(k=4, blend=blend, aggregation=aggregation).double(), (6, 9, 4), vector)


def test_torchs_attention_has_second_derivatives(vector):
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 2)

        def forward(self, x):
            q, k, v = self.qkv(x)[:, None].chunk(3, -1)
            return self.head(F.scaled_dot_product_attention(q, k, v).mean((1, 2)))

    torch.manual_seed(0)
    check_net(Fused().double(), (6, 9, 4), vector)


def check_net(model, shape, vector):
    """Compare products, and the largest eigenvalue, with the whole matrix."""
    model.eval()
    x, y = vector(torch.Size(shape).numel()).view(shape), torch.arange(shape[0]) % 2
    with twice_differentiable(model):
        product = hessian_product([F.cross_entropy(model(x), y)], list(model.parameters()))
        size = sum(p.numel() for p in model.parameters())
        v = vector(size)
        found, at = lanczos(product, v, size, 1e-8), product(v)
        exact = matrix_of(model, x, y)
    assert torch.allclose(at, exact @ v, atol=1e-9) and at.abs().max() > 1e-3
    values = torch.linalg.eigvalsh(exact)
    assert found.values[0] == pytest.approx(values[-1].item(), rel=1e-6)


def test_backends_are_put_back():
    model, _ = convolution(k=4)
    model[0].backend = "triton"
    with pytest.raises(ZeroDivisionError), twice_differentiable(model):
        assert model[0].backend == "torch"
        raise ZeroDivisionError
    assert model[0].backend == "triton"
