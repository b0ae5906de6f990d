"""torch.compile without graph breaks, torch.export, lower precision, and learned blends."""

import copy
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from presets import PRESETS

from convnn import ConfigError, ConvNN2d, ConvNNAttention, OperatorConfig, swap_layers
from convnn.config.compose import compose_config
from convnn.nn.base import Site


def replaced(preset):
    """Return the layer of a preset and an input for it."""
    from convnn.config.targets import resolve_target

    torch.manual_seed(0)
    config = PRESETS[preset]
    build = resolve_target(config.target, "operator.target").from_layer
    if config.kind == "conv":
        return build(torch.nn.Conv2d(4, 8, 3, padding=1), config, "fresh", Site("c")), torch.randn(2, 4, 6, 8)
    attention = timm.layers.attention.Attention(8, 2, qkv_bias=True)
    return build(attention, config, "fresh", Site("a", 1, (4, 5))), torch.randn(2, 21, 8)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.long
def test_every_preset_compiles_in_one_graph(preset):
    """Forward and gradients; ``aot_eager`` traces and functionalises like the default backend, without its compiler."""
    layer, x = replaced(preset)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for function in (layer, compiled):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        y.square().sum().backward()
        results.append([y.detach(), leaf.grad, *(p.grad for p in layer.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("options", [{"candidates": "random", "num_candidates": 9}, {"blend": 0.5}, {"mix": "concat"}])
@pytest.mark.long
def test_other_settings_compile_too(options):
    layer = ConvNN2d(4, 4, 9, **({"blend": 0.4} | options)).eval()
    x = torch.randn(2, 4, 6, 7)
    torch.compiler.reset()
    assert torch.allclose(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["convnn", "spectrum", "convnn_attention"])
def test_the_default_compiler_agrees(preset):
    layer, x = replaced(preset)
    torch.compiler.reset()
    assert torch.allclose(torch.compile(layer, fullgraph=True)(x), layer(x), atol=1e-5)


MOVING = {
    "conv": lambda: (ConvNN2d(3, 4, 5), torch.randn(2, 3, 4, 5)),
    "concatenated": lambda: (ConvNN2d(3, 4, 5, mix="concat", weighting="softmax"), torch.randn(2, 3, 4, 5)),
    "straight through": lambda: (ConvNN2d(3, 4, 5, straight_through=True), torch.randn(2, 3, 4, 5)),
    "attention": lambda: (ConvNNAttention(8, 2, 5, num_prefix_tokens=1, grid_size=(4, 4)), torch.randn(2, 17, 8)),
    "fused attention": lambda: (ConvNNAttention(8, 2, 17, aggregation="sum", self_first=False), torch.randn(2, 17, 8)),
}


@pytest.mark.parametrize("case", MOVING)
@pytest.mark.long
def test_a_moving_blend_and_temperature_take_one_graph_between_the_ends(case):
    torch.manual_seed(0)
    layer, x = MOVING[case]()
    layer.num_prefix_tokens, layer.grid_size = 1, (4, 4)
    graphs = []
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=lambda graph, _: graphs.append(1) or graph)
    counts = []
    for blend in (0.0, 0.1, 0.25, 0.5, 0.77, 0.9, 1.0, 0.3):
        layer.set_spectrum(blend=blend, temperature=0.5 + blend)
        results = []
        for function in (layer, compiled):
            leaf = x.clone().requires_grad_()
            y = function(leaf)
            results.append((y, *torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()])))
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, atol=1e-5)
        counts.append(len(graphs))
    if case == "fused attention":  # whose settings are one function along the whole spectrum
        assert counts[-1] <= 3 and len(set(counts[1:6])) == 1
    else:
        assert counts == [1, 2, 2, 2, 2, 2, 3, 3]


def test_a_blend_that_moves_is_no_part_of_the_state_and_follows_the_layer():
    layer = ConvNN2d(3, 4, 5)
    names = set(layer.state_dict()), [name for name, _ in layer.named_buffers()]
    layer.set_spectrum(blend=0.3, temperature=2.0)
    assert names == (set(layer.state_dict()), [name for name, _ in layer.named_buffers()])
    twin = copy.deepcopy(layer)
    twin.set_spectrum(blend=0.6)
    assert layer.blend == 0.3 and layer._blend_now == 0.3 and twin._blend_now == 0.6
    held = layer._blend_now
    layer.double().half()
    layer.set_spectrum(blend=0.7)
    assert layer._blend_now is held and held.dtype == torch.float64 and held == 0.7


