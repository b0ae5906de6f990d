"""Windows of any size: even kernels, patches, TensorFlow's padding and lines, against torch and independent loops."""

import itertools
import math

import oracles
import pytest
import torch
import torch.nn.functional as F
from comparing import close, compare
from timm.layers import Conv2dSame
from torch import nn

from convnn import ConfigError, ConvNN1d, ConvNN2d, HybridConvNN2d, OperatorConfig
from convnn.nn.base import Site
from convnn.ops.geometry import Geometry, window_order

AT_CONVOLUTION = OperatorConfig(k="kernel", blend=0.0)


pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def results(layer, x):
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    y.square().sum().backward()
    return y.detach(), leaf.grad


def check_position_end(conv, x, *, slots="rank", self_first=True):
    """Both ways to compute the position end are the convolution, with all gradients, and give it back."""
    config = OperatorConfig(k="kernel", blend=0.0, slots=slots, self_first=self_first)
    for fast in (False, True):
        module = ConvNN2d.from_layer(conv, config, "transfer", Site("conv"))
        module.fast = fast
        conv.zero_grad()
        for a, b in zip(results(conv, x), results(module, x), strict=True):
            close(a, b)
        back = module.to_layer()
        assert type(back) is type(conv) and torch.equal(back.weight, conv.weight)
        close(back(x), conv(x))
        module.weight.data.copy_(module.weight.grad)  # the gradient of the slots is that of the taps, permuted alike
        close(module.to_layer().weight, conv.weight.grad)


CASES = [
    ((2, 2), (5, 6), 1, 0, 1, 1),
    ((2, 2), (6, 6), 2, 0, 1, 1),
    ((2, 2), (5, 7), 1, 1, 3, 2),
    ((4, 4), (9, 8), 1, 2, 1, 1),
    ((4, 4), (9, 11), 2, 1, 2, 1),
    ((4, 4), (8, 12), 4, 0, 1, 4),
    ((6, 6), (9, 9), (1, 3), (2, 4), 1, 1),
    ((2, 3), (6, 7), 1, (1, 1), 1, 1),
    ((4, 7), (9, 11), 1, (2, 3), 1, 1),
    ((1, 4), (5, 9), 1, (0, 2), 1, 1),
    ((6, 4), (12, 9), 2, (3, 1), (1, 2), 1),
    ((7, 7), (17, 18), 4, 3, 1, 1),
    ((8, 8), (16, 24), 8, 0, 1, 1),
]


@pytest.mark.parametrize("kernel, size, stride, padding, dilation, groups", CASES, ids=str)
def test_position_end_of_any_window_is_the_convolution(kernel, size, stride, padding, dilation, groups):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, kernel, stride, padding, dilation, groups).double()
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    for slots, self_first in (("rank", True), ("rank", False), ("raster", True), ("window", False)):
        check_position_end(conv, x, slots=slots, self_first=self_first)


def test_a_patch_of_16_by_16_is_its_own_window():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 16, 16).double()
    check_position_end(conv, torch.randn(1, 3, 32, 48, dtype=torch.float64))


@pytest.mark.parametrize("kernel", list(itertools.product(range(1, 6), repeat=2)), ids=str)
def test_the_nearest_tokens_are_the_window_at_every_position(kernel):
    geometry = Geometry(7, 8, kernel, stride=(1, 2), padding=(1, 2), dilation=(2, 1))
    tokens = torch.arange(geometry.num_tokens)
    queries = geometry.query_index()
    distance = geometry.distance(queries[:, None], tokens)
    nearest = distance.sort(dim=1, stable=True).indices[:, : math.prod(kernel)]
    assert torch.equal(nearest[:, 0], queries)
    taps = torch.nn.functional.unfold(
        tokens.view(1, 1, *geometry.padded_shape).double(), kernel, geometry.dilation, stride=geometry.stride
    )[0].T.long()  # (Q, taps), in raster order
    assert torch.equal(nearest, taps[:, window_order(kernel)])
    assert torch.equal(taps[:, geometry.centre[0] * kernel[1] + geometry.centre[1]], queries)


def test_an_even_window_grows_by_whole_windows():
    geometry = Geometry(9, 9, (4, 4))
    query = 4 * 9 + 4
    order = geometry.distance(torch.tensor(query), torch.arange(81)).sort(stable=True).indices
    for side, (low, high) in {1: (4, 4), 2: (4, 5), 3: (3, 5), 4: (3, 6)}.items():
        block = {r * 9 + c for r in range(low, high + 1) for c in range(low, high + 1)}
        assert set(order[: side**2].tolist()) == block


