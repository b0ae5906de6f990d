"""Learning-rate schedules against values worked out by hand: 10 epochs of 4 steps, peak 0.8."""

import math

import pytest
import timm
import torch
from helpers import tiny
from training import rates_of

from convnn import swap_layers
from convnn.config.compose import compose_config
from convnn.config.identity import identity
from convnn.config.schema import OptimConfig
from convnn.errors import ConfigError
from convnn.runs.metrics import read_metrics
from convnn.train.optim import learning_rate, make_optimizer, make_scheduler, make_schedules
from convnn.train.run import run

WARM = {"warmup_epochs": 2, "warmup_lr": 0.4}


def rates(total_steps=None, epochs=10, steps=4, **optim):
    """Return the rate of every step."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.8)
    scheduler = make_scheduler(optimizer, OptimConfig(lr=0.8, **optim), epochs, steps, total_steps)
    return rates_of(optimizer, scheduler, total_steps or epochs * steps)


@pytest.mark.parametrize(
    "optim, first, middle, last",
    [
        ({"sched": "constant"}, 0.8, 0.8, 0.8),
        ({"sched": "constant", **WARM}, 0.4, 0.8, 0.8),
        ({"sched": "cosine"}, 0.8, 0.4, 0.4 * (1 + math.cos(math.pi * 39 / 40))),
        ({"sched": "cosine", "min_lr": 0.2, **WARM}, 0.4, 0.5, 0.2 + 0.3 * (1 + math.cos(math.pi * 39 / 40))),
        ({"sched": "tanh"}, 0.4 * (1 + math.tanh(7)), 0.4 * (1 + math.tanh(2)), 0.4 * (1 - math.tanh(2.75))),
        ({"sched": "poly", "power": 1}, 0.8, 0.4, 0.02),
        ({"sched": "poly", "power": 2, **WARM}, 0.4, 0.2, 0.0005),
        ({"sched": "poly", "power": 1, "min_lr": 0.2}, 0.8, 0.5, 0.215),
        ({"sched": "step", "decay_epochs": 5}, 0.8, 0.08, 0.08),
        ({"sched": "step", "decay_epochs": 3, "decay_rate": 0.5, **WARM}, 0.4, 0.4, 0.1),
        ({"sched": "multistep", "milestones": [3, 9]}, 0.8, 0.08, 0.008),
        ({"sched": "multistep", "milestones": [5, 8], "decay_rate": 0.5, **WARM}, 0.4, 0.4, 0.2),
    ],
)
def test_first_middle_and_last_rate(optim, first, middle, last):
    found = rates(**optim)
    assert [found[0], found[20], found[39]] == pytest.approx([first, middle, last], rel=1e-9)


@pytest.mark.parametrize("optim", [{"sched": "step", "decay_epochs": 5}, {"sched": "multistep", "milestones": [5]}])
def test_a_decay_falls_on_the_first_step_of_its_epoch(optim):
    found = rates(**optim)
    assert found[19] == 0.8 and found[20] == pytest.approx(0.08)


def test_warm_up_rises_in_equal_steps_and_reaches_the_rate():
    assert rates(sched="constant", **WARM)[:9] == pytest.approx([0.4 + 0.05 * i for i in range(9)])


def test_max_steps_below_the_warm_up_reaches_the_rate_and_says_so(caplog):
    found = rates(total_steps=20, steps=100, warmup_epochs=1)
    assert found[0] == pytest.approx(1e-6) and found[2] == pytest.approx(0.4 * (1 + math.cos(math.pi * 0.1)))
    assert found[-1] == pytest.approx(0.4 * (1 + math.cos(math.pi * 0.95)))
    assert "optim.warmup_epochs=1; the warm-up takes 2 of them" in caplog.text


def test_max_steps_in_mid_epoch_ends_the_schedule(caplog):
    found = rates(total_steps=6, sched="poly", power=1)
    assert found == pytest.approx([0.8 * (1 - i / 6) for i in range(6)]) and not caplog.text


def test_a_run_has_the_schedule_of_its_keys(tmp_path):
    keys = ["optim.sched=multistep", "optim.milestones=[1,2]", "optim.decay_rate=0.5", "optim.lr=0.008"]
    run(tiny(*keys, "train.epochs=3", "optim.warmup_epochs=0", f"run.dir={tmp_path}/r"))
    assert [row["lr"] for row in read_metrics(tmp_path / "r" / "metrics.jsonl")] == pytest.approx([0.008, 0.004, 0.002])


@pytest.mark.parametrize(
    "optim, message",
    [
        ({"sched": "plateau"}, "optim.sched=plateau is not one of cosine, tanh, poly, step, multistep, constant"),
        ({"sched": "none"}, "is not one of cosine"),
        ({"sched": "step"}, "optim.sched=step needs optim.decay_epochs"),
        ({"sched": "multistep"}, r"needs optim.milestones, .* such as optim.milestones=\[5\]"),
        ({"sched": "poly"}, "optim.sched=poly needs optim.power"),
        ({"sched": "cosine", "decay_epochs": 3}, "optim.decay_epochs=3 does nothing with optim.sched=cosine; .* step"),
        ({"sched": "step", "decay_epochs": 3, "min_lr": 0.1}, "optim.min_lr=0.1 does nothing with optim.sched=step"),
        ({"sched": "step", "decay_epochs": 10}, "must lie before train.epochs=10"),
        ({"sched": "multistep", "milestones": [5, 30]}, r"milestones=\[5, 30\] must lie before train.epochs=10"),
        ({"sched": "multistep", "milestones": [5, 3]}, "ascending"),
        ({"sched": "constant", "warmup_epochs": 10}, "optim.warmup_epochs=10 must lie before"),
    ],
)
def test_what_a_schedule_cannot_do_is_refused(optim, message):
    with pytest.raises(ConfigError, match=message):
        rates(**optim)


def test_keys_of_other_schedules_are_no_part_of_the_identity():
    assert not {"decay_epochs", "milestones", "decay_rate", "power"} & set(identity(tiny())["optim"])
    assert identity(tiny("optim.sched=poly", "optim.power=2"))["optim"]["power"] == 2


@pytest.mark.parametrize("name, everything", [("paper", True), ("adamw", False)])
def test_what_is_decayed(name, everything):
    """The authors' AdamW decays everything; timm leaves out vectors and the class token."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    groups = make_optimizer(model, compose_config([f"optim={name}"]).optim).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    assert "head.weight" in decayed
    assert ("cls_token" in decayed) == ("norm.bias" in decayed) == everything


