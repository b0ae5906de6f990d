"""The adapter of docs/extending.md: a kind of attention of one's own, in one file and one call; and refusals."""

import re
import sys
from pathlib import Path

import pytest
import timm
import torch
from comparing import close
from torch import nn

from convnn import ConfigError, export_layers, register_adapter, swap_layers
from convnn.nn.adapters.base import Adapter
from convnn.nn.adapters.registry import unregister_adapter

DOCS = Path(__file__).parents[2] / "docs" / "extending.md"
SETTINGS = {"kind": "attention", "aggregation": "sum"}


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The module of the documentation, imported."""
    code = next(c for c in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S) if c.startswith("# mine.py"))
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    import mine

    from convnn.nn.adapters import registry

    yield mine
    unregister_adapter(registry._ADAPTERS[0])
    del sys.modules["mine"]


def test_one_of_ones_own(mine):
    torch.manual_seed(0)
    model = nn.Sequential(mine.Bilinear(6), mine.Bilinear(6)).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    before = model(x)
    report = swap_layers(model, "*", SETTINGS | {"k": 5}, init="transfer")
    assert [row.new for row in report.rows] == ["ConvNN Bilinear k=5 blend=1"] * 2
    close(model(x), before)
    model[0].grid_size = model[1].grid_size = (1, 5)
    assert export_layers(model) == ["0", "1"] and type(model[0]) is mine.Bilinear
    close(model(x), before)


class Usual(nn.Module):
    """Attention with the names that timm's kinds share."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.qkv, self.proj, self.proj_drop = 2, nn.Linear(8, 24), nn.Linear(8, 8), nn.Dropout(0.0)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.mT / 2).softmax(-1) @ v
        return self.proj(mixed.transpose(1, 2).flatten(2))


def test_usual_attention_needs_its_class_alone():
    class Named(Adapter):
        layers = (f"{__name__}:Usual",)

    named = Named()
    register_adapter(named)
    try:
        torch.manual_seed(0)
        model, x = nn.Sequential(Usual()).double(), torch.randn(2, 5, 8, dtype=torch.float64)
        before = model(x)
        swap_layers(model, "*", SETTINGS | {"k": 5}, init="transfer")
        close(model(x), before)
        with pytest.raises(TypeError):
            model[0](x, mask=x)
    finally:
        unregister_adapter(named)


def test_a_known_kind_can_be_read_otherwise():
    class Never(Adapter):
        layers = ("timm.layers.attention:Attention",)

        def refusal(self, layer):
            return "stays as it is"

    never = Never()
    register_adapter(never)
    try:
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
        with pytest.raises(ConfigError, match=r"could be replaced: blocks.0.attn \(Attention, which stays as it is\)"):
            swap_layers(model, "*", SETTINGS | {"k": 2})
    finally:
        unregister_adapter(never)
    assert len(swap_layers(model, "*", SETTINGS | {"k": 2})) == 1


def test_a_class_without_a_module_is_refused():
    class Nowhere(Adapter):
        layers = ("Attention",)

    with pytest.raises(ConfigError, match=r"layers=Attention is not of the form package\.module:Class"):
        register_adapter(Nowhere())


REFUSED = {
    "xcit_nano_12_p16_224": ({"depth": 1, "cls_attn_layers": 1}, "attends among channels, not tokens"),
    "mobilevitv2_050": ({}, "has no scores of pairs of tokens"),
    "coat_tiny": ({}, "has no scores of pairs of tokens"),
}


@pytest.mark.long
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_replaced_says_why(name):
    kwargs, reason = REFUSED[name]
    model = timm.create_model(name, **kwargs)
    before = str(model)
    with pytest.raises(ConfigError) as error:
        swap_layers(model, "*", SETTINGS | {"k": 2})
    assert reason in str(error.value) and "\n" not in str(error.value) and str(model) == before


def test_what_stays_is_in_the_report():
    sizes = {"depths": (1, 1, 1, 1), "embed_dims": (8, 8, 8, 8), "num_heads": (1, 1, 1, 1)}
    model = timm.create_model("davit_tiny", **sizes)
    report = swap_layers(model, "*", SETTINGS | {"k": 2})
    last = str(report).splitlines()[-1]
    assert last.startswith("left as they are: ") and "(ChannelAttention, which attends among channels" in last
    assert set(report.left) == {n for n, m in model.named_modules() if type(m).__name__ == "ChannelAttention"}
    name = next(iter(report.left))
    with pytest.raises(ConfigError, match=rf"{re.escape(name)} \(ChannelAttention, which attends"):
        swap_layers(timm.create_model("davit_tiny", **sizes), name, SETTINGS | {"k": 2})
