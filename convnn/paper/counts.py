"""What a configuration costs, counted twice without training or memory: honestly, and as the authors counted.

Shapes: N tokens, Q queries, K neighbours, M candidates, H heads, C input channels, D channels per head.

Both counts are of the forward pass of one image. The honest one is that of ``convnn.models.flops``.

The authors' counts come from torch.profiler, which sees matrix products, convolutions without ``padding="same"``, and
elementwise products and sums written as such, but no Conv1d. The formulae at ``profiled_conv`` and
``profiled_attention`` follow from that; they give all published figures of the paper's tables to the last digit.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from timm.layers.attention import Attention
from torch import Tensor, nn

from convnn.config.schema import Config
from convnn.errors import ConfigError
from convnn.models.backbones import create_backbone
from convnn.models.flops import count_operations
from convnn.models.swap import count_parameters, swap_layers
from convnn.nn.attention import ConvNNAttention
from convnn.nn.conv import ConvNN2d
from convnn.nn.hybrid import HybridConvNN2d

CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000, "imagefolder": 1000, "digits": 10}
"""Classes of a data set, by ``data.name``; an image folder may be ImageNet-1K."""

SIDES = {"cifar10": 32, "cifar100": 32, "imagenet": 224, "imagefolder": 256, "digits": 8}


@dataclass(frozen=True)
class ModelCost:
    """Size and cost of a model."""

    params: int
    """Number of trainable parameters."""
    gflops: float
    """1e9 operations of the forward pass of one image, neighbour search and aggregation included."""
    gflops_profiler: float | None
    """The same as the authors' profiler would count it; None where its rule is not known."""


_BACKBONES: dict[str, nn.Module] = {}
_SIZES: dict[str, int] = {}
_COSTS: dict[str, tuple[int, int | None, int]] = {}
"""Models built and counts made before, by what decides them (``_key``): a grid has many points of one model."""


def build_meta(config: Config, num_classes: int | None = None) -> tuple[nn.Module, Tensor]:
    """Return a configuration's model and one image for it, both on torch's meta device.

    Raises:
        ConfigError: if the parts do not fit together.
    """
    channels, side = _image(config)
    side = config.data.image_size or config.backbone.image_size or side
    classes = _classes(config, num_classes)
    key = json.dumps([asdict(config.backbone), classes, channels, side])
    with torch.device("meta"):
        if key not in _BACKBONES:
            _BACKBONES[key] = create_backbone(config.backbone, classes, channels, side)
        model = copy.deepcopy(_BACKBONES[key])
        swap_layers(model, config.swap, config.operator)
    return model, torch.empty(1, channels, side, side, device="meta")


def parameters(config: Config, num_classes: int | None = None) -> int:
    """Return the number of trainable parameters of a configuration's model."""
    key = _key(config, _classes(config, num_classes))
    if key not in _SIZES:
        _SIZES[key] = count_parameters(build_meta(config, num_classes)[0])
    return _SIZES[key]


def _classes(config: Config, num_classes: int | None) -> int:
    return num_classes or CLASSES.get(config.data.name, config.data.num_classes)


def _image(config: Config) -> tuple[int, int]:
    """Return channels and side of the stored images."""
    return 1 if config.data.name == "digits" else 3, config.data.load_size or SIDES.get(config.data.name, 32)


def _key(config: Config, num_classes: int | None) -> str:
    """Return what decides model and image; without classes, what decides all but the classifier's width."""
    own = [asdict(config.backbone), asdict(config.operator), asdict(config.swap)]
    return json.dumps([own, _image(config), config.data.name == "imagenet", config.data.image_size, num_classes])