@pytest.mark.parametrize("name, warmup, everything", [("adamw", 1, False), ("sgd", 0, True)])
def test_the_rate_decays_from_layer_to_layer(name, warmup, everything):
    """Head 1, last block 0.5, the block before it 0.25, patches 0.125; a replaced layer is where the old one was."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    swap_layers(model, "blocks.0.attn", "convnn_attention", k=4)
    given = [f"optim.name={name}", "optim.layer_decay=0.5", f"optim.decay_norm_and_bias={everything}", "optim.lr=0.1"]
    optim = compose_config([*given, "optim.sched=constant", f"optim.warmup_epochs={warmup}"]).optim
    optimizer = make_optimizer(model, optim)
    schedule = make_schedules(optimizer, optim, [(4, 8)], 2)
    rates_of(optimizer, schedule, 8)
    names = {id(p): n for n, p in model.named_parameters()}
    found = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    expected = {"head.weight": 0.1, "blocks.1.attn.qkv.weight": 0.05, "blocks.0.attn.qkv.weight": 0.025}
    expected |= {"blocks.0.attn.slot_weight": 0.025, "patch_embed.proj.weight": 0.0125}
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    assert found.keys() == dict(model.named_parameters()).keys() and learning_rate(optimizer) == pytest.approx(0.1)
