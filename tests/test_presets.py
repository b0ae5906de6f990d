"""Every operator preset in every family of backbones, and the published parameter counts."""

import csv
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F

from convnn import swap_layers
from convnn.cli import compose_config, config_groups
from convnn.config import ConfigError
from convnn.evaluation import build_model
from convnn.swap import count_parameters

PAPER = Path(__file__).resolve().parents[2] / "shared" / "paper"
PRESETS = {name: compose_config([f"operator={name}"]).operator for name in config_groups()["operator"]}

# Presets whose weights can come from the replaced layer, and what that takes.
TRANSFER = {
    **{name: {} for name in ("conv2d", "convnn", "convnn_coordinates", "hybrid", "spectrum")},
    **{name: {} for name in ("mhsa", "kvt", "neighborhood", "local_window", "strided_sparse")},
    **{name: {} for name in ("convnn_attention", "hybrid_attention")},
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
def test_every_preset_trains_in_every_backbone(preset, name, init):
    torch.manual_seed(0)
    model = backbone(name).double()
    rule = {"min_kernel": 3, "exclude": EXCLUDE.get(preset, [])}
    report = swap_layers(model, rule, PRESETS[preset], init=init)
    assert len(report) >= 3
    side = 32 if name == "vit_tiny" else 16
    x, y = torch.randn(12, 3, side, side, dtype=torch.float64), torch.arange(12) % 5

    def loss_now():
        torch.manual_seed(1)  # the same candidates and dropout
        return F.cross_entropy(model(x), y)

    before = loss_now()
    before.backward()
    start = {key: p.detach().clone() for key, p in model.named_parameters()}
    for key, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), key
    # The choice of neighbours jumps, so a step must be large enough for the descent to outweigh the jumps.
    after = []
    for lr in (0.01, 0.003, 0.001):
        model.load_state_dict(start, strict=False)
        torch.optim.Adam(model.parameters(), lr).step()
        with torch.no_grad():
            after.append(loss_now().item())
    assert min(after) < before.item()


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


# ------------------------------------------------------------------------------------- published parameter counts


def parameters(*overrides, classes=10):
    """Count the parameters of a configuration without allocating them."""
    config = compose_config(["data=synthetic", *overrides])
    from convnn.data import Dataset, Split

    images = torch.empty(1, 3, 32, 32, dtype=torch.uint8, device="meta")
    split = Split(images, torch.zeros(1, dtype=torch.int64, device="meta"))
    with torch.device("meta"):
        model, _, _ = build_model(config, Dataset(split, split, [str(i) for i in range(classes)]))
    return count_parameters(model)


VGG = ("backbone=vgg11_bn", "swap=all_conv", "operator=hybrid")
VIT = ("backbone=vit_tiny_224", "swap=all_attention", "operator.bias=false")


@pytest.mark.parametrize("ratio", [0, 0.125, 0.25, 0.5, 0.875, 1])
def test_vgg11_hybrid(ratio):
    assert parameters(*VGG, f"operator.branch_ratio={ratio}") == 130_015_690


@pytest.mark.parametrize(
    "overrides, count",
    [
        (["operator.branch_ratio=0.5", "operator.coordinates=true"], 130_040_458),
        (["operator.k=1", "operator.branch_kernel=1"], 121_822_154),
        (["operator.k=10", "operator.branch_kernel=2"], 127_967_306),
        (["operator.branch_ratio=0", "operator.branch_kernel=2"], 124_894_730),
    ],
)
def test_vgg11_variants(overrides, count):
    assert parameters(*VGG, *overrides) == count


@pytest.mark.parametrize(
    "overrides, count",
    [
        (["operator=mhsa"], 5_479_306),
        (["operator=convnn_attention"], 5_500_042),
        (["operator=convnn_attention", "operator.k=1"], 5_481_610),
        (["operator=kvt"], 5_479_306),
    ],
)
def test_vit_tiny(overrides, count):
    assert parameters(*VIT, *overrides) == count


@pytest.mark.parametrize("k, count", [(9, 86_386_408), (16, 86_391_784)])
def test_vit_base(k, count):
    base = ("backbone=vit_base_224", "swap=all_attention", "operator=convnn_attention", "operator.bias=false")
    assert parameters(*base, f"operator.k={k}", classes=1000) == count


@pytest.mark.skipif(not (PAPER / "vgg11_k.csv").exists(), reason="needs the published tables beside the project")
def test_every_row_of_the_published_vgg11_tables():
    checked = {}
    for table in ("vgg11_k", "vgg11_branching"):
        for row in csv.DictReader((PAPER / f"{table}.csv").open()):
            if row["layer"] != "Branching":
                continue
            overrides = [f"operator.branch_ratio={row['branch_ratio']}"]
            overrides += [f"operator.k={row['k']}"] if row["k"] else []
            overrides += [f"operator.branch_kernel={row['kernel_size']}"] if row["kernel_size"] else []
            overrides += ["operator.coordinates=true"] if row["aggregation"] == "Loc_Col" else []
            key = tuple(overrides)
            if key not in checked:
                checked[key] = parameters(*VGG, *overrides)
            more = {"CIFAR-10": 0, "CIFAR-100": 90 * 4097}[row["dataset"]]  # rows of the last layer
            assert checked[key] + more == int(row["params"]), row
    assert len(checked) > 50
    assert parameters(*VGG, classes=100) - parameters(*VGG) == 90 * 4097