def model_cost(config: Config, num_classes: int | None = None) -> ModelCost:
    """Return parameters and operations of a configuration's model. It is built on torch's meta device, without memory.

    What was counted once is remembered: settings that change neither model nor image cost no time.

    Args:
        config: of the run; its data is not read.
        num_classes: default: that of the data set, 1000 for an image folder.

    Raises:
        ConfigError: if the parts do not fit together.
    """
    classes, key = _classes(config, num_classes), _key(config, None)
    key = key if key in _COSTS else _key(config, classes)  # of a classifier that is no linear layer
    if key not in _COSTS:
        model, image = build_meta(config, classes)
        # The authors' later code, which made the ImageNet runs, projects all keys before it samples.
        honest, profiled = count_both_ways(model, image, sampled_keys=config.data.name != "imagenet")
        head = model.get_classifier()  # type: ignore[operator]
        each = 2 * head.in_features if isinstance(head, nn.Linear) else 0  # operations of a class
        key = _key(config, None) if each else key
        _COSTS[key] = (honest - classes * each, None if profiled is None else profiled - classes * each, each)
    honest, profiled, each = _COSTS[key]
    more = classes * each
    return ModelCost(
        parameters(config, classes), (honest + more) / 1e9, None if profiled is None else (profiled + more) / 1e9
    )