@pytest.mark.parametrize("preset, name", [("hybrid", "resnet18"), ("spectrum", "resnet18"), ("kvt", "vit")])
@pytest.mark.long
def test_swapped_models_export(preset, name):
    kwargs = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24}
    model = timm.create_model("vit_tiny_patch16_224", **kwargs) if name == "vit" else timm.create_model(name)
    swap_layers(model, {"min_kernel": 3, "last": 2}, PRESETS[preset])
    x = torch.randn(2, 3, 32, 32) if name == "vit" else torch.randn(2, 3, 96, 96)
    program = torch.export.export(model.eval(), (x,))
    assert torch.allclose(program.module()(x), model(x), atol=1e-5)


# Largest allowed difference to float64, by precision: of all outputs, and of the 90th percentile under bf16, where
# rounded features may choose other neighbours.
@pytest.mark.parametrize("preset", PRESETS)
def test_tolerance_by_dtype(preset):
    layer, x = replaced(preset)
    layer.eval()
    exact = copy.deepcopy(layer).double()(x.double())
    scale = exact.abs().max()
    assert (layer(x).double() - exact).abs().max() < 1e-5 * scale
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    difference = (low.double() - exact).abs().flatten() / scale
    by_position = PRESETS[preset].blend == 0 or preset in ("mhsa", "local_window", "strided_sparse", "acmix", "convit")
    assert difference.quantile(1.0 if by_position else 0.5) < 0.03


# --------------------------------------------------------------------------------- learned blend, straight through


def analytic(layer, x):
    """Return output and selection score sum of a layer, to check the estimator's gradient by hand."""
    layer.zero_grad()
    y = layer(x)
    cotangent = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape)
    (y * cotangent).sum().backward()
    return y, cotangent


