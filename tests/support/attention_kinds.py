"""One small layer of each kind of attention, and what a model calls it with, in float64.

Also the independent reference at k < n: the layer's own forward pass, whose softmax keeps the k best scores of a row.
"""

import contextlib
import copy
from dataclasses import dataclass, field
from functools import partial

import torch
from timm.layers import RelPosBias, RelPosMlp
from timm.layers.attention import Attention, AttentionRope
from timm.layers.attention2d import Attention2d
from timm.layers.bottleneck_attn import BottleneckAttn
from timm.models import (
    beit,
    cait,
    davit,
    efficientformer,
    eva,
    fastvit,
    gcvit,
    hiera,
    hieradet_sam2,
    levit,
    maxxvit,
    metaformer,
    nest,
    pvt_v2,
    swin_transformer,
    swin_transformer_v2,
    swin_transformer_v2_cr,
    tiny_vit,
    tnt,
    twins,
    visformer,
    vision_transformer_relpos,
    vision_transformer_sam,
    volo,
)
from torch import nn
from torchvision.models import maxvit as torchvision_maxvit
from torchvision.models import swin_transformer as torchvision_swin

NORM = nn.LayerNorm


@dataclass(frozen=True)
class Kind:
    """A layer, and a call of it."""

    make: object
    shape: tuple
    tokens: int
    given: dict = field(default_factory=dict)
    """Other arguments: shapes of random tensors, or functions of nothing."""
    positions: tuple = ()
    """Parameters that make the bias of scores: zero, there is none."""
    plain_softmax: bool = True
    """The layer has a way without fused attention, whose softmax can be watched."""

    def layer(self):
        """Return the layer with random parameters."""
        torch.manual_seed(0)
        made = self.make().double()
        made.eval()  # which LeViT's does not return from
        for module in made.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
        for name, parameter in made.named_parameters():
            nn.init.normal_(parameter, std=1.0 if any(p in name for p in self.positions) else 0.3)
        return made

    def call(self):
        """Return the first argument and the others."""
        torch.manual_seed(1)
        x = torch.randn(*self.shape, dtype=torch.float64)
        given = {
            name: torch.randn(*v, dtype=torch.float64) if isinstance(v, tuple) else v()
            for name, v in self.given.items()
        }
        return x, given


def borders(windows, side, shift):
    """The mask of a row of windows of a map that was shifted, as Swin writes it: (windows, N, N)."""

    def mask():
        place = torch.arange(windows * side)
        part = (place >= windows * side - side).long() + (place >= windows * side - shift).long()
        rows = (torch.arange(side) >= side - shift).long()  # one row of windows: it is the last one
        marks = (rows[:, None] * 3 + part[None]).view(side, windows, side).transpose(0, 1).flatten(1)
        return (marks[:, None] != marks[:, :, None]).double() * -100

    return mask


