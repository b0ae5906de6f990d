"""More kinds of ``attention_kinds``: queries and keys on different maps, and attention among other things."""

from functools import partial

import torch
from attention_kinds import NORM, Kind, sized
from timm.layers.attention2d import MultiQueryAttention2d, MultiQueryAttentionV2
from timm.layers.diff_attention import DiffAttention
from timm.layers.halo_attn import HaloAttn
from timm.models import (
    cpubone,
    efficientformer_v2,
    efficientvit_msra,
    gemma4_vit,
    hiera,
    hieradet_sam2,
    levit,
    lowformer,
    mvitv2,
    nextvit,
    pvt_v2,
    twins,
    vision_transformer,
)
from torch import nn

TABLE = ("attention_biases",)
MULTI_SCALE = partial(mvitv2.MultiScaleAttention, 8, 8, (4, 4), 2, kernel_kv=(3, 3), stride_kv=(2, 2))


def angles(trigonometric):
    """Sines or cosines for six tokens, four channels: two for rows, two for columns."""

    def embedding():
        torch.manual_seed(5)
        return trigonometric(torch.randn(2, 6, 4, dtype=torch.float64))

    return embedding


def padding(tokens, padded):
    """A mask that keeps the last tokens of the first of two images from every query."""

    def mask():
        found = torch.zeros(2, 1, 1, tokens, dtype=torch.float64)
        found[0, ..., tokens - padded :] = -torch.inf
        return found

    return mask


