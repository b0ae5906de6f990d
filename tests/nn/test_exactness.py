"""The operators against independent references in float64: forward and every gradient, below 1e-10."""

import copy
import itertools
from dataclasses import replace

import oracles
import pytest
import torch
import torch.nn.functional as F
from comparing import close, compare
from timm.layers.attention import Attention
from torch import nn

from convnn import ConfigError, ConvNN2d, ConvNNAttention, HybridConvNN2d, HybridConvNNAttention, OperatorConfig
from convnn.config.compose import compose_config
from convnn.nn.base import Site


def conv_case(size, k, *, channels=(3, 4), batch=2, **kwargs):
    torch.manual_seed(0)
    module = ConvNN2d(*channels, k, fast=False, **kwargs).double().eval()
    x = torch.randn(batch, channels[0], *size, dtype=torch.float64)
    options = {"metric": kwargs.get("distance", "chebyshev")}
    for key in (
        *("blend", "similarity", "pad_candidates", "self_first", "slots", "weighting", "temperature", "mix"),
        *("aggregation", "coordinates"),
    ):
        if key in kwargs:
            options[key] = kwargs[key]
    if kwargs.get("candidates") == "window":
        options["radius"] = kwargs["num_candidates"]
    if module.weight is not None:
        nn.init.normal_(module.weight)

    def reference(x):
        weight = module.weight
        return oracles.convnn2d(
            x,
            weight,
            module.bias,
            k=k,
            kernel=module.kernel_size,
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            groups=module.mix_groups,
            qkv=None if module.qkv is None else module.qkv.weight,
            pointwise=None if module.pointwise is None else module.pointwise.weight,
            proj=None if module.proj is None else module.proj.weight,
            **options,
        )

    compare(module, reference, x)


@pytest.mark.parametrize("blend", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("similarity", ["cosine", "euclidean", "dot"])
def test_convnn2d_equals_loop_reference(blend, similarity):
    conv_case((4, 5), 6, blend=blend, similarity=similarity)


@pytest.mark.parametrize("k", [1, 2, 5, 12, 30])
@pytest.mark.parametrize("blend", [0.5, 1.0])
def test_convnn2d_k_from_one_to_all(k, blend):
    conv_case((3, 4), k, blend=blend, batch=1)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"stride": 2},
        {"stride": (1, 2), "padding": (1, 0)},
        {"padding": 0, "kernel_size": 3},
        {"padding": 2, "dilation": 2, "kernel_size": 3},
        {"padding": (0, 2), "kernel_size": (1, 5)},
        {"padding": (1, 2), "kernel_size": (3, 5)},
        {"padding": 3, "kernel_size": 3},
        {"slots": "raster"},
        {"slots": "window"},
        {"slots": "window", "kernel_size": (1, 3), "padding": (0, 1), "stride": 2},
        {"distance": "euclidean"},
        {"self_first": False},
        {"pad_candidates": False},
        {"bias": False},
        {"groups": 2, "channels": (4, 6)},
        {"weighting": "softmax", "temperature": 0.5},
        {"weighting": "softmax", "similarity": "euclidean"},
        {"weighting": "score"},
        {"weighting": "score", "similarity": "euclidean", "temperature": 2.0},
        {"mix": "concat"},
        {"mix": "concat", "similarity": "euclidean"},
        {"mix": "concat", "similarity": "dot", "padding": 0, "kernel_size": 3},
        {"aggregation": "depthwise", "channels": (3, 6)},
        {"aggregation": "separable"},
        {"aggregation": "separable", "coordinates": True},
        {"aggregation": "sum", "channels": (4, 4)},
        {"aggregation": "max_relative", "similarity": "euclidean"},
        {"coordinates": True},
        {"projection": "linear", "weighting": "softmax", "aggregation": "separable", "similarity": "dot"},
        {"projection": "linear", "aggregation": "sum", "weighting": "softmax", "self_first": False},
        {"projection": "linear", "aggregation": "max_relative", "bias": False},
        {"candidates": "window", "num_candidates": 2},
        {"candidates": "window", "num_candidates": 1, "weighting": "softmax"},
        {"candidates": "window", "num_candidates": 2, "self_first": False, "slots": "window"},
    ],
    ids=lambda kwargs: ",".join(f"{k}={v}" for k, v in kwargs.items()),
)
@pytest.mark.parametrize("blend", [0.0, 0.4, 1.0])
def test_convnn2d_options_on_odd_maps(kwargs, blend):
    conv_case((5, 4), 5, batch=1, blend=blend, **kwargs)


