"""A file of weights in a network: names of timm, torchvision and Hugging Face, other sizes, and what does not fit."""

import re

import pytest
import timm
import torch
import torchvision
from helpers import equal_states
from safetensors.torch import save_file

from convnn.config.schema import BackboneConfig
from convnn.errors import ConfigError, WeightsError
from convnn.models.backbones import create_backbone

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
RESNET = {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]}


def seeded(name, **kwargs):
    """A timm model no weight of which stands at its start."""
    torch.manual_seed(3)
    model = timm.create_model(name, **kwargs).eval()
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.add_(torch.rand_like(value) / 2)
    return model


def vit(name="vit_tiny_patch16_224", **kwargs):
    return seeded(name, **(VIT | kwargs))


def begun(file, name="vit_tiny_patch16_224", classes=5, in_chans=3, image_size=32, **kwargs):
    small = {key: value for key, value in VIT.items() if key not in ("img_size", "num_classes")}
    config = BackboneConfig(
        name, checkpoint=str(file), kwargs=(small if "vit" in name or "deit" in name else {}) | kwargs
    )
    return create_backbone(config, classes, in_chans, image_size).eval()


def same_logits(a, b, side=32, channels=3, atol=1e-6):
    images = torch.randn(2, channels, side, side)
    with torch.no_grad():
        return torch.allclose(a(images), b(images), atol=atol)


WRAPPERS = {
    "plain.pt": lambda state: state,
    "hub.bin": lambda state: state,
    "training.pth": lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3},
    "model.pt": lambda state: {"model": state, "optimizer": {"state": {}}, "model_ema": None},
    "lightning.ckpt": lambda state: {"state_dict": {f"model.{k}": v for k, v in state.items()}},
    "compiled.pt": lambda state: {"_orig_mod." + k: v for k, v in state.items()},
    "averaged.pt": lambda state: {"state_dict": {k: v * 0 for k, v in state.items()}, "model_ema": state},
}


@pytest.mark.parametrize("file", WRAPPERS)
def test_weights_of_timm_in_every_wrapper(tmp_path, file):
    source = vit()
    torch.save(WRAPPERS[file](source.state_dict()), tmp_path / file)
    assert equal_states(begun(tmp_path / file).state_dict(), source.state_dict())


def test_safetensors_of_the_hub(tmp_path):
    source = vit("vit_tiny_patch16_224")
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    assert equal_states(begun(tmp_path / "model.safetensors").state_dict(), source.state_dict())
    wrapped = {f"timm_model.{name}": value for name, value in source.state_dict().items()}
    save_file(wrapped, tmp_path / "wrapped.safetensors")
    assert equal_states(begun(tmp_path / "wrapped.safetensors").state_dict(), source.state_dict())


# ------------------------------------------------------------------------------------------ torchvision's own models


