"""The table of docs/library.md: which layers work under which of torch's tools. Each of its cells is a test."""

import copy
import io
import pickle
import re
from pathlib import Path

import pytest
import timm
import torch
from timm.layers.attention import Attention
from torch import nn
from torch.utils.checkpoint import checkpoint

from convnn import (
    ACmix2d,
    ConvNN2d,
    ConvNNAttention,
    GatedPositionalAttention,
    HybridConvNN2d,
    HybridConvNNAttention,
    neighbor_layers,
    preset,
    swap_layers,
)
from convnn.nn.base import Site

PAGE = Path(__file__).parents[2] / "docs" / "library.md"
SITE = Site("layer", 1, (4, 4))
BATCH = ({0: torch.export.Dim("batch", min=1, max=64)},)


# ----------------------------------------------------------------------------------------------------------- columns


def resnet():
    model = timm.create_model("resnet18", num_classes=5, channels=[8, 8, 16, 16], layers=[1, 1, 1, 1])
    swap_layers(model, {"match": "layer[34].*", "min_kernel": 3}, {"k": 4, "blend": 0.5})
    return model, torch.randn(3, 3, 48, 48)


def vit():
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **shape)
    swap_layers(model, {}, "convnn_attention", k=4)
    return model, torch.randn(3, 3, 32, 32)


def swin():
    shape = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (2,), "num_heads": (2,)}
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **shape)
    swap_layers(model, {}, "convnn_attention", k=4)
    return model, torch.randn(3, 3, 32, 32)


def dinov3():
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_small_patch16_dinov3", num_classes=5, **shape)
    swap_layers(model, {}, "convnn_attention", k=4)
    return model, torch.randn(3, 3, 32, 32)


def from_conv(kind, name, **settings):
    return kind.from_layer(nn.Conv2d(4, 8, 3, padding=1), preset(name, **settings), "fresh", SITE), torch.randn(
        3, 4, 6, 7
    )


def from_attention(kind, name, **settings):
    layer = Attention(16, 2, qkv_bias=True)
    return kind.from_layer(layer, preset(name, **settings), "fresh", SITE), torch.randn(3, 17, 16)


LAYERS = {
    "ConvNN2d": lambda: from_conv(ConvNN2d, "convnn", k=5, blend=0.5),
    "HybridConvNN2d": lambda: from_conv(HybridConvNN2d, "hybrid", k=5, branch_ratio=0.5),
    "ACmix2d": lambda: from_conv(ACmix2d, "acmix"),
    "ResNet": resnet,
    "ConvNNAttention": lambda: from_attention(ConvNNAttention, "convnn_attention", k=5, blend=0.5),
    "HybridConvNNAttention": lambda: from_attention(HybridConvNNAttention, "hybrid_attention", k=5, branch_ratio=0.5),
    "GatedPositionalAttention": lambda: from_attention(GatedPositionalAttention, "convit"),
    "ViT": vit,
    "Swin": swin,
    "DINOv3": dinov3,
}


# -------------------------------------------------------------------------------------------------------------- rows


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def others(x):
    """Batches of other sizes than the one that a tool has seen."""
    return x[:1], torch.cat([x, x.flip(0), x[:1]])


def gradients(layer, y):
    """The gradient of each parameter that has one."""
    layer.zero_grad()
    y.square().sum().backward()
    return {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}


def exports(layer, x):
    program = torch.export.export(layer, (x,), dynamic_shapes=BATCH)
    assert not any("convnn" in str(node.target) for node in program.graph.nodes)  # loads without convnn
    for other in others(x):
        close(program.module()(other), layer(other))


def runs_as_onnx(layer, x):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    file = io.BytesIO()
    torch.onnx.export(layer, (x,), dynamic_shapes=BATCH, dynamo=True, verbose=False).save(file)
    session = runtime.InferenceSession(file.getvalue())
    for other in others(x):
        close(torch.from_numpy(session.run(None, {session.get_inputs()[0].name: other.numpy()})[0]), layer(other))


def compiles(layer, x):
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for batch in (x, others(x)[1]):
        wanted, found = (gradients(layer, function(batch)) for function in (layer, compiled))
        close(compiled(batch), layer(batch))
        close(found, wanted)


def traces(layer, x):
    traced = torch.jit.trace(layer, x)
    for other in others(x):
        close(traced(other), layer(other))