def oracle_case(size, k, kernel, *, channels=(3, 4), **kwargs):
    torch.manual_seed(0)
    module = ConvNN2d(*channels, k, kernel_size=kernel, fast=False, **kwargs).double().eval()
    nn.init.normal_(module.weight)
    x = torch.randn(1, channels[0], *size, dtype=torch.float64)
    geometry = module.geometry(*size)
    names = ("blend", "self_first", "slots", "pad_candidates", "mix", "weighting", "similarity", "aggregation")
    options = {name: kwargs[name] for name in names if name in kwargs}
    options |= {"metric": kwargs["distance"]} if "distance" in kwargs else {}
    options |= {"radius": kwargs["num_candidates"]} if kwargs.get("candidates") == "window" else {}

    def reference(x):
        own = {"kernel": module.kernel_size, "stride": module.stride, "dilation": module.dilation}
        own |= {"padding": geometry.padding, "extra": geometry.extra, "groups": module.mix_groups}
        return oracles.convnn2d(x, module.weight, module.bias, k=k, **own, **options)

    compare(module, reference, x)


@pytest.mark.parametrize(
    "kernel, kwargs",
    [
        (2, {"padding": 0}),
        (2, {"padding": 1, "slots": "window"}),
        (4, {"padding": 1, "stride": 2, "slots": "window"}),
        (4, {"padding": 2, "slots": "raster", "similarity": "euclidean"}),
        (2, {"padding": 0, "stride": 2, "weighting": "softmax"}),
        ((2, 3), {"padding": (0, 1), "self_first": False}),
        ((4, 1), {"padding": (1, 0), "stride": (1, 2)}),
        (2, {"padding": 1, "dilation": 2, "slots": "window"}),
        (2, {"padding": 1, "distance": "euclidean"}),
        (2, {"padding": 1, "mix": "concat"}),
        (2, {"padding": 1, "pad_candidates": False}),
        (2, {"padding": 1, "candidates": "window", "num_candidates": 2}),
        (2, {"padding": "same"}),
        (3, {"padding": "same", "stride": 2}),
        (4, {"padding": "same", "stride": 2, "pad_candidates": False, "slots": "window"}),
        (2, {"padding": "same", "aggregation": "depthwise", "channels": (3, 6)}),
    ],
    ids=str,
)
@pytest.mark.parametrize("blend", [0.0, 0.4, 1.0])
def test_any_window_equals_loop_reference(kernel, kwargs, blend):
    oracle_case((5, 4), 5, kernel, blend=blend, **kwargs)


@pytest.mark.parametrize("kernel, stride, dilation", [(3, 2, 1), (4, 2, 1), (2, 1, 1), (5, (2, 3), 2), (4, 1, 3)])
@pytest.mark.parametrize("size", [(9, 12), (10, 7)])
def test_same_padding_of_timm_depends_on_the_image(kernel, stride, dilation, size):
    torch.manual_seed(0)
    conv = Conv2dSame(4, 6, kernel, stride, dilation=dilation, groups=2).double()
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    module = ConvNN2d.from_layer(conv, AT_CONVOLUTION, "transfer", Site("conv"))
    for fast in (False, True):
        module.fast = fast
        for a, b in zip(results(conv, x), results(module, x), strict=True):
            close(a, b)
    back = module.to_layer()
    assert isinstance(back, Conv2dSame) == (module.stride != (1, 1))
    close(back(x), conv(x))


def test_torchs_same_padding_of_even_kernels():
    conv = nn.Conv2d(2, 3, (2, 5), padding="same", dilation=(3, 1)).double()
    check_position_end(conv, torch.randn(1, 2, 6, 7, dtype=torch.float64))


@pytest.mark.parametrize(
    "kernel, stride, padding, dilation", [(3, 1, 1, 1), (4, 2, 1, 1), (5, 1, "same", 2), (8, 8, 0, 1)]
)
def test_lines_at_the_position_end(kernel, stride, padding, dilation):
    torch.manual_seed(0)
    conv = nn.Conv1d(4, 6, kernel, stride, padding, dilation, groups=2).double()
    check_position_end(conv, torch.randn(2, 4, 24, dtype=torch.float64))


