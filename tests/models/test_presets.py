"""Every operator preset in every family of backbones."""

from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from presets import PRESETS

from convnn import swap_layers
from convnn.errors import ConfigError

# Presets whose weights can come from the replaced layer, and what that takes.
TRANSFER = {
    **{name: {} for name in ("conv2d", "convnn", "convnn_coordinates", "hybrid", "spectrum")},
    **{name: {} for name in ("mhsa", "kvt", "neighborhood", "local_window", "strided_sparse")},
    "convnn_attention": {},
    "hybrid_attention": {"branch_input": "all"},
}
# Depthwise cannot turn 3 channels into 64 or 8, nor 64 into 8.
EXCLUDE = {"depthwise_conv2d": ["conv1", "features.0", "layer1.0.conv1"]}


def backbone(name):
    if name == "vit_tiny":
        kwargs = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 24, "num_heads": 2}
        return timm.create_model("vit_tiny_patch16_224", num_classes=5, **kwargs)
    if name == "resnet18":
        model = timm.create_model("resnet18", num_classes=5, channels=(8, 8, 16, 16), zero_init_last=False)
        model.conv1, model.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
        return model
    model = timm.models.vgg.VGG([8, "M", 16, "M", 16, 16, "M"], num_classes=5, norm_layer=torch.nn.BatchNorm2d)
    model.pre_logits = torch.nn.AdaptiveAvgPool2d(1)
    model.head = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 5))
    return model


def cases():
    for preset, operator in PRESETS.items():
        for name in ("vit_tiny",) if operator.kind == "attention" else ("resnet18", "vgg11_bn"):
            for init in ("fresh", "transfer") if preset in TRANSFER else ("fresh",):
                yield preset, name, init


@pytest.mark.parametrize("preset, name, init", list(cases()))
@pytest.mark.long
def test_every_preset_trains_in_every_backbone(preset, name, init):
    torch.manual_seed(0)
    model = backbone(name).double()
    rule = {"min_kernel": 3, "exclude": EXCLUDE.get(preset, [])}
    operator = replace(PRESETS[preset], **(TRANSFER[preset] if init == "transfer" else {}))
    report = swap_layers(model, rule, operator, init=init)
    assert len(report) >= 3
    side = 32 if name == "vit_tiny" else 16
    x, y = torch.randn(12, 3, side, side, dtype=torch.float64), torch.arange(12) % 5

    def loss_now():
        torch.manual_seed(1)  # the same candidates and dropout
        return F.cross_entropy(model(x), y)

    before = loss_now()
    before.backward()
    for key, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), key
    # The choice of neighbours jumps, so that a single step may go up.
    optimizer = torch.optim.Adam(model.parameters(), 0.003)
    for _ in range(10):
        optimizer.step()
        optimizer.zero_grad()
        after = loss_now()
        if after < before:
            break
        after.backward()
    assert after < before


@pytest.mark.parametrize("preset", [p for p in PRESETS if p not in TRANSFER])
def test_other_presets_refuse_a_transfer(preset):
    name = "vit_tiny" if PRESETS[preset].kind == "attention" else "resnet18"
    with pytest.raises(ConfigError, match=r"swap.init=transfer"):
        swap_layers(backbone(name), {"min_kernel": 3, "last": 1}, PRESETS[preset], init="transfer")


def test_every_aggregation_parameter_is_used():
    """No weight of a preset may be without influence."""
    for preset, operator in PRESETS.items():
        model = backbone("vit_tiny" if operator.kind == "attention" else "resnet18")
        swap_layers(model, {"min_kernel": 3, "first": 1, "exclude": EXCLUDE.get(preset, [])}, operator)
        model(torch.randn(4, 3, 32, 32)).pow(2).sum().backward()
        # The positional bias of ConViT shifts all its logits alike.
        dead = [k for k, p in model.named_parameters() if not p.grad.any() and "pos_proj.bias" not in k]
        assert not dead, (preset, dead)
