"""Attention by other names: timm's ConViT, whose class token enters behind the gated layers."""

import pytest
import timm
import torch
from comparing import close

from convnn import ConfigError, neighbors_of, swap_layers
from convnn.config.compose import compose_config

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 6, "num_heads": 4, "depth": 4, "local_up_to_layer": 2}
ATTENTION = ["backbone=vit_tiny", "swap=all_attention"]


def convit():
    torch.manual_seed(0)
    model = timm.create_model("convit_tiny", num_classes=5, **SMALL).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def operator(name, *overrides):
    return compose_config([*ATTENTION, f"operator={name}", *overrides]).operator


def test_plain_layers_of_convit_keep_their_function():
    model, x = convit(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before = model(x)
    report = swap_layers(model, {"match": "blocks.[23].attn"}, operator("mhsa"), init="transfer")
    assert [row.old for row in report.rows] == ["MHSA", "MHSA"]
    close(model(x), before)
    kept = convit()
    swap_layers(kept, {"match": "blocks.[23].attn"}, operator("convnn_attention", "operator.k=17"), init="transfer")
    close(kept(x), before)


def test_gated_layers_have_no_class_token():
    model, x = convit(), torch.randn(1, 3, 32, 32, dtype=torch.float64)
    swap_layers(model, {"match": "*"}, operator("convnn_attention", "operator.k=5", "operator.blend=0.5"))
    found = neighbors_of(model, x)
    assert [found[f"blocks.{i}.attn"].geometry.prefix for i in range(4)] == [0, 0, 1, 1]
    assert [found[f"blocks.{i}.attn"].index.shape[2] for i in range(4)] == [16, 16, 17, 17]
    assert model(x).shape == (1, 5)
    model(x).sum().backward()
    assert all(block.attn.qkv.weight.grad.abs().sum() > 0 for block in model.blocks)


def test_what_gates_mix_in_is_not_transferred():
    model = convit()
    with pytest.raises(ConfigError, match=r"'blocks.0.attn', 'blocks.1.attn' is a GPSA, .* set .*exclude=\["):
        swap_layers(model, {"match": "*"}, operator("mhsa"), init="transfer")
    assert type(model.blocks[2].attn).__name__ == "MHSA"  # nothing has changed
    gated = operator("convit")
    swap_layers(model, {"match": "blocks.0.attn"}, gated)
    assert model(torch.randn(1, 3, 32, 32, dtype=torch.float64)).shape == (1, 5)


@pytest.mark.long
def test_a_convit_trains(tmp_path):
    from convnn.train.run import run

    kwargs = ["depth=3", "embed_dim=6", "num_heads=4", "patch_size=8", "local_up_to_layer=2"]
    overrides = ["backbone.name=convit_tiny", "backbone.image_size=32", *(f"+backbone.kwargs.{k}" for k in kwargs)]
    overrides += [
        "data=digits",
        "data.limit=64",
        "train.batch_size=16",
        "train.max_steps=2",
        "operator=convnn_attention",
        "tracker=jsonl",
    ]
    result = run(compose_config(["backbone=vit_tiny", "swap=all_attention", *overrides, f"run.dir={tmp_path}/run"]))
    assert result["status"] == "complete"