def test_convnn2d_grid_candidates_equal_loop_reference():
    # 3 x 3 of a 5 x 7 map with a ring of 1: rows 0, 2, 4 and columns 0, 3, 6 of the map itself.
    candidates = [(r + 1) * 9 + c + 1 for r, c in itertools.product((0, 2, 4), (0, 3, 6))]
    torch.manual_seed(0)
    module = ConvNN2d(3, 4, 4, candidates="grid", num_candidates=3).double().eval()
    x = torch.randn(1, 3, 5, 7, dtype=torch.float64)

    def reference(x):
        return oracles.convnn2d(
            x, module.weight, module.bias, k=4, kernel=(3, 3), padding=(1, 1), candidates=candidates
        )

    compare(module, reference, x)


@pytest.mark.parametrize("kernel", [1, 3, 5, 7, (3, 5), (1, 7)])
@pytest.mark.parametrize("slots", ["rank", "raster", "window"])
@pytest.mark.parametrize("fast", [False, True])
def test_position_end_is_convolution(kernel, slots, fast):
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    same = tuple(m // 2 for m in kernel)
    for size, stride, padding, dilation, groups in [
        ((8, 20), 1, same, 1, 1),
        ((9, 7), 2, same, 1, 2),
        ((11, 13), (2, 1), (0, 1), 1, 1),
        ((15, 17), 1, same, 2, 1),
    ]:
        check_convolution(kernel, slots, fast, size, stride, padding, dilation, groups)


def check_convolution(kernel, slots, fast, size, stride, padding, dilation, groups):
    torch.manual_seed(1)
    conv = nn.Conv2d(4, 6, kernel, stride, padding, dilation, groups).double()
    config = OperatorConfig(k=kernel[0] * kernel[1], blend=0.0, slots=slots)
    module = ConvNN2d.from_layer(conv, config, "transfer", Site("conv"))
    module.fast = fast
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    grads = []
    for layer in (conv, module):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.square().sum().backward()
        grads.append((y.detach(), leaf.grad, layer.bias.grad))
    for a, b in zip(*grads, strict=True):
        close(a, b)
    back = module.to_layer()
    assert torch.equal(back.weight, conv.weight) and torch.equal(back.bias, conv.bias)
    module.weight.data.copy_(module.weight.grad)  # the gradient of the slots is that of the taps, permuted alike
    close(module.to_layer().weight, conv.weight.grad)


def test_conv2d_with_string_padding_and_larger_k():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3, padding="same", bias=False).double()
    x = torch.randn(2, 3, 6, 9, dtype=torch.float64)
    module = ConvNN2d.from_layer(conv, OperatorConfig(k=12, blend=0.0), "transfer", Site("conv"))
    close(module(x), conv(x))  # slots beyond the window start at zero


def attention_case(n, k, *, prefix=0, grid=None, heads=2, **kwargs):
    torch.manual_seed(0)
    module = ConvNNAttention(8, heads, k, num_prefix_tokens=prefix, grid_size=grid, qkv_bias=True, fast=False, **kwargs)
    module = module.double().eval()
    if module.slot_weight is not None:
        nn.init.normal_(module.slot_weight)
    x = torch.randn(2, n, 8, dtype=torch.float64)
    options = {"metric": kwargs.get("distance", "chebyshev")}
    for key in ("blend", "similarity", "self_first", "slots", "weighting", "temperature", "mix", "border"):
        if key in kwargs:
            options[key] = kwargs[key]
    if kwargs.get("candidates") == "window":
        options["radius"] = kwargs["num_candidates"]

    def reference(x):
        return oracles.convnn_attention(
            x,
            module.qkv.weight,
            module.qkv.bias,
            module.proj.weight,
            module.proj.bias,
            module.slot_weight,
            heads=heads,
            k=k,
            prefix=prefix,
            grid=grid,
            pointwise=None if module.pointwise is None else module.pointwise.weight,
            **options,
        )

    compare(module, reference, x)


