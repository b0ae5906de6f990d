"""What is found out about a model before training: its output is checked, its operations are counted if they can be."""

import logging

import pytest
import timm
import torch
from helpers import TINY, tiny
from torch import nn

from convnn.config.compose import compose_config
from convnn.data.splits import Dataset, Split
from convnn.errors import ConfigError
from convnn.models import cost
from convnn.models.build import build_model
from convnn.models.cost import check_output, cost_ratio, count_cost, dear_swap, forward_cost
from convnn.models.swap import Replacement, SwapReport, swap_layers
from convnn.train.run import run


@pytest.mark.parametrize(
    "name, kwargs",
    [
        ("pit_ti_224", {"img_size": 64}),
        ("cait_xxs24_224", {"img_size": 32, "depth": 2}),
        ("vit_base_patch16_siglip_224", {"img_size": 32, "depth": 1, "embed_dim": 48, "num_heads": 2}),
    ],
)
def test_models_that_are_called_with_parameters_are_counted(name, kwargs):
    model = timm.create_model(name, num_classes=10, **kwargs)
    asked = [p.requires_grad for p in model.parameters()]
    check_output(model, 3, kwargs["img_size"], 10)
    assert forward_cost(model, 3, kwargs["img_size"]).total > 10**5
    assert [p.requires_grad for p in model.parameters()] == asked and model.training


class NeedsData(nn.Module):
    """Scales by a number that only data tell, which no count without data can follow."""

    def __init__(self, classes=10):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))

    def forward(self, x):
        return self.body(x) * float(x.abs().mean() + 1)


@timm.models.register_model
def needs_data_net(pretrained=False, num_classes=10, in_chans=3, drop_rate=0.0, **kwargs):
    return NeedsData(num_classes)


NEEDS_DATA = [*(o for o in TINY if "kwargs" not in o), "backbone.name=needs_data_net", "backbone.stem=default"]


def fails(error):
    def count(*_, **__):
        raise error

    return count


@pytest.mark.parametrize("error", [None, ValueError("no"), RuntimeError("no\nmore"), AssertionError(), KeyError("x")])
def test_what_cannot_be_counted_is_trained(error, tmp_path, monkeypatch, caplog):
    if error is not None:
        monkeypatch.setattr(cost, "count_operations", fails(error))
    monkeypatch.setattr(logging.getLogger("convnn"), "propagate", True)
    overrides = [*NEEDS_DATA, "swap=none", "train.epochs=1", f"run.dir={tmp_path}/r"]
    result = run(compose_config(overrides))
    assert result["status"] == "complete" and result["gflops"] is None and result["params"] > 0
    assert "GFLOPs unknown" in caplog.text


def test_the_report_of_the_swap_leaves_out_what_was_not_counted(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    report = swap_layers(model, {"match": "1"}, {"k": 9})
    assert "MFLOPs" in str(count_cost(model, 3, 8, report)[1])
    monkeypatch.setattr(cost, "count_operations", fails(RuntimeError("no")))
    assert count_cost(model, 3, 8, report) == (None, report) and "MFLOPs" not in str(report)


class Returns(nn.Module):
    def __init__(self, output, in_training=None):
        super().__init__()
        self.layer, self.output, self.in_training = nn.Linear(1, 1), output, in_training or output

    def forward(self, x):
        return (self.in_training if self.training else self.output)(x)


def logits(x):
    return x.new_zeros(len(x), 10)


@pytest.mark.parametrize(
    "model, says",
    [
        (Returns(lambda x: x), r"returns \(1, 3, 8, 8\) for 1 image\(s\), not \(1, 10\)"),
        (Returns(lambda x: logits(x)[:, :9]), r"\(1, 9\)"),
        (Returns(lambda x: logits(x)[0]), r"\(10,\)"),
        (Returns(lambda x: [logits(x)]), "a list"),
        (Returns(lambda x: {"logits": logits(x)}), "a dict"),
        (Returns(logits, lambda x: (logits(x), logits(x))), r"a tuple in training for 2 image\(s\), not \(2, 10\)"),
        (Returns(fails(TypeError("odd\nmore"))), "cannot process a 8x8 image: odd$"),
    ],
)
def test_a_model_without_logits_is_refused(model, says):
    check_output(Returns(logits), 3, 8, 10)
    with pytest.raises(ConfigError, match=says):
        check_output(model, 3, 8, 10)
    assert model.training


def test_a_full_gpu_is_not_taken_for_a_wrong_model():
    with pytest.raises(torch.OutOfMemoryError):
        check_output(Returns(fails(torch.OutOfMemoryError("CUDA"))), 3, 8, 10)


@pytest.mark.parametrize("kwargs", ["global_pool=''", "features_only=true", "num_classes=5", "num_classes=0"])
def test_a_run_without_logits_does_not_begin(kwargs, tmp_path):
    with pytest.raises(ConfigError) as error:
        run(tiny("swap=none", f"+backbone.kwargs.{kwargs}", f"run.dir={tmp_path}/r"))
    assert "\n" not in str(error.value) and not (tmp_path / "r").exists()


def test_a_dear_swap_is_told_with_both_counts():
    plain = Replacement("a", "Conv2d", "ConvNN2d", 1, 1, nn.Identity(), flops_before=10**9, flops_after=15 * 10**9)
    report = SwapReport((plain,))
    assert cost_ratio(16.0, report) == 8.0  # 2 GFLOPs before, of which the layer has 1
    assert dear_swap(16.0, report).startswith(
        "the swap takes 8 times the operations of the plain network (2 -> 16 GFLOPs"
    )
    assert dear_swap(50.0, report) is None and dear_swap(None, report) is None and cost_ratio(None, report) is None
    assert cost_ratio(3.0, SwapReport(())) == 1.0


def test_the_runs_of_the_readme_at_imagenets_size_keep_their_stem():
    """README's example on large images; the small stem would make it 23 times a plain ResNet."""
    config = compose_config(["data=imagenet", "backbone=resnet50", "operator=convnn", "swap=last_half"])
    data = Split(torch.zeros(1, 3, 224, 224, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    model, report, side = build_model(config, Dataset(data, data, [str(i) for i in range(10)]))
    gflops, report = count_cost(model, 3, side, report)
    assert model.conv1.stride == (2, 2) and cost_ratio(gflops, report) < 2