def gives_gradients_of_each_sample(layer, x):
    def loss(values, sample):
        return torch.func.functional_call(layer, values, (sample[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(dict(layer.named_parameters()), x)
    for i in range(len(x)):
        for name, gradient in gradients(layer, layer(x[i : i + 1])).items():
            torch.testing.assert_close(found[name][i], gradient, rtol=1e-3, atol=1e-3)


def maps(layer, x):
    close(torch.func.vmap(lambda sample: layer(sample[None])[0])(x), layer(x))


def has_a_directional_derivative(layer, x):
    direction = torch.randn_like(x)
    _, found = torch.func.jvp(layer, (x,), (direction,))
    leaf = x.clone().requires_grad_()
    cotangent = torch.randn_like(found)
    (gradient,) = torch.autograd.grad((layer(leaf) * cotangent).sum(), leaf)
    torch.testing.assert_close((found * cotangent).sum(), (gradient * direction).sum(), rtol=1e-3, atol=1e-3)


def has_second_derivatives(layer, x):
    """A Hessian times a vector, forward over reverse, beside reverse over reverse."""
    direction = torch.randn_like(x)

    def slope(at):
        return torch.func.grad(lambda value: layer(value).square().sum())(at)

    _, found = torch.func.jvp(slope, (x,), (direction,))
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(layer(leaf).square().sum(), leaf, create_graph=True)
    (wanted,) = torch.autograd.grad((first * direction).sum(), leaf)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-2)


def runs_in_bf16(layer, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    exact = layer(x)
    assert ((y - exact).abs() / exact.abs().max()).median() < 0.02
    found = gradients(layer, y.float())
    assert found and all(gradient.isfinite().all() and gradient.dtype == torch.float32 for gradient in found.values())


def is_computed_again(layer, x):
    wanted = gradients(layer, layer(x))
    found = gradients(layer, checkpoint(layer, x, use_reentrant=False))
    assert found.keys() == wanted.keys()
    close(found, wanted)


def is_copied(layer, x):
    other = copy.deepcopy(layer)
    assert torch.equal(other(x), layer(x))
    for parameter in other.parameters():
        parameter.data.zero_()
    assert layer(x).any()


def is_pickled(layer, x):
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


def travels_as_a_state(layer, x):
    """Into a copy with other weights, elsewhere on the spectrum."""
    other = copy.deepcopy(layer)
    for parameter in other.parameters():
        parameter.data.normal_()
    for inner in neighbor_layers(other).values():
        inner.set_spectrum(blend=0.9, k=2)
    assert not torch.equal(other(x), layer(x))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), layer(x))


TOOLS = {
    "`torch.export`, dynamic batch": exports,
    "`torch.onnx.export`, dynamic batch": runs_as_onnx,
    "`torch.compile(fullgraph=True)`": compiles,
    "`torch.jit.trace`, other batches": traces,
    "`torch.func`: `vmap` of `grad`": gives_gradients_of_each_sample,
    "`torch.func.vmap`": maps,
    "`torch.func.jvp`": has_a_directional_derivative,
    "`torch.func`: `jvp` of `grad`": has_second_derivatives,
    "`torch.autocast`, bf16": runs_in_bf16,
    "`torch.utils.checkpoint`": is_computed_again,
    "`copy.deepcopy`": is_copied,
    "`pickle`": is_pickled,
    "`state_dict`": travels_as_a_state,
}
SLOW = {exports, runs_as_onnx, compiles, traces}


# ------------------------------------------------------------------------------------------------------------- cells


def table():
    """The cells of the page's table, by row and column."""
    lines = [line.strip("| ").split(" | ") for line in re.findall(r"^\| .*", PAGE.read_text(), re.M)]
    header, *rows = (line for line in lines if len(line) == len(LAYERS) + 1)
    return {(row[0], column): cell for row in rows for column, cell in zip(header[1:], row[1:], strict=True)}


def cells():
    for (row, column), cell in table().items():
        marks = [pytest.mark.long] if TOOLS.get(row) in SLOW else []
        yield pytest.param(row, column.strip("`"), cell, marks=marks, id=f"{row}-{column}".replace("`", ""))


def test_the_table_has_the_rows_and_columns_of_the_tests():
    assert [row for row, column in table() if column.strip("`") == "ViT"] == list(TOOLS)
    assert [column.strip("`") for row, column in table() if row == next(iter(TOOLS))] == list(LAYERS)
    assert set(table().values()) <= {"yes", "no"}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("row, column, cell", list(cells()))
def test_a_cell(row, column, cell):
    torch.manual_seed(0)
    layer, x = LAYERS[column]()
    layer.eval()
    if cell == "yes":
        TOOLS[row](layer, x)
    else:
        with pytest.raises((NotImplementedError, RuntimeError)):
            TOOLS[row](layer, x)