def test_a_vit_of_torchvision_has_the_same_logits(tmp_path):
    torch.manual_seed(0)
    source = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=3, hidden_dim=24, mlp_dim=96, num_classes=5
    ).eval()
    for parameter in source.parameters():
        parameter.data += torch.randn_like(parameter) / 5
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    assert same_logits(source, begun(tmp_path / "vit.pth"), atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_a_resnet_of_torchvision_has_the_same_logits(tmp_path, name):
    torch.manual_seed(0)
    source = getattr(torchvision.models, name)(num_classes=4).eval()
    for module in source.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    torch.save(source.state_dict(), tmp_path / "resnet.pth")
    ours = begun(tmp_path / "resnet.pth", name, classes=4, image_size=64)
    images = torch.randn(1, 3, 64, 64)
    assert torch.allclose(source(images), ours(images), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------ Hugging Face: timm's weights under its names


def hf_resnet(state):
    """timm's ResNet as transformers' ResNetForImageClassification names it."""
    out = {}
    for name, value in state.items():
        part, _, leaf = name.rpartition(".")
        if part == "conv1":
            new = "resnet.embedder.embedder.convolution"
        elif part == "bn1":
            new = "resnet.embedder.embedder.normalization"
        elif part == "fc":
            new = "classifier.1"
        else:
            layer, block, rest = part.split(".", 2)
            new = f"resnet.encoder.stages.{int(layer[5:]) - 1}.layers.{block}."
            if rest.startswith("downsample"):
                new += "shortcut." + ("convolution" if rest.endswith("0") else "normalization")
            else:
                new += f"layer.{int(rest[-1]) - 1}." + ("convolution" if rest.startswith("conv") else "normalization")
        out[f"{new}.{leaf}"] = value
    return out


def hf_vit(state, prefix="vit", dino=False):
    """timm's ViT as transformers' ViTForImageClassification names it, or its Dinov2 ones."""
    at, out = f"{prefix}.encoder.layer.", {f"{prefix}.embeddings.mask_token": torch.zeros(1, 24)}
    whole = {
        "cls_token": "embeddings.cls_token",
        "dist_token": "embeddings.distillation_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
        "norm.weight": "layernorm.weight",
        "norm.bias": "layernorm.bias",
    }
    inner = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense"}
    inner |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    if dino:
        inner |= {"norm1": "norm1", "norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    heads = {"head": "cls_classifier" if prefix == "deit" else "classifier", "head_dist": "distillation_classifier"}
    for name, value in state.items():
        part, _, leaf = name.rpartition(".")
        if name in whole:
            out[f"{prefix}.{whole[name]}"] = value
        elif part in heads:
            out[f"{heads[part]}.{leaf}"] = value
        elif name.startswith("blocks."):
            _, number, what = part.split(".", 2)
            if what == "attn.qkv":
                for word, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    out[f"{at}{number}.attention.attention.{word}.{leaf}"] = third
            elif what in ("ls1", "ls2"):
                out[f"{at}{number}.layer_scale{what[2]}.lambda1"] = value
            else:
                out[f"{at}{number}.{inner[what]}.{leaf}"] = value
    return out


def test_a_resnet_under_the_names_of_hugging_face(tmp_path):
    for name in ("resnet18", "resnet50"):
        source = seeded(name, num_classes=4, **RESNET)
        save_file(hf_resnet(source.state_dict()), tmp_path / "model.safetensors")
        ours = begun(tmp_path / "model.safetensors", name, classes=4, **RESNET)
        assert equal_states(ours.state_dict(), source.state_dict())


@pytest.mark.parametrize("name, prefix", [("vit_tiny_patch16_224", "vit"), ("deit_tiny_distilled_patch16_224", "deit")])
def test_a_vit_under_the_names_of_hugging_face(tmp_path, name, prefix):
    source = vit(name)
    state = hf_vit(source.state_dict(), prefix) | {f"{prefix}.pooler.dense.weight": torch.zeros(24, 24)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert equal_states(begun(tmp_path / "pytorch_model.bin", name).state_dict(), source.state_dict())


def test_a_vit_without_a_classifier_and_prefix(tmp_path):
    state = hf_vit(vit().state_dict())
    state = {name.removeprefix("vit."): value for name, value in state.items() if not name.startswith("classifier")}
    torch.save(state, tmp_path / "pytorch_model.bin")
    ours = begun(tmp_path / "pytorch_model.bin")
    assert torch.equal(ours.blocks[1].attn.qkv.weight, vit().blocks[1].attn.qkv.weight)
    assert ours.pretrained_cfg["num_classes"] is None


@pytest.mark.parametrize("registers", [False, True])
def test_dinov2_under_the_names_of_hugging_face(tmp_path, registers):
    name = "vit_small_patch14_reg4_dinov2" if registers else "vit_small_patch14_dinov2"
    source = vit(name)
    state = hf_vit(source.state_dict(), "dinov2_with_registers" if registers else "dinov2", dino=True)
    if registers:  # there positions are of CLS and patches, here of patches alone
        at = "dinov2_with_registers.embeddings."
        position = torch.randn(1, 1, 24)
        state[f"{at}position_embeddings"] = torch.cat([position, source.pos_embed], 1)
        state[f"{at}cls_token"] = source.cls_token - position
        state[f"{at}register_tokens"] = source.reg_token
    state["classifier.weight"], state["classifier.bias"] = torch.zeros(5, 48), torch.zeros(5)  # of CLS and patches
    torch.save(state, tmp_path / "m.bin")
    ours = begun(tmp_path / "m.bin", name)
    assert ours.pretrained_cfg["num_classes"] is None
    for key, value in source.state_dict().items():
        assert key.startswith("head.") or torch.allclose(ours.state_dict()[key], value, atol=1e-6), key


# ------------------------------------------------------------------------------- other sizes, channels and classes


def test_other_image_and_patch_sizes_are_timms(tmp_path):
    source = vit()
    torch.save(source.state_dict(), tmp_path / "w.pt")
    larger, coarser = begun(tmp_path / "w.pt", image_size=48), begun(tmp_path / "w.pt", image_size=64, patch_size=16)
    assert larger.pos_embed.shape == (1, 37, 24) and coarser.patch_embed.proj.weight.shape[-1] == 16
    source.set_input_size((48, 48))
    assert torch.allclose(larger.pos_embed, source.pos_embed, atol=1e-6)


def test_images_of_one_channel(tmp_path):
    source = seeded("resnet18", num_classes=4, **RESNET)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    ours = begun(tmp_path / "w.pt", "resnet18", classes=4, in_chans=1, **RESNET)
    gray = torch.randn(1, 1, 64, 64)
    assert torch.allclose(ours(gray), source(gray.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


def test_a_classifier_of_other_classes_begins_anew(tmp_path):
    source = vit()
    torch.save(source.state_dict(), tmp_path / "w.pt")
    same, other = begun(tmp_path / "w.pt"), begun(tmp_path / "w.pt", classes=7)
    assert torch.equal(same.head.weight, source.head.weight) and same.pretrained_cfg["num_classes"] == 5
    assert other.head.weight.shape == (7, 24) and other.pretrained_cfg["num_classes"] is None
    assert torch.equal(other.norm.weight, source.norm.weight)


def changed(change):
    state = vit().state_dict()
    change(state)
    return state


MISFITS = [
    (lambda s: s.pop("norm.weight"), "lacks norm.weight$"),
    (lambda s: s.update({"extra.a": torch.zeros(1)}), "has unknown extra.a$"),
    (
        lambda s: s.update({"norm.weight": torch.zeros(3)}),
        r"has another shape of norm.weight \(3,\) instead of \(24,\)$",
    ),
    (lambda s: [s.pop(k) for k in list(s) if "mlp.fc1" in k], "lacks .*fc1.weight, .*fc1.bias, .* and 1 more$"),
]


@pytest.mark.parametrize("change, message", MISFITS)
def test_what_does_not_fit_is_named(tmp_path, change, message):
    torch.save(changed(change), tmp_path / "w.pt")
    with pytest.raises(
        ConfigError, match=rf"^backbone.checkpoint={tmp_path}/w.pt does not fit .*: it {message}"
    ) as caught:
        begun(tmp_path / "w.pt")
    assert "\n" not in str(caught.value)


def test_weights_of_another_network(tmp_path):
    torch.save(seeded("resnet18", **RESNET).state_dict(), tmp_path / "w.pt")
    with pytest.raises(ConfigError, match=r"and .* more; set backbone.name to the network that it is of"):
        begun(tmp_path / "w.pt")
    torch.save(hf_resnet(seeded("resnet18", **RESNET).state_dict()), tmp_path / "hf.pt")
    with pytest.raises(ConfigError, match="by the names of Hugging Face, lacks cls_token"):
        begun(tmp_path / "hf.pt")


def test_files_that_hold_no_weights(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "a.pt")
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    (tmp_path / "c.npz").write_bytes(b"")
    for file, message in (("a.pt", "holds no weights"), ("b.safetensors", "cannot be read"), ("c.npz", "ends in")):
        with pytest.raises(ConfigError, match=message):
            begun(tmp_path / file)
    with pytest.raises(WeightsError, match="no such file"):
        begun(tmp_path / "gone.pt")


def test_only_the_file_that_is_meant(tmp_path):
    torch.save(vit().state_dict(), tmp_path / "w.pt")
    config = BackboneConfig("vit_tiny_patch16_224", checkpoint=str(tmp_path / "w.pt"), checkpoint_sha256="0" * 64)
    with pytest.raises(WeightsError, match=re.escape("is another file than the configuration says")):
        create_backbone(config, 5, 3, 32)
