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
        "pools before it projects, which timm itself cannot compute", "timm.models.mvitv2:MultiScaleAttentionPoolFirst"
    ),
    Refusal("pools in three dimensions", "torchvision.models.video.mvit:MultiscaleAttention"),
    Refusal("weighs a window by a projection of its centre, without keys", "timm.models.volo:OutlookAttention"),
    Refusal("is a convolution in groups, without scores", "timm.models.nextvit:ConvAttention"),
    Refusal("has windows in three dimensions", "torchvision.models.video.swin_transformer:ShiftedWindowAttention3d"),
)