APART = {
    "twins global": Kind(lambda: twins.GlobalSubSampleAttn(8, 2, sr_ratio=2), (2, 24, 8), 6, {"size": sized((4, 6))}),
    "pvt reduced": Kind(lambda: pvt_v2.Attention(8, 2, sr_ratio=2), (2, 24, 8), 6, {"feat_size": sized((4, 6))}),
    "pvt linear": Kind(lambda: pvt_v2.Attention(8, 2, linear_attn=True), (2, 63, 8), 49, {"feat_size": sized((9, 7))}),
    "nextvit": Kind(lambda: nextvit.EfficientAttention(8, head_dim=4, sr_ratio=2), (2, 24, 8), 6),
    "multi query": Kind(lambda: MultiQueryAttention2d(8, 12, 2, key_dim=6, value_dim=5, kv_stride=2), (2, 8, 4, 6), 6),
    "multi query same": Kind(lambda: MultiQueryAttention2d(8, num_heads=2, use_bias=True), (2, 8, 2, 3), 6),
    "multi query pooled": Kind(
        lambda: MultiQueryAttention2d(8, num_heads=2, query_strides=2, kv_stride=2, padding="same"), (2, 8, 8, 12), 24
    ),
    "multi query v2": Kind(lambda: MultiQueryAttentionV2(8, 12, 2, 6, 5), (2, 8, 4, 6), 6, {"m": (2, 8, 2, 3)}),
    "multi scale": Kind(
        lambda: MULTI_SCALE(has_cls_token=False), (2, 16, 8), 4, {"feat_size": sized([4, 4])}, ("rel",)
    ),
    "multi scale pooled": Kind(
        lambda: MULTI_SCALE(kernel_q=(3, 3), stride_q=(2, 2), residual_pooling=False),
        (2, 17, 8),
        5,
        {"feat_size": sized([4, 4])},
        ("rel",),
    ),
    "multi scale mean": Kind(
        lambda: MULTI_SCALE(mode="avg", rel_pos_type="none"), (2, 17, 8), 5, {"feat_size": sized([4, 4])}
    ),
    "levit down": Kind(lambda: levit.AttentionDownsample(8, 12, 4, 2, resolution=(3, 4)), (2, 12, 8), 12, {}, TABLE),
    "levit down conv": Kind(
        lambda: levit.AttentionDownsample(8, 12, 4, 2, resolution=(3, 4), use_conv=True), (2, 8, 3, 4), 12, {}, TABLE
    ),
    "efficientformer v2 down": Kind(
        lambda: efficientformer_v2.Attention2dDownsample(8, 4, 2, 2, (3, 4), 12), (2, 8, 3, 4), 12, {}, TABLE
    ),
    "hiera pooled": Kind(lambda: hiera.MaskUnitAttention(8, 12, 2, q_stride=2), (2, 12, 8), 12),
    "hiera units pooled": Kind(
        lambda: hiera.MaskUnitAttention(8, 8, 2, q_stride=2, window_size=3, use_mask_unit_attn=True), (2, 18, 8), 6
    ),
    "sam 2 pooled": Kind(lambda: hieradet_sam2.MultiScaleAttention(8, 12, 2, nn.MaxPool2d(2, 2)), (2, 4, 6, 8), 24),
    "halo": Kind(lambda: HaloAttn(8, 12, num_heads=2, block_size=2, halo_size=1), (2, 8, 4, 6), 16, {}, ("pos_embed",)),
    "halo strided": Kind(
        lambda: HaloAttn(8, stride=2, num_heads=2, block_size=4, halo_size=1, scale_pos_embed=True),
        (2, 8, 4, 8),
        36,
        {},
        ("pos_embed",),
    ),
    "halo pooled": Kind(
        lambda: HaloAttn(8, stride=2, num_heads=2, block_size=2, halo_size=1, avg_down=True),
        (2, 8, 4, 4),
        16,
        {},
        ("pos_embed",),
    ),
    "lowformer": Kind(lambda: lowformer.ConvAttention(60, att_stride=2, att_kernel=5), (2, 60, 5, 6), 9),
    "lowformer fused": Kind(
        lambda: lowformer.ConvAttention(60, att_stride=1, att_kernel=3, fuse_out_proj=True), (2, 60, 2, 3), 6
    ),
    "cpubone": Kind(
        lambda: cpubone.ConvAttention(60, att_stride=2, small_kernels=True, upsample_mode="nearest"), (2, 60, 5, 6), 9
    ),
    "cascaded": Kind(
        lambda: efficientvit_msra.CascadedGroupAttention(12, 4, 3, 1, 3, (3, 3, 5)), (2, 12, 3, 3), 9, {}, TABLE
    ),
    "efficientformer v2": Kind(lambda: efficientformer_v2.Attention2d(8, 4, 2, 2, (2, 3)), (2, 8, 2, 3), 6, {}, TABLE),
    "efficientformer v2 strided": Kind(
        lambda: efficientformer_v2.Attention2d(8, 4, 2, 2, (4, 6), stride=2), (2, 8, 4, 6), 6, {}, TABLE
    ),
    "parallel": Kind(
        lambda: vision_transformer.ParallelScalingBlock(8, 2, qk_norm=True, init_values=0.1), (2, 7, 8), 7
    ),
    "parallel fused": Kind(
        lambda: vision_transformer.ParallelScalingBlock(8, 2, qkv_bias=True, fuse_out_proj=True), (2, 7, 8), 7
    ),
    "difference": Kind(lambda: DiffAttention(8, 2, qk_norm=True, scale_norm=True, norm_layer=NORM), (2, 7, 8), 7),
    "difference dual": Kind(lambda: DiffAttention(8, 2, dual_lambda=True, depth=3), (2, 7, 8), 7),
    "gemma": Kind(
        lambda: gemma4_vit.Gemma4Attention(8, 4, 4, num_kv_heads=2),
        (2, 6, 8),
        6,
        {"rope_cos": angles(torch.cos), "rope_sin": angles(torch.sin)},
    ),
    "gemma padded": Kind(
        lambda: gemma4_vit.Gemma4Attention(8, 2, 4),
        (2, 6, 8),
        6,
        {"rope_cos": angles(torch.cos), "rope_sin": angles(torch.sin), "attn_mask": padding(6, 2)},
    ),
}
