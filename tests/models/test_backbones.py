"""Backbones: small stems, patches, and errors that name the key."""

import math
import socket
import sys
import time

import pytest
import timm
import torch
from helpers import tiny
from huggingface_hub import is_offline_mode
from torch import nn

from convnn import ConvNNAttention
from convnn.config.schema import BackboneConfig
from convnn.data.splits import Dataset, Split
from convnn.errors import ConfigError, WeightsError
from convnn.models.backbones import create_backbone
from convnn.models.build import build_model


def test_small_stem_keeps_the_resolution():
    for name in ("resnet18", "resnet50"):
        model = create_backbone(BackboneConfig(name=name, stem="small"), 10, 3, 32)
        assert model.conv1.stride == (1, 1) and model.conv1.kernel_size == (3, 3)
        features = model.forward_features(torch.zeros(1, 3, 32, 32))
        assert features.shape[-2:] == (4, 4)
    assert create_backbone(BackboneConfig(), 10, 1, 8).conv1.kernel_size == (7, 7)
    with pytest.raises(ConfigError, match=r"backbone.stem=small fits ResNets .*, not vgg11"):
        create_backbone(BackboneConfig(name="vgg11", stem="small"), 10)


def test_the_stem_follows_the_images():
    config = BackboneConfig(name="resnet18", stem="auto")
    assert create_backbone(config, 10, 3, 63).conv1.stride == (1, 1)
    assert create_backbone(config, 10, 3, 64).conv1.stride == (2, 2)


