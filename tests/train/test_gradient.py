"""Steps in parts equal whole steps; norms of gradients and parameters equal an independent sum."""

import math
from contextlib import contextmanager, nullcontext

import pytest
import torch
from helpers import equal_states, tiny
from torch import nn
from training import HARD, rows, stop_after

from convnn.config.identity import fingerprint
from convnn.errors import ConfigError
from convnn.runs.checkpoint import load_checkpoint
from convnn.runs.folder import open_run_folder
from convnn.runtime.device import explain_out_of_memory, explain_small_batches
from convnn.train.evaluate import Meter
from convnn.train.gradient import backward, gradient_summary, parts_of_step
from convnn.train.run import run
from convnn.train.state import RunState
from convnn.train.trainer import Trainer

# Without batch normalisation, dropout and ties between neighbours; 40 images in batches of 16 end with one of 8.
SMOOTH = ["data.size=40", "train.batch_size=16", "train.label_smoothing=0.1", "train.mixup=0.4", "train.cutmix=0.5",
          "train.ema=0.9", "optim.name=sgd", "optim.lr=0.1", "optim.clip_grad=0.5", "optim.warmup_epochs=1",
          "swap=none", "diagnostics.pictures=false"]  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "images", "processes", "parts"),
    [(3, 64, 1, 3), (3, 2, 1, 1), (3, 63, 1, 2), (3, 3, 2, 1), (64, 64, 1, 64), (64, 64, 2, 32), (8, 1, 2, 1)],
)
def test_a_short_last_batch_makes_fewer_parts(asked, images, processes, parts):
    assert parts_of_step(asked, images, 64, processes) == parts


