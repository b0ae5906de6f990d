"""Training: exact resume, honest averages, divergence, run folders, and the function-preserving start."""

import json
import signal

import pytest
import torch
from helpers import equal_states, tiny
from training import HARD, rows, stop_after

from convnn.data.batches import Batches
from convnn.data.datasets import load_dataset
from convnn.data.splits import Split
from convnn.models.build import build_model
from convnn.models.schedule import apply_schedule
from convnn.models.swap import neighbor_layers
from convnn.runs.checkpoint import load_checkpoint
from convnn.runs.folder import open_run_folder
from convnn.train.evaluate import evaluate
from convnn.train.restore import evaluate_run
from convnn.train.run import run, run_trainer
from convnn.train.trainer import Trainer

LEARNED = ["schedule=constant", "operator.blend=0.4", "operator.learn_blend=layer"]


@pytest.mark.parametrize("stop, more", [(0, []), (2, []), (4, []), (7, []), (4, LEARNED)])
@pytest.mark.long
def test_resumed_run_equals_uninterrupted_run(stop, more, tmp_path, monkeypatch):
    overrides = [*HARD, *more]
    whole = run(tiny(*overrides, f"run.dir={tmp_path}/whole"))
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        partial = run(tiny(*overrides, f"run.dir={tmp_path}/parts"))
    assert partial["status"] == "interrupted" and partial["exit_code"] == 128 + signal.SIGTERM
    torch.manual_seed(99)  # nothing may depend on the generators of the resuming process
    resumed = run(tiny(*overrides, f"run.dir={tmp_path}/parts", "run.if_exists=resume"))
    assert resumed["status"] == "complete"
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert len(rows(tmp_path / "whole")) == 3
    for key in ("top1_last", "top1_at_best_val", "steps", "gflops"):
        assert resumed[key] == whole[key]
    states = [load_checkpoint(tmp_path / d / "checkpoints" / "last.pt") for d in ("whole", "parts")]
    assert equal_states(states[0]["model"], states[1]["model"])
    assert equal_states(states[0]["ema"], states[1]["ema"])


@pytest.mark.long
def test_seeds_decide_the_outcome(tmp_path):
    a, b, c = (run(tiny(f"seed={s}", f"run.dir={tmp_path}/{i}")) for i, s in enumerate((0, 0, 1)))
    states = [load_checkpoint(tmp_path / str(i) / "checkpoints" / "last.pt")["model"] for i in range(3)]
    assert equal_states(states[0], states[1]) and not equal_states(states[0], states[2])
    assert a["top1_last"] == b["top1_last"] and a["fingerprint"] == b["fingerprint"] != c["fingerprint"]


@pytest.mark.long
def test_training_learns(tmp_path):
    result = run(tiny("operator=hybrid", "data.size=640", "train.epochs=6", "optim.lr=0.01", f"run.dir={tmp_path}/r"))
    losses = [row["train_loss"] for row in rows(tmp_path / "r")]
    assert losses[-1] < 0.8 * losses[0]
    assert result["top1_last"] > 30  # chance is 10


def test_accuracy_is_averaged_over_samples_not_batches():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (10, 1, 2, 2), dtype=torch.uint8)
    labels = torch.tensor([0] * 8 + [1] * 2)
    config = tiny().data
    config.mean, config.std = [0.0], [1.0]

    class Zero(torch.nn.Module):
        def forward(self, x):
            return torch.tensor([1.0, 0.0]).expand(len(x), 2)

    loss, top1, top5 = evaluate(Zero(), Batches(Split(images, labels), 8, config, 2))
    assert top1 == 80.0 and top5 == 100.0  # batches of 8 and 2 would average to 50
    expected = torch.nn.functional.cross_entropy(Zero()(images), labels)
    assert abs(loss - expected.item()) < 1e-6


@pytest.mark.parametrize("operator", ["spectrum", "convnn", "conv2d", "hybrid"])
def test_transfer_starts_from_the_unswapped_models_logits(operator):
    overrides = [f"operator={operator}", "schedule=linear", "swap.init=transfer"]
    if operator == "hybrid":
        overrides.append("operator.blend=0")
    config, plain = tiny(*overrides), tiny("swap=none")
    dataset = load_dataset(config.data)
    (model, report, _), (reference, _, _) = build_model(config, dataset), build_model(plain, dataset)
    assert len(report) > 5
    apply_schedule(model, config.schedule, 0.0)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    model, reference = model.double().eval(), reference.double().eval()
    for layer in neighbor_layers(model).values():
        layer.fast = False
        assert layer.blend == 0
    assert (model(x) - reference(x)).abs().max() < 1e-10


