"""Guard rails of numerics: each operator's error in float32 and bfloat16, and losses of fixed short runs."""

import copy
from dataclasses import replace

import pytest
import torch
from helpers import tiny
from presets import PRESETS
from torch import nn

from convnn.config.schema import SwapRule
from convnn.models.swap import swap_layers
from convnn.runs.folder import open_run_folder
from convnn.train.run import run_trainer
from convnn.train.trainer import Trainer


def randomised(layer):
    """Move weights away from where they begin, such as slot weights from ones."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer.double().eval()


def layer_and_input(preset):
    """Return the operator's layer in float64, and an input for it."""
    operator = copy.deepcopy(PRESETS[preset])
    torch.manual_seed(0)
    if operator.kind == "conv":
        model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1))
        swap_layers(model, SwapRule(), operator)
        return randomised(model), torch.randn(4, 8, 7, 7, dtype=torch.float64)
    import timm

    vit = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24, depth=1, num_heads=3)
    policy = "clamp" if operator.slots == "rank" else operator.k_policy
    # Two candidates, so that windows and strides leave tokens out.
    operator = replace(operator, num_candidates=min(operator.num_candidates, 2), k_policy=policy)
    swap_layers(vit, SwapRule(), operator)
    return randomised(vit.blocks[0].attn), torch.randn(4, 17, 24, dtype=torch.float64)


def errors(preset, dtype):
    """Return largest and median error of the outputs, in units of their root mean square, against float64."""
    layer, x = layer_and_input(preset)
    if hasattr(layer, "fast"):
        layer.fast = False
    with torch.no_grad():
        exact = layer(x)
        lower = copy.deepcopy(layer).float()
        if dtype == torch.bfloat16:  # as training does it: weights in float32
            with torch.autocast("cpu", torch.bfloat16):
                found = lower(x.float())
        else:
            found = lower(x.float())
    error = (found.double() - exact).abs() / exact.square().mean().sqrt()
    return error.max().item(), error.median().item()


@pytest.mark.parametrize("preset", PRESETS)
def test_error_of_float32(preset):
    """No neighbour is another one, and the sums differ by rounding alone."""
    assert errors(preset, torch.float32)[0] < 4e-6


@pytest.mark.parametrize("preset", PRESETS)
def test_error_of_bfloat16(preset):
    """A bfloat16 has 8 bits; where it changes a neighbour the error is larger, so that the median is pinned."""
    assert errors(preset, torch.bfloat16)[1] < 6e-3


# Losses of ten steps on a CPU in float32. They were noted on 2026-11-24 with torch 2.15 and change only on purpose. Few
# and small maps, so that no rounding changes a neighbour.
LOSSES = {
    "operator=conv2d": [2.32291, 2.06426, 2.15491, 2.21479, 2.23352, 2.2005, 2.23205, 2.365, 2.11796, 2.20635],
    "operator=convnn operator.k=4": [
        2.32291,
        2.0641,
        2.15476,
        2.21556,
        2.23599,
        2.20031,
        2.23049,
        2.36631,
        2.11852,
        2.20878,
    ],
    "operator=hybrid operator.blend=0.5 train.label_smoothing=0.1": [
        2.32797,
        2.09573,
        2.17763,
        2.2293,
        2.24622,
        2.21764,
        2.24383,
        2.36868,
        2.14421,
        2.22368,
    ],
    "vit operator=convnn_attention operator.k=5 optim=sgd optim.lr=0.05": [
        2.28509,
        2.22384,
        2.46165,
        2.3624,
        2.37681,
        2.36719,
        2.175,
        2.34843,
        2.2687,
        2.34139,
    ],
}


def losses_of(overrides, folder):
    """Train one epoch of ten steps as train.py does and return the loss of each step."""
    words = overrides.split()
    more = [w for w in words if w != "vit"] + ([] if "vit" in words else ["swap.match='layer[23].*'"])
    config = tiny(
        *more, "data.size=80", "train.batch_size=8", "train.epochs=1", f"run.dir={folder}", vit="vit" in words
    )
    folder = open_run_folder(config)
    trainer, losses = Trainer(config, folder), []
    may_step = trainer.divergence.may_step

    def note(loss, state):
        losses.append(loss.item())
        return may_step(loss, state)

    trainer.divergence.may_step = note
    run_trainer(trainer, lambda: None)
    folder.close()
    return losses


@pytest.mark.parametrize("overrides", LOSSES)
def test_losses_of_ten_steps(overrides, tmp_path):
    assert losses_of(overrides, tmp_path / "r") == pytest.approx(LOSSES[overrides], rel=1e-5, abs=1e-5)