@pytest.mark.parametrize("blend", [0.3, 1.0])
def test_a_line_is_a_map_of_one_row(blend):
    torch.manual_seed(0)
    module = ConvNN1d(3, 4, 3, blend=blend, kernel_size=4, padding=2, stride=2, fast=False).double()
    x = torch.randn(1, 3, 9, dtype=torch.float64)

    def reference(x):
        window = {"kernel": (1, 4), "stride": (1, 2), "padding": (0, 2)}
        return oracles.convnn2d(x.unsqueeze(2), module.weight, module.bias, k=3, blend=blend, **window).squeeze(2)

    compare(module, reference, x)
    y, found = module(x, return_neighbors=True)
    assert torch.equal(y, module(x)) and found.index.shape == (1, 1, y.shape[-1], 3)
    with pytest.raises(ValueError, match=r"expected \(batch, 3, length\), got \(1, 3, 1, 9\)"):
        module(x.unsqueeze(2))


def test_neighborhoods_know_the_longer_side_of_an_even_window():
    layer = ConvNN2d(2, 2, "kernel", blend=0.0, kernel_size=4, padding=2)
    found = layer.neighborhood(torch.randn(1, 2, 6, 5))
    assert layer.k == 16 and found.in_window().all()
    rows, cols = found.offsets()
    assert (rows.min(), rows.max(), cols.min(), cols.max()) == (-1, 2, -1, 2)
    layer = ConvNN2d(2, 2, 25, blend=0.0, kernel_size=4, padding=2)
    assert layer.neighborhood(torch.randn(1, 2, 9, 9)).in_window().sum(-1).unique().tolist() == [16]
    same = ConvNN2d(2, 2, "kernel", stride=2, blend=0.0, kernel_size=3, padding="same")
    ring = same.neighborhood(torch.randn(1, 2, 6, 6)).is_padding  # 0 rows above, 1 below
    assert ring.any(-1).view(3, 3).int().tolist() == [[0, 0, 1], [0, 0, 1], [1, 1, 1]]


def test_hybrid_of_an_even_kernel_splits_it():
    torch.manual_seed(0)
    for conv in (nn.Conv2d(3, 8, 4, 4), Conv2dSame(3, 8, 4, 2), nn.Conv2d(3, 8, 2, padding="same")):
        conv = conv.double()
        x = torch.randn(2, 3, 12, 9, dtype=torch.float64)
        config = OperatorConfig(k="kernel", blend=0.0, branch_ratio=0.5)
        hybrid = HybridConvNN2d.from_layer(conv, config, "transfer", Site("conv"))
        close(hybrid(x), conv(x))
        close(hybrid.to_layer()(x), conv(x))
    with pytest.raises(ConfigError, match=r"even kernel; leave operator.branch_kernel at null"):
        HybridConvNN2d.from_layer(conv, OperatorConfig(branch_ratio=0.5, branch_kernel=3), "fresh", Site("conv"))


@pytest.mark.parametrize("kwargs", [{"padding": "same"}, {"padding": "valid", "kernel_size": 3}])
def test_paddings_that_mean_nothing_are_refused(kwargs):
    with pytest.raises(ValueError, match=r"must be a number, a pair, or same with a kernel_size"):
        ConvNN2d(3, 4, **kwargs)


def test_shuffle_is_not_for_lines():
    with pytest.raises(ValueError, match=r"shuffle=2 is for maps"):
        ConvNN1d(3, 4, shuffle=2)
    conv = nn.Conv1d(3, 4, 3)
    with pytest.raises(ConfigError, match=r"'here': shuffle=2 is for maps"):
        ConvNN2d.from_layer(conv, OperatorConfig(shuffle=2), "fresh", Site("here"))
    with pytest.raises(ConfigError, match=r"'here' is a Conv1d"):
        HybridConvNN2d.from_layer(conv, OperatorConfig(branch_ratio=0.5), "fresh", Site("here"))


def test_batched_patches_at_a_blend_see_the_whole_map():
    layer = ConvNN2d(3, 4, "kernel", 4, 0, blend=1.0, kernel_size=4)
    found = layer.neighborhood(torch.randn(2, 3, 12, 16))
    rows, cols = found.geometry.coordinates(found.queries)
    assert rows.unique().tolist() == [1, 5, 9] and cols.unique().tolist() == [1, 5, 9, 13]
    assert not found.in_window().all()
    assert F.conv2d(torch.randn(1, 3, 12, 16), torch.randn(4, 3, 4, 4), stride=4).shape[2:] == found.geometry.out_shape