def test_attention_transfer_with_all_tokens_keeps_the_logits():
    config = tiny("operator=mhsa", "swap.init=transfer", vit=True)
    plain = tiny("operator=mhsa", "swap=none", vit=True)
    dataset = load_dataset(config.data)
    (model, report, _), (reference, _, _) = build_model(config, dataset), build_model(plain, dataset)
    assert len(report) == 2
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    model, reference = model.double().eval(), reference.double().eval()
    for layer in neighbor_layers(model).values():
        layer.fast = False
    assert (model(x) - reference(x)).abs().max() < 1e-10


def test_blend_schedule_moves_every_layer_and_rebuilds_nothing(tmp_path):
    config = tiny("operator=spectrum", "schedule=linear", "train.epochs=3", f"run.dir={tmp_path}/r")
    folder = open_run_folder(config)
    trainer = Trainer(config, folder)
    before = [id(m) for m in trainer.model.modules()], [id(p) for p in trainer.model.parameters()]
    run_trainer(trainer, lambda: None)
    folder.close()
    assert before == ([id(m) for m in trainer.model.modules()], [id(p) for p in trainer.model.parameters()])
    blends = [{layer["blend"] for layer in row["layers"]} for row in rows(tmp_path / "r")]
    # 2 steps an epoch, 6 in all: the last steps of the epochs are steps 1, 3 and 5 of 0..5
    assert [sorted(b) for b in blends] == [[pytest.approx(0.2)], [pytest.approx(0.6)], [1.0]]
    assert len(rows(tmp_path / "r")[0]["layers"]) == len(trainer.report)


def test_divergence_is_never_success(tmp_path):
    result = run(tiny("optim=sgd", "optim.lr=1e30", "optim.warmup_epochs=0", f"run.dir={tmp_path}/r"))
    assert result["status"] == "diverged" and result["exit_code"] == 3
    assert "step" in result["reason"] and "lr" in result["reason"]
    assert json.loads((tmp_path / "r" / "result.json").read_text())["status"] == "diverged"


def test_max_steps_ends_in_mid_epoch_with_an_evaluation(tmp_path):
    result = run(tiny("train.max_steps=3", f"run.dir={tmp_path}/r"))
    assert result["steps"] == 3 and result["status"] == "complete"
    assert [row["step"] for row in rows(tmp_path / "r")] == [2, 3]


@pytest.mark.parametrize("checkpoint", ["last", "best"])
@pytest.mark.long
def test_reloaded_checkpoint_scores_the_same(checkpoint, tmp_path):
    config = tiny(
        "operator=spectrum",
        "schedule=linear",
        "train.epochs=3",
        "train.ema=0.8",
        f"run.dir={tmp_path}/r",
        "swap.first=4",
    )
    result = run(config)
    scores = evaluate_run(config, tmp_path / "r", checkpoint)
    assert scores["top1"] == result["top1_last" if checkpoint == "last" else "top1_best_on_test"]
    if checkpoint == "last":
        assert scores["loss"] == rows(tmp_path / "r")[-1]["test_loss"]


# Losses of ten steps in float64, where no rounding can change a neighbour.
GOLDEN = {
    "operator=convnn": [2.33787, 2.41518, 2.30436, 2.31601, 2.24358, 2.41018, 2.32265, 2.29239, 2.34579, 2.19905],
    "operator=hybrid": [2.28918, 2.35551, 2.20602, 2.23053, 2.11989, 2.27666, 2.26928, 2.16437, 2.24574, 2.16715],
    "operator=spectrum operator.blend=0.5": [
        2.31776,
        2.45482,
        2.33721,
        2.27655,
        2.33906,
        2.40753,
        2.37498,
        2.32190,
        2.29324,
        2.29292,
    ],
}


@pytest.mark.parametrize("overrides", GOLDEN)
def test_golden_losses(overrides):
    """Ten steps of a fixed configuration: a change of numerics must be seen and meant."""
    config = tiny(*overrides.split(), "data.size=320")
    dataset = load_dataset(config.data)
    model, _, size = build_model(config, dataset)
    model = model.double()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    losses = []
    for images, labels in Batches(dataset.train, 32, config.data, size, train=True).epoch():
        loss = torch.nn.functional.cross_entropy(model(images.double()), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(GOLDEN[overrides], abs=1e-5)
