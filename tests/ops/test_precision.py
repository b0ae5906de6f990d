"""Neighbours are ranked in true float32, whatever precision the process allows for other products."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from convnn import ConvNN2d, ConvNNAttention, Geometry, Selection
from convnn.ops.precision import full_precision, product
from convnn.ops.selection import select_neighbors


@pytest.fixture(params=["high", "medium"])
def lowered(request):
    torch.set_float32_matmul_precision(request.param)
    yield
    assert torch.get_float32_matmul_precision() == request.param  # nobody has changed it
    torch.set_float32_matmul_precision("highest")


class TensorFloat(TorchDispatchMode):
    """Matrix products as a GPU with TF32 makes them: 10 bits of the inputs' mantissas, where the process allows it."""

    products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
            if torch.backends.cuda.matmul.fp32_precision == "tf32":
                args = [(t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in args]
            else:
                TensorFloat.products += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("similarity", ["cosine", "euclidean", "dot"])
@pytest.mark.parametrize("blend", [0.5, 1.0])
def test_neighbours_do_not_depend_on_the_switch(similarity, blend, lowered):
    torch.manual_seed(0)
    # Smooth features, whose products differ by less than TF32 resolves.
    grid = torch.linspace(0, 1, 12 * 12).view(1, 1, -1, 1)
    x = torch.cat([grid.sin(), grid.cos(), grid.square(), 1 - grid], dim=-1) + 0.001 * torch.randn(1, 1, 144, 4)
    geometry, selection = Geometry(12, 12), Selection(similarity=similarity)
    exact = select_neighbors(x.double(), x.double(), geometry, selection, blend=blend)
    TensorFloat.products = 0
    with TensorFloat():
        rough = (x[0, 0] @ x[0, 0].T).argsort(-1)  # the emulation does what it should
        found = select_neighbors(x, x, geometry, selection, blend=blend)
    assert TensorFloat.products > 0 and not torch.equal(rough, (x[0, 0] @ x[0, 0].T).argsort(-1))
    assert (found.index == exact.index).double().mean() > 0.98  # what float32 itself rounds


@pytest.mark.parametrize(
    "layer", [lambda: ConvNN2d(4, 4, 5), lambda: ConvNNAttention(8, 2, 3)], ids=["conv", "attention"]
)
@pytest.mark.long
def test_compiled_layers_rank_in_float32_too(layer, lowered, monkeypatch):
    torch.manual_seed(0)
    layer, seen = layer().eval(), []
    x = torch.randn(1, 4, 5, 5) if isinstance(layer, ConvNN2d) else torch.randn(1, 9, 8)
    from convnn.ops import precision

    def watched():
        seen.append(True)
        return full_precision()

    monkeypatch.setattr(precision, "full_precision", watched)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)
        before = len(seen)
        compiled(x)
    assert len(seen) > before


def test_the_switch_is_put_back_after_an_error(lowered):
    with pytest.raises(RuntimeError):
        product(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(KeyError), full_precision():
        raise KeyError