@pytest.mark.parametrize("aggregation", ["depthwise", "sum", "conv", "separable"])
@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("k", [1, 4, 12])
def test_attention_equals_loop_reference(aggregation, prefix, blend, k):
    attention_case(12 + prefix, k, prefix=prefix, grid=(3, 4), aggregation=aggregation, blend=blend)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"similarity": "cosine", "temperature": 0.1},
        {"similarity": "euclidean"},
        {"self_first": True},
        {"slots": "raster"},
        {"heads": 1},
        {"distance": "euclidean", "blend": 0.3},
        {"mix": "concat", "blend": 0.4},
        {"mix": "concat", "blend": 0.7, "similarity": "euclidean"},
        {"weighting": "score"},
        {"weighting": "ones", "self_first": True},
        {"candidates": "window", "num_candidates": 1, "blend": 0.0},
        {"candidates": "window", "num_candidates": 1, "blend": 0.6},
        {"candidates": "window", "num_candidates": 1, "blend": 1.0, "weighting": "ones"},
    ],
    ids=lambda kwargs: ",".join(f"{k}={v}" for k, v in kwargs.items()),
)
def test_attention_options(kwargs):
    attention_case(13, 5, prefix=1, grid=(3, 4), **kwargs)


@pytest.mark.parametrize("border", ["zeros", "shift", "nearest"])
@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("aggregation", ["sum", "depthwise"])
def test_attention_borders(border, blend, aggregation):
    attention_case(21, 9, prefix=1, grid=(4, 5), border=border, blend=blend, aggregation=aggregation)


def test_attention_grid_candidates_keep_the_cls_token():
    # 2 x 2 of a 3 x 4 grid after one CLS token: rows 0, 2 and columns 0, 3.
    torch.manual_seed(0)
    module = ConvNNAttention(
        8, 2, 3, num_prefix_tokens=1, grid_size=(3, 4), candidates="grid", num_candidates=2, proj_bias=False
    ).double()
    x = torch.randn(1, 13, 8, dtype=torch.float64)

    def reference(x):
        weights = (module.qkv.weight, None, module.proj.weight, None, module.slot_weight)
        candidates = [0, 1, 4, 9, 12]
        return oracles.convnn_attention(x, *weights, heads=2, k=3, prefix=1, grid=(3, 4), candidates=candidates)

    compare(module, reference, x)


@pytest.mark.parametrize("heads", [1, 2, 3, 6])
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_feature_end_with_all_tokens_is_attention(heads, fast, qk_norm):
    torch.manual_seed(0)
    attention = Attention(12, heads, qkv_bias=True, qk_norm=qk_norm, norm_layer=nn.LayerNorm).double()
    config = OperatorConfig(
        kind="attention", k=17, similarity="dot", self_first=False, weighting="softmax", aggregation="sum"
    )
    module = ConvNNAttention.from_layer(attention, config, "transfer", Site("attn", 1, (4, 4)))
    module.fast = fast
    assert module.state_dict().keys() - {"_extra_state"} == attention.state_dict().keys()
    module.load_state_dict(attention.state_dict())
    x = torch.randn(2, 17, 12, dtype=torch.float64)
    compare(module, lambda x: _with_parameters(attention, module, x), x)


def _with_parameters(attention, module, x):
    return torch.func.functional_call(attention, dict(module.named_parameters()), (x,))


def test_depthwise_ones_with_all_tokens_is_attention():
    torch.manual_seed(0)
    module = ConvNNAttention(12, 3, 10, qkv_bias=True).double()
    x = torch.randn(2, 10, 12, dtype=torch.float64)
    q, k, v = module.qkv(x).view(2, 10, 3, 3, 4).permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 10, 12)
    close(module(x), module.proj(expected))