def rope(tokens, channels):
    """Sines and cosines for so many tokens."""

    def embedding():
        angle = torch.randn(tokens, channels // 2, dtype=torch.float64).repeat_interleave(2, -1)
        return torch.cat([angle.sin(), angle.cos()], dim=-1)

    return embedding


def sized(size):
    """A size as an argument."""
    return lambda: size


TABLE = ("relative_position_bias_table",)
TWO = partial(RelPosBias, window_size=(2, 3))
MLP = partial(RelPosMlp, window_size=(2, 3), hidden_dim=8)
EVA = {"rope": rope(6, 4)}
KINDS = {
    "gated": Kind(lambda: Attention(8, 2, qkv_bias=True, gated=True, scale_norm=True, norm_layer=NORM), (2, 7, 8), 7),
    "own width": Kind(lambda: Attention(8, 2, attn_head_dim=6, qk_norm=True, norm_layer=NORM), (2, 7, 8), 7),
    "eva": Kind(lambda: eva.EvaAttention(8, 2, norm_layer=NORM), (2, 7, 8), 7, EVA),
    "eva split": Kind(
        lambda: eva.EvaAttention(
            8, 2, qkv_fused=False, num_prefix_tokens=3, qk_norm=True, norm_layer=NORM, rotate_half=True
        ),
        (2, 9, 8),
        9,
        EVA,
    ),
    "eva apart": Kind(
        lambda: eva.EvaAttention(8, 2, qkv_bias_separate=True, gated=True, scale_norm=False, num_prefix_tokens=0),
        (2, 6, 8),
        6,
        EVA,
    ),
    "rope": Kind(lambda: AttentionRope(8, 2), (2, 7, 8), 7, EVA),
    "rope groups": Kind(
        lambda: AttentionRope(16, 4, qkv_fused=False, num_kv_heads=2, qk_norm=True, gated=True, norm_layer=NORM),
        (2, 7, 16),
        7,
        EVA,
    ),
    "beit": Kind(lambda: beit.Attention(8, 2, qkv_bias=True, window_size=(2, 3)), (2, 7, 8), 7, {}, TABLE),
    "beit shared": Kind(lambda: beit.Attention(8, 2), (2, 7, 8), 7, {"shared_rel_pos_bias": (2, 7, 7)}),
    "beit both": Kind(
        lambda: beit.Attention(8, 2, qkv_bias=True, qkv_bias_separate=True, window_size=(2, 3)),
        (2, 7, 8),
        7,
        {"shared_rel_pos_bias": (2, 7, 7)},
        TABLE,
    ),
    "relative": Kind(
        lambda: vision_transformer_relpos.RelPosAttention(8, 2, qk_norm=True, rel_pos_cls=TWO), (2, 6, 8), 6, {}, TABLE
    ),
    "relative prefix": Kind(
        lambda: vision_transformer_relpos.RelPosAttention(8, 2, rel_pos_cls=partial(TWO, prefix_tokens=1)),
        (2, 7, 8),
        7,
        {},
        TABLE,
    ),
    "relative mlp": Kind(
        lambda: vision_transformer_relpos.RelPosAttention(8, 2, rel_pos_cls=MLP), (2, 6, 8), 6, {}, ("rel_pos.mlp",)
    ),
    "relative shared": Kind(
        lambda: vision_transformer_relpos.RelPosAttention(8, 2), (2, 6, 8), 6, {"shared_rel_pos": (1, 2, 6, 6)}
    ),
    "gcvit": Kind(lambda: gcvit.WindowAttentionGlobal(8, 2, (2, 3)), (4, 6, 8), 6, {"q_global": (2, 2, 3, 8)}, TABLE),
    "gcvit local": Kind(lambda: gcvit.WindowAttentionGlobal(8, 2, (2, 3), use_global=False), (4, 6, 8), 6, {}, TABLE),
    "levit": Kind(
        lambda: levit.Attention(8, 4, 2, attn_ratio=2, resolution=(2, 3)), (2, 6, 8), 6, {}, ("attention_biases",)
    ),
    "levit conv": Kind(
        lambda: levit.Attention(8, 4, 2, attn_ratio=2, resolution=(2, 3), use_conv=True),
        (2, 8, 2, 3),
        6,
        {},
        ("attention_biases",),
    ),
    "tinyvit": Kind(
        lambda: tiny_vit.Attention(8, 4, 2, attn_ratio=2, resolution=(2, 3)), (2, 6, 8), 6, {}, ("attention_biases",)
    ),
    "efficientformer": Kind(
        lambda: efficientformer.Attention(8, 4, 2, attn_ratio=2, resolution=(2, 3)),
        (2, 6, 8),
        6,
        {},
        ("attention_biases",),
    ),
    "swin": Kind(lambda: swin_transformer.WindowAttention(8, 2, window_size=(2, 3)), (4, 6, 8), 6, {}, TABLE),
    "swin shifted": Kind(
        lambda: swin_transformer.WindowAttention(8, 2, window_size=4), (6, 16, 8), 16, {"mask": borders(3, 4, 2)}, TABLE
    ),
    "swin v2": Kind(lambda: swin_transformer_v2.WindowAttention(8, (2, 3), 2), (4, 6, 8), 6, {}, ("cpb_mlp",)),
    "swin v2 shifted": Kind(
        lambda: swin_transformer_v2.WindowAttention(8, (4, 4), 2),
        (6, 16, 8),
        16,
        {"mask": borders(3, 4, 2)},
        ("cpb_mlp",),
    ),
    "swin v2 cr": Kind(
        lambda: swin_transformer_v2_cr.WindowMultiHeadAttention(8, 2, (4, 4)),
        (6, 16, 8),
        16,
        {"mask": borders(3, 4, 2)},
        ("meta_mlp",),
    ),
    "davit": Kind(lambda: davit.WindowAttention(8, (2, 3), 2), (4, 6, 8), 6),
    "torchvision swin": Kind(
        lambda: torchvision_swin.ShiftedWindowAttention(8, [4, 3], [2, 1], 2), (2, 7, 8, 8), 12, {}, TABLE
    ),
    "torchvision swin one axis": Kind(
        lambda: torchvision_swin.ShiftedWindowAttention(8, [4, 3], [2, 1], 2), (2, 4, 8, 8), 12, {}, TABLE
    ),
    "torchvision swin v2": Kind(
        lambda: torchvision_swin.ShiftedWindowAttentionV2(8, [4, 3], [2, 1], 2), (2, 7, 8, 8), 12, {}, ("cpb_mlp",)
    ),
    "maxvit": Kind(lambda: maxxvit.AttentionCl(8, dim_head=4, rel_pos_cls=TWO), (4, 2, 3, 8), 6, {}, TABLE),
    "maxvit last": Kind(
        lambda: maxxvit.AttentionCl(8, dim_head=4, head_first=False, rel_pos_cls=MLP), (4, 2, 3, 8), 6, {}, ("mlp",)
    ),
    "maxvit 2d": Kind(
        lambda: maxxvit.Attention2d(8, dim_out=12, dim_head=4, rel_pos_cls=TWO), (2, 8, 2, 3), 6, {}, TABLE
    ),
    "maxvit 2d last": Kind(
        lambda: maxxvit.Attention2d(8, dim_head=4, head_first=False),
        (2, 8, 2, 3),
        6,
        {"shared_rel_pos": (1, 2, 6, 6)},
    ),
    "bottleneck": Kind(lambda: BottleneckAttn(8, 12, (2, 3), 2, 2), (2, 8, 2, 3), 6, {}, ("pos_embed",)),
    "bottleneck scaled": Kind(
        lambda: BottleneckAttn(8, 12, (2, 3), num_heads=2, dim_head=6, scale_pos_embed=True),
        (2, 8, 2, 3),
        6,
        {},
        ("pos_embed",),
    ),
    "attention 2d": Kind(lambda: Attention2d(8, num_heads=2), (2, 8, 2, 3), 6, plain_softmax=False),
    "visformer": Kind(lambda: visformer.Attention(8, 2), (2, 8, 2, 3), 6),
    "fastvit": Kind(lambda: fastvit.Attention(8, head_dim=4), (2, 8, 2, 3), 6),
    "sam": Kind(
        lambda: vision_transformer_sam.Attention(8, 2, use_rel_pos=True, input_size=(2, 3)),
        (2, 2, 3, 8),
        6,
        {},
        ("rel_pos_",),
    ),
    "sam resized": Kind(
        lambda: vision_transformer_sam.Attention(8, 2, use_rel_pos=True, input_size=(4, 4)),
        (2, 2, 3, 8),
        6,
        {},
        ("rel_pos_",),
    ),
    "volo": Kind(lambda: volo.Attention(8, 2, qkv_bias=True), (2, 2, 3, 8), 6),
    "sam 2": Kind(lambda: hieradet_sam2.MultiScaleAttention(8, 12, 2), (2, 2, 3, 8), 6),
    "hiera": Kind(lambda: hiera.MaskUnitAttention(8, 12, 2), (2, 6, 8), 6),
    "hiera units": Kind(
        lambda: hiera.MaskUnitAttention(8, 8, 2, window_size=4, use_mask_unit_attn=True), (2, 12, 8), 4
    ),
    "nest": Kind(lambda: nest.Attention(8, 2, qkv_bias=True), (2, 3, 4, 8), 4),
    "torchvision maxvit": Kind(
        lambda: torchvision_maxvit.RelativePositionalMultiHeadAttention(8, 4, 4), (2, 3, 4, 8), 4, {}, TABLE
    ),
    "metaformer": Kind(lambda: metaformer.Attention(8, head_dim=4), (2, 6, 8), 6),
    "tnt": Kind(lambda: tnt.Attention(8, 4, 2, qkv_bias=True), (2, 6, 8), 6),
    "twins": Kind(lambda: twins.LocallyGroupedAttn(8, 2, ws=3), (2, 28, 8), 9, {"size": sized((4, 7))}),
    "pvt": Kind(lambda: pvt_v2.Attention(8, 2), (2, 6, 8), 6, {"feat_size": sized((2, 3))}),
    "talking heads": Kind(lambda: cait.TalkingHeadAttn(8, 2, qkv_bias=True), (2, 6, 8), 6),
}


@contextlib.contextmanager
def best_scores(monkeypatch, k, chosen=None, seen=None):
    """Let every softmax keep the k best scores of each row, or the scores at the k best of ``chosen``, in turn.

    ``seen`` collects the scores.
    """
    softmax, turns = torch.Tensor.softmax, iter(chosen or ())

    def best(score, dim, dtype=None):
        if seen is not None:
            seen.append(score.detach())
        by = next(turns) if chosen is not None else score.detach()
        outside = torch.ones_like(by, dtype=torch.bool).scatter(
            -1, by.sort(dim=-1, descending=True, stable=True).indices[..., :k], False
        )
        return softmax(score.masked_fill(outside, -torch.inf), dim)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "softmax", best)
        patch.setattr(torch.nn.functional, "softmax", lambda score, dim=None, **_: best(score, dim))
        yield


def unfused(layer):
    """Return a copy that computes its scores in sight."""
    layer = copy.deepcopy(layer)
    for module in layer.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return layer


def without_positions(layer, kind, given):
    """Return a copy without the bias of its scores, and the arguments without theirs."""
    layer = unfused(layer)
    for name, parameter in layer.named_parameters():
        if any(p in name for p in kind.positions):
            nn.init.zeros_(parameter)
    return layer, {n: torch.zeros_like(v) if n.startswith("shared") else v for n, v in given.items()}