def test_straight_through_changes_no_output_and_is_the_documented_gradient():
    torch.manual_seed(0)
    plain = ConvNN2d(3, 4, 5, blend=0.6, similarity="dot", mix="sum").double()
    through = copy.deepcopy(plain)
    through.mixing = replace(through.mixing, straight_through=True)
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    assert torch.equal(plain(a), through(b))
    _, cotangent = analytic(plain, a)
    analytic(through, b)
    extra = b.grad - a.grad
    assert extra.abs().max() > 1e-3  # the selection now feels a gradient

    # By hand: weigh slot j by exp(log p_j) / p_j with p = softmax over the chosen scores, loop over queries.
    from convnn.ops.selection import select_neighbors

    leaf = x.clone().requires_grad_()
    geometry = plain.geometry(4, 4)
    tokens = F.pad(leaf, (1, 1, 1, 1)).flatten(2)[0].T
    fixed = tokens.detach()[None, None]
    queries = geometry.query_index()
    found = select_neighbors(fixed[:, :, queries], fixed, geometry, plain.selection, blend=0.6, training=True)
    total = 0
    for i, query in enumerate(queries.tolist()):
        scores, values = [], []
        every = fixed[0, 0] @ fixed[0, 0, query] / 3**0.5
        for slot, j in enumerate(found.index[0, 0, i].tolist()):
            f = (tokens[j] @ tokens[query] / 3**0.5 - every.min()) / (every.max() - every.min())
            away = max(abs(query // 6 - j // 6), abs(query % 6 - j % 6))
            scores.append(0.6 * f - 0.4 * away / 5)
            values.append(plain.weight.detach()[:, :, slot] @ fixed[0, 0, j])
        log_p = torch.stack(scores).log_softmax(0)
        total = total + sum(log_p[s] * (values[s] @ cotangent[0].flatten(1)[:, i]) for s in range(5))
    total.backward()
    assert (extra - leaf.grad).abs().max() < 1e-10


@pytest.mark.parametrize("mix", ["sum", "concat"])
def test_a_learned_blend_gets_a_gradient_stays_inside_and_moves(mix):
    torch.manual_seed(0)
    layer = ConvNN2d(4, 4, 6, blend=0.5, learn_blend="layer", mix=mix)
    fixed = ConvNN2d(4, 4, 6, blend=0.5, mix=mix)
    fixed.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(2, 4, 6, 6)
    assert torch.allclose(layer(x), fixed(x), atol=1e-6)
    optimizer = torch.optim.SGD([layer.blend_logit], 5.0)
    for _ in range(30):
        optimizer.zero_grad()
        (layer(x) * torch.linspace(-1, 1, 36).view(6, 6)).sum().backward()
        assert layer.blend_logit.grad.isfinite().all()
        optimizer.step()
    assert 0 < layer.blend < 1 and abs(layer.blend - 0.5) > 0.02
    layer.blend_logit.data.fill_(80.0)
    assert layer(x).isfinite().all() and layer.blend <= 1
    with pytest.raises(ValueError, match="learns its blend"):
        layer.set_spectrum(blend=0.3)


def test_a_learned_blend_feels_every_aggregation():
    torch.manual_seed(0)
    x = torch.randn(1, 4, 5, 5)
    for aggregation in ("conv", "depthwise", "separable", "sum", "max_relative"):
        layer = ConvNN2d(4, 4, 5, blend=0.5, learn_blend="layer", aggregation=aggregation)
        layer(x).square().sum().backward()
        assert layer.blend_logit.grad.abs() > 0, aggregation


def test_the_estimator_finds_the_useful_end():
    """Where the target is the mean of feature neighbours, a learned blend rises; where of position's, it falls."""
    for target_blend in (0.0, 1.0):
        torch.manual_seed(0)
        x = torch.randn(8, 6, 8, 8)
        options = {"k": 9, "aggregation": "sum", "bias": False, "temperature": 0.1, "fast": False}
        with torch.no_grad():
            target = ConvNN2d(6, 6, blend=target_blend, **options)(x)
        layer = ConvNN2d(6, 6, blend=0.5, learn_blend="layer", **options)
        optimizer = torch.optim.Adam([layer.blend_logit], 0.1)
        for _ in range(40):
            optimizer.zero_grad()
            F.mse_loss(layer(x), target).backward()
            optimizer.step()
        assert (layer.blend - 0.5) * (target_blend - 0.5) > 0.05, (target_blend, layer.blend)


def test_learned_blend_per_head():
    torch.manual_seed(0)
    layer = ConvNNAttention(8, 2, 5, 0.5, learn_blend="head", num_prefix_tokens=1, grid_size=(4, 4)).double()
    layer.blend_logit.data = torch.tensor([-2.0, 2.0], dtype=torch.float64)
    x = torch.randn(2, 17, 8, dtype=torch.float64)
    y = layer(x)
    y.square().sum().backward()
    assert layer.blend_logit.shape == (2,) and (layer.blend_logit.grad != 0).all()
    # Each head is as a fixed layer of its own blend.
    for head, logit in enumerate((-2.0, 2.0)):
        alone = ConvNNAttention(8, 2, 5, torch.tensor(logit).double().sigmoid().item(), num_prefix_tokens=1)
        alone = alone.double()
        alone.load_state_dict(layer.state_dict(), strict=False)
        mask = torch.zeros(8, dtype=torch.float64)
        mask[4 * head : 4 * head + 4] = 1
        for module in (layer, alone):
            module.proj.weight.data = torch.diag(mask)
        assert (layer(x) - alone(x)).abs().max() < 1e-12
    assert layer.spectrum()["blend"] == pytest.approx(0.5)
    assert "blend" not in layer.movable()


def test_learned_blend_and_schedule_exclude_each_other():
    with pytest.raises(ConfigError, match=r"schedule.blend and operator.learn_blend=layer both move the blend"):
        compose_config(["operator.learn_blend=layer", "schedule=linear"])
    with pytest.raises(ConfigError, match="learn_blend=head needs heads"):
        compose_config(["operator.learn_blend=head"])


def test_state_dict_is_stable_across_the_spectrum():
    layers = [ConvNN2d(4, 4, 9, blend=b, temperature=t) for b, t in ((0.0, 1.0), (0.5, 2.0), (1.0, 0.1))]
    layers[1].load_state_dict(layers[0].state_dict())
    layers[2].load_state_dict(layers[1].state_dict())
    x = torch.randn(1, 4, 6, 6)
    assert torch.equal(layers[0](x), layers[2](x))  # the state brings its place on the spectrum
    for layer in (layers[0], layers[2]):
        layer.set_spectrum(blend=1.0, temperature=0.1)
    assert torch.equal(layers[0](x), layers[2](x))


def test_repr_is_one_line_with_all_that_differs():
    config = OperatorConfig(blend=0.3, mix="concat", aggregation="separable", coordinates=True, candidates="grid")
    text = repr(ConvNN2d.from_layer(torch.nn.Conv2d(4, 8, 3, padding=1), config, "fresh", Site("c")))
    text = next(line for line in text.split("\n") if "k=9" in line)
    for part in ("4, 8", "k=9", "blend=0.3", "mix=concat", "aggregation=separable", "coordinates=True", "grid"):
        assert part in text
