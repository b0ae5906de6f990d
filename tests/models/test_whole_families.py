"""Whole models of each family: the same logits before and after a swap of all their attention, and back."""

import copy
from functools import partial

import pytest
import timm
import torch
from comparing import TOLERANCE
from timm.layers.diff_attention import DiffAttention
from timm.models import mvitv2
from timm.models.vision_transformer import ParallelScalingBlock
from torch import nn
from torchvision import models as tv
from torchvision.models import swin_transformer

from convnn import export_layers, neighbor_layers, neighbors_of, swap_layers
from convnn.models.cost import forward_cost
from convnn.models.coverage import stir

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2)}
FAMILIES = {
    "vit_tiny_patch16_224": (SMALL, 32, 17),
    "eva02_tiny_patch14_224": (SMALL, 32, 17),
    "vit_small_patch16_dinov3": (SMALL | {"num_reg_tokens": 4}, 32, 21),
    "vit_pe_core_tiny_patch16_384": (SMALL, 32, 17),
    "beit_base_patch16_224": (SMALL, 32, 17),
    "vit_relpos_small_patch16_224": (SMALL, 32, 16),
    "vit_relpos_base_patch16_rpn_224": (SMALL | {"shared_rel_pos": True}, 32, 16),
    "vit_srelpos_small_patch16_224": (SMALL, 32, 16),
    "swin_tiny_patch4_window7_224": (SWIN, 64, 16),
    "swinv2_tiny_window8_256": (SWIN, 64, 16),
    "swinv2_cr_tiny_224": (SWIN | {"img_size": 64, "window_size": 4}, 64, 16),
}


def close_logits(a, b, x):
    with torch.no_grad():
        mine, theirs = a(x), b(x)
    scale = theirs.abs().max().clamp_min(1)
    assert (mine - theirs).abs().max() / scale < TOLERANCE