def count_both_ways(model: nn.Module, image: Tensor, *, sampled_keys: bool = True) -> tuple[int, int | None]:
    """Return the operations of ``model(image)``, for one image on any device, by the honest and the authors' count.

    Args:
        model: any model; the second count is None where it has layers whose rule is not known.
        image: (1, channels, height, width).
        sampled_keys: whether the authors' attention projects only the keys that it sampled.
    """
    profiled: list[int | None] = []
    operators = {name: m for name, m in model.named_modules() if _is_operator(m)}
    inside = tuple(f"{name}." for name in operators)
    hooks = []
    for name, module in model.named_modules():
        if name in operators and not name.startswith(inside):
            rule: Callable[..., int | None] = partial(_profiled, sampled_keys=sampled_keys)
            hooks.append(module.register_forward_hook(partial(_add, profiled, rule)))
        elif isinstance(module, (nn.Linear, nn.Conv2d)) and not name.startswith(inside):
            hooks.append(module.register_forward_hook(partial(_add, profiled, _products)))
    try:
        honest = count_operations(model, image).total
    except ValueError as error:
        raise ConfigError(f"the model cannot process this image: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    known = [n for n in profiled if n is not None]
    if len(known) < len(profiled) or any(isinstance(m, Attention) for m in model.modules()):
        return honest, None
    return honest, sum(known) + _residuals(model)


def _is_operator(module: nn.Module) -> bool:
    return hasattr(type(module), "from_layer")


def _add(into: list[Any], rule: Callable[..., Any], module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
    into.append(rule(module, args[0], out))


def _products(module: nn.Module, x: Tensor, out: Tensor) -> int:
    """Return the operations of a linear layer or a convolution, none for ``padding="same"``."""
    if isinstance(module, nn.Linear):
        return 2 * out.numel() * module.in_features
    assert isinstance(module, nn.Conv2d)
    return 0 if module.padding == "same" else 2 * out.numel() * module.weight[0].numel()


def _residuals(model: nn.Module) -> int:
    """Return the sums of a ViT's residual branches and positions; others add in place, which is not counted."""
    blocks, embed = getattr(model, "blocks", None), getattr(model, "pos_embed", None)
    return (2 * len(blocks) + 1) * embed.numel() if blocks is not None and embed is not None else 0


def _profiled(module: nn.Module, x: Tensor, out: Tensor, *, sampled_keys: bool) -> int | None:
    if isinstance(module, ConvNN2d):
        return profiled_conv(module, x.shape[2], x.shape[3])
    if isinstance(module, ConvNNAttention):
        return profiled_attention(module, x.shape[1], sampled_keys=sampled_keys)
    if isinstance(module, HybridConvNN2d):
        return _profiled_hybrid(module, x, out)
    return None


def _profiled_hybrid(module: HybridConvNN2d, x: Tensor, out: Tensor) -> int | None:
    """Return the 1x1 and the neighbours' similarities; the convolution branch of a hybrid counts nothing."""
    if module.pointwise is None:  # a plain convolution; how those of other kernels were padded is not known
        known = module.neighbors is None and module.conv is not None and module.conv.padding != "same"
        return _products(module.conv, x, out) if known and module.conv is not None else None
    similarity = 0 if module.neighbors is None else profiled_conv(module.neighbors, x.shape[2], x.shape[3])
    return None if similarity is None else _products(module.pointwise, out, out) + similarity


def profiled_conv(layer: ConvNN2d, height: int, width: int) -> int | None:
    """Return what the authors' count has of a neighbour layer on a map: its similarities, not its aggregation.

    2 N M C for N tokens of the padded map, which are all queries. Coordinates in the similarity add two channels and
    the products that scale both parts, N (C + 2). A grid adds 2 M for its indices. The learned variant adds N K C for
    the products of its weights; its projections are Conv1d. A shuffle by s counts on the smaller map, C s^2 channels.
    None for other settings.
    """
    s = layer.selection
    mixed = s.mix == "concat" and 0 < layer.blend < 1
    learned = layer.qkv is not None and layer.mixing.weighting == "softmax" and not mixed and s.candidates == "all"
    plain = s.similarity == "cosine" and (learned or (layer.qkv is None and layer.mixing.weighting == "ones"))
    height, width = height // layer.shuffle, width // layer.shuffle
    if not plain or not (mixed or layer.blend == 1) or s.candidates not in ("all", "random", "grid"):
        return None
    tokens = layer.geometry(height, width).num_tokens
    candidates, extra = tokens, 0
    if s.candidates == "random":
        candidates = min(s.num_candidates, tokens)
    elif s.candidates == "grid" and s.num_candidates <= height:
        candidates = s.num_candidates**2
        extra = 2 * candidates
    channels = layer.in_channels * layer.shuffle**2 + 2 * mixed
    extra += tokens * channels * (mixed + layer.k * learned)
    return 2 * tokens * candidates * channels + extra


def profiled_attention(layer: ConvNNAttention, tokens: int, *, sampled_keys: bool = True) -> int | None:
    """Return what the authors' count has of an attention layer, over N tokens of C channels, H D = E.

    ==================  ====================================================================================
    projections         8 N C E; a sampled layer whose keys are sampled first has 2 M C E for them
    neighbour layer     2 N M E for the scores, N K E for the weights; the sum over neighbours is a Conv1d
    all tokens          4 N N E for scores and sum
    the k best (KVT)    N N more, with one head
    sparse              (3 H + 1) N N more: scale, mask and two parts of it; all tokens are computed
    windows of w        the authors' library: N padded to P, 12 P w E for scores and sum, 21 P E for the scale and the
                        rotary positions of queries and three windows of keys, 3 P + 3 w for mask and angles
    ==================  ====================================================================================

    None for other settings.
    """
    s, h = layer.selection, layer.num_heads
    wide = h * layer.head_dim
    if layer.mixing.weighting != "softmax" or s.similarity != "dot" or layer.blend != 1 or layer.border != "nearest":
        return None
    projections, dense = 8 * tokens * layer.dim * wide, 4 * tokens**2 * wide
    if layer.aggregation != "sum":
        if s.candidates not in ("all", "random", "grid") or (s.candidates == "grid" and layer.layout == "grid"):
            return None
        candidates = tokens if s.candidates == "all" else min(s.num_candidates, tokens)
        if sampled_keys:
            projections -= 2 * (tokens - candidates) * layer.dim * wide
        return projections + 2 * tokens * candidates * wide + tokens * layer.k * wide
    if s.candidates == "all" and layer.k >= tokens:
        return projections + dense
    if s.candidates == "all":
        return projections + dense + tokens**2 if h == 1 else None
    if layer.layout != "sequence" or s.candidates not in ("window", "stride") or layer.k < tokens:
        return None
    if wide == layer.dim:
        return projections + dense + (3 * h + 1) * tokens**2
    window = s.num_candidates
    padded = math.ceil(tokens / window) * window
    return projections + 12 * padded * window * wide + 21 * padded * wide + 3 * padded + 3 * window
