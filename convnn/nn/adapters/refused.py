"""What is called attention, but cannot be replaced, and why."""

from __future__ import annotations

from convnn.nn.adapters.base import Refusal

ADAPTERS = (
    Refusal(
        "attends among channels, not tokens",
        "timm.models.xcit:XCA",
        "timm.models.edgenext:CrossCovarianceAttn",
        "timm.models.davit:ChannelAttention",
        "timm.models.davit:ChannelAttentionV2",
    ),
    Refusal(
        "has no scores of pairs of tokens (linear attention)",
        "timm.models.mobilevit:LinearSelfAttention",
        "timm.models.coat:FactorAttnConvRelPosEnc",
        "timm.models.swiftformer:EfficientAdditiveAttention",
        "timm.models.efficientvit_mit:LiteMLA",
    ),
    Refusal(
        "has one query, the class token's, or learned ones",
        "timm.models.cait:ClassAttn",
        "timm.models.volo:ClassAttention",
        "timm.models.crossvit:CrossAttention",
        "timm.layers.attention_pool:AttentionPoolLatent",
        "timm.layers.attention_pool:AttentionPoolPrr",
        "timm.layers.attention_pool2d:RotAttentionPool2d",
        "timm.layers.attention_pool2d:AttentionPool2d",
    ),
    Refusal(
        "has keys of a coarser map than its queries",
        "timm.models.twins:GlobalSubSampleAttn",
        "timm.models.nextvit:EfficientAttention",
        "timm.models.mvitv2:MultiScaleAttention",
        "timm.models.mvitv2:MultiScaleAttentionPoolFirst",
        "torchvision.models.video.mvit:MultiscaleAttention",
        "timm.layers.attention2d:MultiQueryAttention2d",
        "timm.layers.attention2d:MultiQueryAttentionV2",
    ),
    Refusal(
        "makes a coarser map: its queries are fewer than the tokens",
        "timm.models.levit:AttentionDownsample",
        "timm.models.efficientformer_v2:Attention2dDownsample",
    ),
    Refusal("weighs a window by a projection of its centre, without keys", "timm.models.volo:OutlookAttention"),
    Refusal("subtracts one attention from another", "timm.layers.diff_attention:DiffAttention"),
    Refusal(
        "feeds each head with the output of the one before", "timm.models.efficientvit_msra:CascadedGroupAttention"
    ),
    Refusal("convolves weights or values between its heads", "timm.models.efficientformer_v2:Attention2d"),
    Refusal("sees a halo around each block of queries", "timm.layers.halo_attn:HaloAttn"),
    Refusal(
        "is computed with the block's MLP in one projection", "timm.models.vision_transformer:ParallelScalingBlock"
    ),
    Refusal(
        "convolves around its attention, in an order of its own",
        "timm.models.lowformer:ConvAttention",
        "timm.models.cpubone:ConvAttention",
        "timm.models.nextvit:ConvAttention",
    ),
    Refusal("gets a mask of padded patches with every call", "timm.models.gemma4_vit:Gemma4Attention"),
    Refusal("has windows in three dimensions", "torchvision.models.video.swin_transformer:ShiftedWindowAttention3d"),
)