def test_top_k_attention_is_masked_softmax():
    torch.manual_seed(0)
    module = ConvNNAttention(12, 3, 4, aggregation="sum").double()
    x = torch.randn(2, 10, 12, dtype=torch.float64)
    q, k, v = module.qkv(x).view(2, 10, 3, 3, 4).permute(2, 0, 3, 1, 4)
    score = q @ k.mT / 2
    kept = score >= score.topk(4).values[..., -1:]
    expected = (score.masked_fill(~kept, -torch.inf).softmax(-1) @ v).transpose(1, 2).reshape(2, 10, 12)
    close(module(x), module.proj(expected))


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
def test_hybrid_is_its_branches_then_pointwise(ratio):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, stride=2, padding=1).double()
    config = OperatorConfig(k=9, blend=0.6, branch_ratio=ratio)
    hybrid = HybridConvNN2d.from_layer(conv, config, "fresh", Site("conv"))
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    own = int(8 * ratio)
    parts = []
    if own:
        n = hybrid.neighbors
        geometry = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1)}
        parts.append(oracles.convnn2d(x, n.weight, n.bias, k=9, blend=0.6, **geometry))
    if own < 8:
        parts.append(F.conv2d(x, hybrid.conv.weight, hybrid.conv.bias, 2, 1))
    mixed = torch.einsum("oc,bchw->bohw", hybrid.pointwise.weight[:, :, 0, 0], torch.cat(parts, 1))
    close(hybrid(x), mixed + hybrid.pointwise.bias[:, None, None])
    transferred = HybridConvNN2d.from_layer(
        conv, OperatorConfig(k=9, blend=0.0, branch_ratio=ratio), "transfer", Site("conv")
    )
    close(transferred(x), conv(x))


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_hybrid_attention_transfers_at_all_tokens(ratio):
    torch.manual_seed(0)
    attention = Attention(12, 3, qkv_bias=True).double()
    config = OperatorConfig(
        kind="attention",
        k=10,
        similarity="dot",
        self_first=False,
        weighting="softmax",
        aggregation="depthwise",
        branch_ratio=ratio,
    )
    hybrid = HybridConvNNAttention.from_layer(attention, config, "transfer", Site("attn", 1, (3, 3)))
    x = torch.randn(2, 10, 12, dtype=torch.float64)
    close(hybrid(x), attention(x))
    parts = [b(x) for b in (hybrid.neighbors, hybrid.attention) if b is not None]
    close(hybrid(x), F.linear(torch.cat(parts, -1), hybrid.pointwise.weight, hybrid.pointwise.bias))


def test_the_branches_of_the_papers_hybrid_attention_read_their_own_channels():
    torch.manual_seed(0)
    config = replace(compose_config(["operator=hybrid_attention", "swap=all_attention"]).operator, k=10)
    layer, site = Attention(12, 2, qkv_bias=True).double(), Site("attn", 1, (3, 3))
    hybrid = HybridConvNNAttention.from_layer(layer, config, "fresh", site)
    x = torch.randn(2, 10, 12, dtype=torch.float64)
    parts = [hybrid.neighbors(x[..., :6]), hybrid.attention(x[..., 6:])]
    close(hybrid(x), F.linear(torch.cat(parts, -1), hybrid.pointwise.weight, hybrid.pointwise.bias))
    assert torch.equal(hybrid.neighborhood(x).index, hybrid.neighbors.neighborhood(x[..., :6]).index)
    plain = copy.deepcopy(hybrid.attention)  # with all tokens as neighbours the other branch is attention too
    plain.load_state_dict({n: v for n, v in hybrid.neighbors.state_dict().items() if n in plain.state_dict()})
    close(parts[0], plain(x[..., :6]))
    with pytest.raises(ConfigError, match=r"operator\.branch_input=all or swap\.init=fresh"):
        HybridConvNNAttention.from_layer(layer, config, "transfer", site)
    with pytest.raises(ConfigError, match="heads of 'attn' must divide 3 and 9 channels"):
        HybridConvNNAttention.from_layer(layer, replace(config, branch_ratio=0.25), "fresh", site)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("blend", [0.0, 0.5])
def test_lower_precision_stays_near_float64(dtype, tolerance, blend):
    torch.manual_seed(0)
    exact = ConvNN2d(8, 8, 9, blend=blend, fast=False).double()
    x = torch.randn(2, 8, 9, 7)
    expected = exact(x.double())
    got = copy.deepcopy(exact).to(dtype)(x.to(dtype)).double()
    if dtype == torch.bfloat16 and blend:
        # Rounded features may choose other neighbours; most outputs must still agree.
        assert ((got - expected).abs() < tolerance).double().mean() > 0.5
    else:
        assert (got - expected).abs().max() < tolerance