@pytest.mark.parametrize("parts, most", [(1, 1), (2, 2), (3, 3), (5, 5), (9, 5)])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_gradient_in_parts_is_that_of_the_batch(parts, most, smoothing):
    """Of unequal parts too, as 5 images in 3 parts are, and of no more parts than images."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 4))
    images, labels = torch.randn(5, 3, 2, 2), torch.randint(4, (5,))
    criterion = nn.CrossEntropyLoss(label_smoothing=smoothing)
    loss = criterion(model(images), labels)
    wanted = torch.autograd.grad(loss, list(model.parameters()))
    sizes, apart = [], []

    def forward(some):
        sizes.append(len(some))
        return model(some)

    @contextmanager
    def unsynchronised():
        apart.append(len(sizes))
        yield
        assert len(sizes) == apart[-1] + 1

    found, outputs = backward(forward, criterion, images, labels, parts, nullcontext, unsynchronised)
    assert len(sizes) == most and sum(sizes) == 5 and max(sizes) - min(sizes) <= 1
    assert apart == list(range(most - 1))  # processes meet in the last part alone
    assert found.item() == pytest.approx(loss.item(), rel=1e-6) and not found.requires_grad
    torch.testing.assert_close(outputs, model(images).detach())
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.long
def test_a_run_in_parts_equals_one_of_whole_steps(tmp_path):
    """Schedule, clipping and averages among it; the same images make the same steps."""
    for parts in (1, 3):
        run(tiny(*SMOOTH, f"train.grad_accumulation={parts}", f"run.dir={tmp_path}/{parts}", vit=True))
    whole, cut = (rows(tmp_path / str(parts)) for parts in (1, 3))
    assert [row["step"] for row in cut] == [row["step"] for row in whole]
    for name in ("train_loss", "test_loss", "lr", "grad_norm", "grad_norm_max", "param_norm"):
        assert [row[name] for row in cut] == pytest.approx([row[name] for row in whole], rel=1e-4), name
    states = [load_checkpoint(tmp_path / str(parts) / "checkpoints" / "last.pt") for parts in (1, 3)]
    for kind in ("model", "ema"):
        for name, tensor in states[0][kind].items():
            torch.testing.assert_close(states[1][kind][name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.long
def test_a_run_in_parts_is_resumed_exactly(tmp_path, monkeypatch):
    overrides = [*HARD, "train.grad_accumulation=3"]
    run(tiny(*overrides, f"run.dir={tmp_path}/whole"))
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        assert run(tiny(*overrides, f"run.dir={tmp_path}/parts"))["status"] == "interrupted"
    run(tiny(*overrides, f"run.dir={tmp_path}/parts", "run.if_exists=resume"))
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    states = [load_checkpoint(tmp_path / d / "checkpoints" / "last.pt")["model"] for d in ("whole", "parts")]
    assert equal_states(*states)


def trained(folder, *overrides):
    """Return a trainer after one step, and the row of its epoch."""
    config, found = tiny("swap.first=2", "train.max_steps=1", f"run.dir={folder}", *overrides), []
    opened = open_run_folder(config)
    trainer = Trainer(config, opened)
    opened.begin(config, trainer.data)
    trainer.fit(lambda: None, found.append)
    opened.close()
    return trainer, found[-1]


def norm(tensors):
    return math.sqrt(sum((tensor.detach().double() ** 2).sum().item() for tensor in tensors))


def test_norms_are_those_of_an_independent_sum(tmp_path):
    trainer, row = trained(tmp_path / "r")
    parameters = dict(trainer.model.named_parameters())
    assert (
        row["grad_norm"] == row["grad_norm_max"] == pytest.approx(norm(p.grad for p in parameters.values()), rel=1e-5)
    )
    assert row["param_norm"] == pytest.approx(norm(parameters.values()), rel=1e-5)
    assert len(row["layers"]) == 2 and row["layers"][0]["grad_norm"] > 0
    for layer in row["layers"]:
        own = [p for name, p in parameters.items() if name.startswith(f"{layer['name']}.")]
        assert layer["grad_norm"] == pytest.approx(norm(p.grad for p in own), rel=1e-5)
        assert layer["param_norm"] == pytest.approx(norm(own), rel=1e-5)


def test_the_norm_of_the_whole_is_before_clipping_and_that_of_layers_after(tmp_path):
    free, clipped = (trained(tmp_path / name, *more) for name, more in (("a", []), ("b", ["optim.clip_grad=0.01"])))
    assert clipped[1]["grad_norm"] == pytest.approx(free[1]["grad_norm"]) and free[1]["grad_norm"] > 0.01
    factor = 0.01 / free[1]["grad_norm"]
    for one, other in zip(free[1]["layers"], clipped[1]["layers"], strict=True):
        assert other["grad_norm"] == pytest.approx(factor * one["grad_norm"], rel=1e-3)


def test_norms_change_no_step(tmp_path):
    plain, row = trained(tmp_path / "a", "diagnostics.enabled=false")
    measured, _ = trained(tmp_path / "b")
    assert equal_states(plain.model.state_dict(), measured.model.state_dict())
    assert "param_norm" not in row and "grad_norm" not in row["layers"][0] and row["grad_norm"] > 0


def test_mean_and_largest_leave_out_what_is_not_finite():
    norms = [torch.tensor(value) for value in (1.0, math.inf, 3.0, math.nan)]
    assert gradient_summary(norms) == {"grad_norm": 2.0, "grad_norm_max": 3.0}
    assert gradient_summary([]) == gradient_summary([norms[1]]) == {"grad_norm": None, "grad_norm_max": None}


def test_a_checkpoint_of_before_has_no_norms():
    state = RunState(Meter.new(torch.device("cpu")), grad_norms=[torch.tensor(0.1), torch.tensor(2.0)])
    saved = state.to_checkpoint()
    assert torch.equal(
        torch.stack(RunState.from_checkpoint(saved, torch.device("cpu")).grad_norms), torch.tensor([0.1, 2.0])
    )
    del saved["grad_norms"], saved["layer_norms"]
    assert RunState.from_checkpoint(saved, torch.device("cpu")).grad_norms == []


def test_parts_are_part_of_a_run_where_there_are_several():
    assert (
        fingerprint(tiny("train.grad_accumulation=1"))
        == fingerprint(tiny())
        != fingerprint(tiny("train.grad_accumulation=2"))
    )


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["train.grad_accumulation=0"], r"train\.grad_accumulation=0"),
        (["train.grad_accumulation=33"], r"train\.grad_accumulation=33 cuts train\.batch_size=32"),
        (["train.grad_accumulation=2", "train.compile=reduce-overhead"], "set train.compile=true"),
    ],
)
def test_parts_that_cannot_be_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        tiny(*overrides)


def test_errors_name_the_parts():
    with (
        pytest.raises(ConfigError, match=r"train\.batch_size=32, or train\.grad_accumulation=4"),
        explain_out_of_memory(64, 2),
    ):
        raise torch.OutOfMemoryError("full")
    with (
        pytest.raises(ConfigError, match=r"train\.batch_size=8 train\.grad_accumulation=8: batch normalisation"),
        explain_small_batches(8, 8),
    ):
        raise ValueError("Expected more than 1 value per channel when training")
