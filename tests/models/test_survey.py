"""What is said of a model under the swap is what the swap does, and a wrong replacement would be seen."""

import csv
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from convnn.config.schema import ATTENTION, CONV
from convnn.models import coverage as module
from convnn.models.coverage import coverage, families, rounding, runs_with_fewer, stir, transfer_error

TABLE = Path(__file__).parents[2] / "docs" / "results" / "backbones.csv"


def vit():
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "init_values": 1e-5}
    return stir(timm.create_model("vit_tiny_patch16_224", num_classes=5, **shape)).double().eval()


def image(size=16):
    return torch.randn(2, 3, size, size, dtype=torch.float64)


class Unknown(nn.Module):
    """Attention by its name alone."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12)


class OddAttention(Unknown):
    pass


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.wrapped = nn.Conv2d(4, 4, 3, padding_mode="circular")
        self.attn = OddAttention()


def test_what_can_be_replaced_and_why_the_rest_cannot():
    found = coverage(Network(), CONV)
    assert found.taken == ("stem",) and found.found == 2
    assert "padding_mode=circular" in found.refused["wrapped"] and "exclude" not in found.refused["wrapped"]
    found = coverage(Network(), ATTENTION)
    assert found.taken == () and found.refused == {"attn": "OddAttention, which is not known"}
    found = coverage(vit(), ATTENTION)
    assert found.taken == ("blocks.0.attn", "blocks.1.attn") and not found.refused


def test_without_data_the_same_is_said():
    with torch.device("meta"):
        model = timm.create_model("xcit_nano_12_p16_224")
    found = coverage(model, ATTENTION)
    assert not found.taken and any("channels, not tokens" in reason for reason in found.refused.values())
    assert coverage(model, CONV) == coverage(timm.create_model("xcit_nano_12_p16_224"), CONV)


@pytest.mark.parametrize("kind", [CONV, ATTENTION])
def test_a_transfer_is_exact_and_a_wrong_one_is_seen(kind, monkeypatch):
    torch.manual_seed(0)
    model = vit() if kind == ATTENTION else timm.create_model("resnet18", channels=[8] * 4, layers=[1] * 4)
    model = stir(model).double().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, names = image(16 if kind == ATTENTION else 32), coverage(model, kind).taken
    assert transfer_error(model, kind, names, x) < 1e-10
    assert runs_with_fewer(model, kind, names, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    wrong = {"k": 2, "k_policy": "error"} if kind == ATTENTION else {"blend": 0.9}
    monkeypatch.setitem(module.EXACT, kind, module.EXACT[kind] | wrong)
    assert transfer_error(model, kind, names, x) > 1e-6


def test_rounding_is_of_the_last_digits():
    torch.manual_seed(0)
    model, x = vit(), image()
    assert 0 < rounding(model, x) < 1e-12
    assert rounding(nn.Sequential(nn.Flatten(), nn.Tanhshrink()), x) < 1e-12


def test_stirring_lets_differences_through():
    shape = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "init_values": 1e-5}
    model = timm.create_model("vit_tiny_patch16_224", **shape)
    assert float(model.blocks[0].ls1.gamma.abs().max()) < 1e-4
    assert float(stir(model).blocks[0].ls1.gamma.abs().min()) > 0.01


def rows():
    with TABLE.open() as file:
        return list(csv.DictReader(file))


def of_each_family():
    """The model of each family that the table has computed, and its kinds."""
    chosen = {}
    for row in rows():
        if row["error"]:
            chosen.setdefault(row["model"], {})[row["kind"]] = row
    return chosen


@pytest.mark.long
def test_the_table_is_what_is_found():
    for name, kinds in of_each_family().items():
        with torch.device("meta"):
            model = timm.create_model(name)
        for kind, row in kinds.items():
            found = coverage(model, kind)
            assert (found.found, len(found.taken)) == (int(row["layers"]), int(row["taken"])), name


def test_the_table_reaches_its_goals():
    """Of all of timm's models: 95 % of those with convolutions, and 85 % of those with scores of pairs of tokens."""
    every = {name for names in families().values() for name in names}
    table = rows()
    if f"timm {timm.__version__}" in (TABLE.parents[1] / "backbones.md").read_text():
        assert {row["model"] for row in table} <= every
        assert len({row["model"] for row in table}) > 0.98 * len(every)
    conv, attention = ([row for row in table if row["kind"] == kind] for kind in (CONV, ATTENTION))
    assert sum(row["taken"] == row["layers"] for row in conv) >= 0.95 * len(conv)
    without = ("among channels", "linear attention", "one query", "AttentionPool")  # of pairs: none to replace
    paired = [
        row
        for row in attention
        if int(row["taken"]) or not all(any(word in why for word in without) for why in row["reasons"].split("; "))
    ]
    assert len(attention) > len(paired) > 0.8 * len(attention)
    assert sum(int(row["taken"]) > 0 for row in paired) >= 0.85 * len(paired)


def test_what_was_computed_is_exact():
    for kind, least in ((CONV, 30), (ATTENTION, 20)):
        found = [row for row in rows() if row["kind"] == kind and row["error"]]
        exact = [row for row in found if not row["error"].startswith("more than")]
        assert len(exact) >= least
        for row in exact:
            error, *rounding = (float(part.strip("()")) for part in row["error"].split())
            assert error <= max([1e-10, *(10 * share for share in rounding)]), row["model"]
            assert all(share > 1e-11 for share in rounding)
        assert all(row["fewer"] == "yes" or row["fewer"].startswith("more than ") for row in found)