def test_default_backbone_is_timms():
    config = BackboneConfig(name="resnet18")
    torch.manual_seed(0)
    ours = create_backbone(config, 7)
    torch.manual_seed(0)
    theirs = timm.create_model("resnet18", num_classes=7)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_vit_for_small_images():
    model = create_backbone(BackboneConfig(name="vit_tiny_patch16_224", patch_size=4), 10, 3, 32)
    assert model.patch_embed.grid_size == (8, 8) and model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_the_papers_vit():
    """Positions along the sequence by hand, torch's initial spread, and its epsilon."""
    kwargs = {"depth": 1, "num_heads": 1, "embed_norm_layer": "layernorm"}
    options = {"pos_embed": "sincos1d", "init": "torch", "norm_eps": 1e-5, "kwargs": kwargs}
    model = create_backbone(BackboneConfig(name="vit_tiny_patch16_224", **options), 10, 3, 224)
    table = model.pos_embed[0]
    assert not model.pos_embed.requires_grad and table.shape == (197, 192)
    for place, channel in ((0, 0), (0, 1), (1, 0), (196, 7), (50, 190)):
        angle = place / 10000 ** (channel // 2 * 2 / 192)
        assert abs(table[place, channel] - (math.cos if channel % 2 else math.sin)(angle)) < 1e-5
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    for linear in (m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features > 100):
        assert abs(linear.weight.std() * math.sqrt(3 * linear.in_features) - 1) < 0.02
    assert 0.8 < model.cls_token.std() < 1.2


def test_torchs_initial_weights_reach_the_layers_that_were_swapped_in():
    dataset = Dataset(*[Split(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.arange(2))] * 2, ["a", "b"])
    for init, spread in (("timm", 0.02), ("torch", 1 / math.sqrt(3 * 192))):
        config = tiny(f"backbone.init={init}", "backbone.kwargs.embed_dim=192", vit=True)
        layer = build_model(config, dataset)[0].blocks[0].attn
        assert isinstance(layer, ConvNNAttention) and abs(layer.qkv.weight.std() / spread - 1) < 0.05


@pytest.mark.parametrize(
    "change, message",
    [
        ({"init": "torch", "pretrained": True}, "init=torch would draw anew what backbone.pretrained loads"),
        ({"init": "torch", "kwargs": {"checkpoint_path": "w.pt"}}, "what backbone.kwargs.checkpoint_path loads"),
        ({"norm_eps": 1e-5}, "resnet18 has no LayerNorm"),
        ({"name": "samvit_base_patch16", "pos_embed": "sincos1d"}, "pos_embed=sincos1d fits .* positions, not"),
        ({"name": "vit_tiny_patch16_224", "pos_embed": "sincos", "kwargs": {"embed_dim": 18}}, "a multiple of 4"),
    ],
)
def test_starts_that_cannot_be(change, message):
    with pytest.raises(ConfigError, match=message) as error:
        create_backbone(BackboneConfig(**({"name": "resnet18"} | change)), 10, 3, 64)
    assert "\n" not in str(error.value)


def test_other_operators_keep_a_start_of_their_own():
    dataset = Dataset(*[Split(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.arange(2))] * 2, ["a", "b"])
    layer = build_model(tiny("backbone.init=torch", "operator=convit", vit=True), dataset)[0].blocks[0].attn
    assert torch.equal(layer.pos_proj.weight[:, 2], torch.full_like(layer.pos_proj.weight[:, 2], -1))


def test_sincos_positions_are_fixed_and_zero_for_cls():
    kwargs = {"num_heads": 1, "qkv_bias": False, "pre_norm": True, "final_norm": False}
    config = BackboneConfig("vit_tiny_patch16_224", patch_size=16, pos_embed="sincos", kwargs=kwargs)
    model = create_backbone(config, 10, 3, 224)
    assert not model.pos_embed.requires_grad and (model.pos_embed[:, 0] == 0).all()
    assert model.pos_embed[:, 1:].std() > 0.3
    # The paper's 5,479,306 has no bias in the output projections (12 x 192) and one in the patch embedding (192).
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 5_479_306 + 12 * 192 - 192


@pytest.mark.parametrize(
    "config, size, message",
    [
        (BackboneConfig("resnet81"), 32, "did you mean 'resnet"),
        (BackboneConfig("vit_tiny_patch16_224", patch_size=4), 33, "4-pixel patches .* do not divide .* 33"),
        (BackboneConfig("vit_tiny_patch16_224", kwargs={"num_heads": 5}), 224, "num_heads"),
        (BackboneConfig("resnet18", kwargs={"nonsense": 1}), 32, "nonsense"),
        (BackboneConfig("resnet18", patch_size=4), 32, "patch_size"),
        (BackboneConfig("resnet18", module="no_such_module"), 32, "backbone.module=no_such_module"),
        (BackboneConfig("resnet18", pos_embed="sincos"), 32, "fits ViTs"),
        (BackboneConfig("resnet18.bogus"), 32, r"no pretrained weights 'bogus'; known: a1_in1k, a2_in1k"),
        (BackboneConfig("resnet18.a1_in1"), 32, r"did you mean 'resnet18\.a1_in1k'"),
        (BackboneConfig("vit_tiny_patch16_224."), 32, "is not a timm model|no pretrained weights"),
        (BackboneConfig("hf_hub:timm/resnet18.a1_in1k"), 32, r"set backbone.name=resnet18.a1_in1k .*pretrained=true"),
        (BackboneConfig("hf-hub:timm/vit_tiny_patch16_224"), 32, r"set backbone.name=vit_tiny_patch16_224 "),
        (BackboneConfig("local-dir:/weights/mine"), 32, "backbone.checkpoint=FILE"),
        (BackboneConfig("resnet18", kwargs={"num_classes": 5}), 32, "kwargs.num_classes=5: the data has 10 classes"),
        (BackboneConfig("resnet18", kwargs={"in_chans": 1}), 32, "the images have 3 channels"),
        (BackboneConfig("resnet18", kwargs={"features_only": True}), 32, "return feature maps, not logits"),
        (BackboneConfig("resnet18", kwargs={"pretrained": True}), 32, "set backbone.pretrained"),
    ],
)
def test_errors_name_the_key(config, size, message):
    with pytest.raises(ConfigError, match=message) as error:
        create_backbone(config, 10, 3, size)
    assert "\n" not in str(error.value)


def test_what_agrees_with_the_data_may_be_given():
    kwargs = {"num_classes": 7, "in_chans": 1, "features_only": False}
    model = create_backbone(BackboneConfig("resnet18.a1_in1k", kwargs=kwargs), 7, 1)
    assert model.eval()(torch.zeros(1, 1, 32, 32)).shape == (1, 7)


def test_pretrained_without_a_network_says_so(monkeypatch, tmp_path):
    for name in ("HF_HOME", "TORCH_HOME"):
        monkeypatch.setenv(name, str(tmp_path))

    def offline(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("timm.models._builder.load_pretrained", offline)
    with pytest.raises(ConfigError, match=r"backbone.pretrained=true: the weights of resnet18 could not be loaded"):
        create_backbone(BackboneConfig(pretrained=True), 10)


def test_pretrained_answers_in_seconds_where_nothing_does(monkeypatch, tmp_path):
    """A server that takes a connection and then says nothing, as behind a firewall."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr("convnn.models.download.SECONDS", 0.5)
        start = time.monotonic()
        with pytest.raises(
            WeightsError, match=r"no answer .*give a file of them with backbone.checkpoint=FILE"
        ) as told:
            create_backbone(BackboneConfig(pretrained=True), 10)
    assert time.monotonic() - start < 5 and "\n" not in str(told.value)


def test_weights_that_were_kept_need_no_answer(monkeypatch, tmp_path):
    found = []
    monkeypatch.setattr("convnn.models.download._silence", lambda place: "no route")
    monkeypatch.setattr("convnn.models.download.try_to_load_from_cache", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *_, **__: found.append(is_offline_mode()))
    create_backbone(BackboneConfig(pretrained=True), 10)
    assert found == [True] and not is_offline_mode()


def test_a_users_own_backbone_is_one_file(tmp_path, monkeypatch):
    (tmp_path / "my_backbone.py").write_text(
        "from timm.models import register_model\nfrom torch import nn\n\n\n"
        "@register_model\n"
        "def two_convs(pretrained=False, num_classes=10, in_chans=3, drop_rate=0.0, **kwargs):\n"
        "    body = nn.Sequential(nn.Conv2d(in_chans, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))\n"
        "    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = create_backbone(BackboneConfig("two_convs", module="my_backbone"), 4)
    assert isinstance(model, nn.Sequential) and model(torch.zeros(1, 3, 8, 8)).shape == (1, 4)
    sys.modules.pop("my_backbone")