def random(model):
    """Values that are not those of a fresh model, whose tables and biases are zeros."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):  # zeros in some
            nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            nn.init.normal_(parameter, std=0.1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 1.5)
    return model.double().eval()


def swapped(plain, k, **settings):
    model = copy.deepcopy(plain)
    report = swap_layers(model, "*", {"kind": "attention", "k": k, "aggregation": "sum"} | settings, init="transfer")
    return model, report


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_stay_and_the_model_comes_back(name):
    kwargs, side, tokens = FAMILIES[name]
    plain = random(timm.create_model(name, num_classes=5, **kwargs))
    x = torch.randn(2, 3, side, side, dtype=torch.float64)
    model, report = swapped(plain, tokens, aggregation="depthwise", k_policy="clamp")
    assert len(report) >= 2
    close_logits(model, plain, x)
    few, _ = swapped(plain, 4)
    assert len(export_layers(model)) == len(report) and not neighbor_layers(model)
    close_logits(model, plain, x)
    with torch.no_grad():
        assert (few(x) - plain(x)).abs().max() > 1e-6
    found = neighbors_of(few, x)
    assert len(found) == len(report) and all(n.index.shape[-1] == 4 for n in found.values())
    few, report = swapped(plain.float(), 4)
    cost = forward_cost(few, 3, side, [row.name for row in report.rows])
    assert all(row.flops_before > 0 and row.flops_after > 0 for row in report.with_costs(cost).rows)
    model.load_state_dict(plain.state_dict())


TORCHVISION = {
    "vit": (lambda: tv.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5), 32, 17),
    "swin": (lambda: tv.SwinTransformer([4, 4], 8, [2, 2], [1, 2], [4, 4], num_classes=5), 48, 16),
    "swin v2": (
        lambda: tv.SwinTransformer(
            [4, 4],
            8,
            [2, 2],
            [1, 2],
            [4, 4],
            num_classes=5,
            block=swin_transformer.SwinTransformerBlockV2,
            downsample_layer=swin_transformer.PatchMergingV2,
        ),
        48,
        16,
    ),
    "maxvit": (lambda: tv.MaxVit((64, 64), 8, 4, [8, 16], [1, 1], 8, 0.0, num_classes=5), 64, 16),
}


@pytest.mark.long
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_logits_stay(name):
    make, side, tokens = TORCHVISION[name]
    plain = random(make())
    model, report = swapped(plain, tokens, k_policy="clamp")
    x = torch.randn(2, 3, side, side, dtype=torch.float64)
    assert len(report) >= 2
    close_logits(model, plain, x)


SMALL_EACH = {"depths": (1, 1, 1, 1), "embed_dims": (8, 8, 8, 8), "num_heads": (1, 1, 1, 1)}
OTHERS = {
    "cait_xxs24_224": ({**SMALL, "depth_token_only": 1}, 32, 1),
    "tnt_s_patch16_224": (
        {"img_size": 32, "embed_dim": 16, "inner_dim": 8, "depth": 2, "num_heads_inner": 2, "num_heads_outer": 2},
        32,
        0,
    ),
    "hiera_tiny_224": ({"img_size": 64, "embed_dim": 16, "stages": (1, 1, 1, 1)}, 64, 0),
    "samvit_base_patch16": ({**SMALL, "img_size": 64, "window_size": 3, "global_attn_indexes": (1,)}, 64, 0),
    "twins_svt_small": ({**SMALL_EACH, "depths": (1, 2, 1, 1)}, 64, 0),
    "davit_tiny": (SMALL_EACH, 64, 4),
}


@pytest.mark.long
@pytest.mark.parametrize("name", OTHERS)
def test_logits_of_other_families_stay(name):
    kwargs, side, left = OTHERS[name]
    plain = random(timm.create_model(name, num_classes=5, **kwargs))
    model, report = swapped(plain, 1024, k_policy="clamp")
    assert len(report) >= 1 and len(report.left) == left
    x = torch.randn(2, 3, side, side, dtype=torch.float64)
    close_logits(model, plain, x)
    few, _ = swapped(plain, 2)
    with torch.no_grad():
        assert (few(x) - plain(x)).abs().max() > 1e-6


MULTI_SCALE = {"depths": (1, 1, 1, 1), "embed_dim": 8, "num_heads": 1}


def multi_scale(**config):
    """A small MViT v2."""
    return mvitv2.MultiScaleVit(mvitv2.MultiScaleVitCfg(**MULTI_SCALE, **config), img_size=(64, 64), num_classes=5)


APART = {  # image size, layers replaced, layers left
    "vit in parallel": (
        partial(timm.create_model, "vit_tiny_patch16_224", block_fn=ParallelScalingBlock, **SMALL),
        32,
        2,
        0,
    ),
    "vit of differences": (
        partial(timm.create_model, "vit_tiny_patch16_224", attn_layer=DiffAttention, **SMALL),
        32,
        2,
        0,
    ),
    "gemma": (
        partial(timm.create_model, "gemma4_vit_167m", img_size=96, depth=2, embed_dim=32, num_heads=2, head_dim=16),
        96,
        2,
        0,
    ),
    "mvit": (multi_scale, 64, 4, 0),
    "mvit with a class token": (partial(multi_scale, use_cls_token=True), 64, 4, 0),
    "twins": (partial(timm.create_model, "twins_pcpvt_small", **SMALL_EACH), 64, 4, 0),
    "pvt": (partial(timm.create_model, "pvt_v2_b0", **SMALL_EACH), 64, 4, 0),
    "nextvit": (partial(timm.create_model, "nextvit_small"), 64, 4, 20),
    "lowformer": (partial(timm.create_model, "lowformer_b0"), 64, 7, 0),
    "cpubone": (partial(timm.create_model, "cpubone_nano"), 64, 3, 0),
    "efficientvit": (partial(timm.create_model, "efficientvit_m0", img_size=128), 128, 6, 0),
    "efficientformer v2": (partial(timm.create_model, "efficientformerv2_s0", img_size=96), 96, 5, 0),
    "mobilenet": (partial(timm.create_model, "mobilenetv4_hybrid_medium_075"), 64, 8, 0),
    "levit": (partial(timm.create_model, "levit_128s", img_size=96), 96, 11, 0),
    "halonet": (partial(timm.create_model, "halonet26t"), 256, 3, 0),
}


@pytest.mark.long
@pytest.mark.parametrize("name", APART)
def test_logits_stay_where_queries_and_keys_are_on_maps_of_their_own(name):
    make, side, replaced, left = APART[name]
    # Next-ViT's random features grow until the best score is all that counts.
    plain = stir(make()).double().eval() if name == "nextvit" else random(make())
    model, report = swapped(plain, 4096, k_policy="clamp")
    assert (len(report), len(report.left)) == (replaced, left)
    x = torch.randn(1, 3, side, side, dtype=torch.float64)
    close_logits(model, plain, x)
    few, _ = swapped(plain, 2, k_policy="clamp")
    with torch.no_grad():
        assert (few(x) - plain(x)).abs().max() > 1e-6
    found = neighbors_of(few, x)
    assert len(found) == replaced and any(n.index.shape[-1] == 2 for n in found.values())
    few, report = swapped(plain.float(), 2, k_policy="clamp")
    cost = forward_cost(few, 3, side, [row.name for row in report.rows])
    assert all(row.flops_before > 0 and row.flops_after > 0 for row in report.with_costs(cost).rows)
