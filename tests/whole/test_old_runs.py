"""Run folders that the first layout of the package left: resumed, evaluated, drawn, reported, and skipped by a sweep.

tests/support/old_runs.tar.xz: two runs stopped by a signal at step 6 of 12, with the metrics of the same runs left
alone, and a sweep of four points.
"""

import json
import tarfile
from pathlib import Path

import pytest
from helpers import without_times

from convnn.cli.evaluate import evaluate
from convnn.cli.report import report
from convnn.cli.visualize import visualize
from convnn.config.compose import compose_config
from convnn.runs.metrics import read_metrics
from convnn.sweep.sweep import run_sweep
from convnn.train.run import run

COMMON = [
    "data=digits", "data.limit=200", "data.limit_test=60", "train.epochs=3", "train.batch_size=50",
    "optim.warmup_epochs=0", "tracker=jsonl", "device=cpu",
]  # fmt: skip
COMMANDS = {
    "resnet": [
        *COMMON, "backbone=resnet18", "operator=hybrid", "operator.slots=window", "swap.init=transfer",
        "schedule=linear", "+backbone.kwargs.channels=[8,8,8,8]", "+backbone.kwargs.layers=[1,1,1,1]",
        "train.ema=0.9", "train.mixup=0.2",
    ],
    "vit": [
        *COMMON, "backbone=vit_tiny", "operator=convnn_attention", "swap=all_attention", "operator.candidates=random",
        "operator.num_candidates=10", "backbone.image_size=16", "backbone.patch_size=4", "+backbone.kwargs.depth=2",
        "+backbone.kwargs.embed_dim=24", "train.max_steps=12",
    ],
}  # fmt: skip
SWEEP = [
    *COMMON, "operator.k=4,9", "seed=0,1", "backbone=resnet18", "swap.stages=[1]",
    "+backbone.kwargs.channels=[8,8,8,8]", "+backbone.kwargs.layers=[1,1,1,1]", "train.epochs=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """The old folders, both halves resumed."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(Path(__file__).parents[1] / "support" / "old_runs.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    for name, command in COMMANDS.items():
        run(compose_config([*command, f"run.dir={folder}/old_runs/{name}_half", "run.if_exists=resume"]))
    return folder / "old_runs"


def rows(folder):
    """Rows of a run's metrics without times and what is missing, and the settings of its layers."""
    found = [without_times(row) for row in read_metrics(folder / "metrics.jsonl")]
    layers = [[(a["name"], a["blend"], a["k"], a["temperature"]) for a in row.pop("layers")] for row in found]
    new = "grad_norm", "grad_norm_max", "param_norm"  # which those runs did not measure
    return [{k: value for k, value in row.items() if value is not None and k not in new} for row in found], layers


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.long
def test_a_resumed_half_arrives_at_the_whole(name, old):
    (half, layers), (whole, layers_of_whole) = rows(old / f"{name}_half"), rows(old / f"{name}_whole")
    assert len(half) == 3 and half == [pytest.approx(row, rel=1e-4) for row in whole]
    assert layers == layers_of_whole
    a, b = (json.loads((old / f"{name}_{x}/result.json").read_text()) for x in ("half", "whole"))
    assert a["status"] == "complete" and a["steps"] == 12
    for key in ("fingerprint", "params", "layers_replaced", "gflops", "top1_last"):
        assert a[key] == b[key], key


@pytest.mark.parametrize("name, checkpoint", [("resnet", "last"), ("resnet", "best"), ("vit", "last")])
def test_an_old_run_is_evaluated(name, checkpoint, old, capsys):
    result = json.loads((old / f"{name}_half/result.json").read_text())
    capsys.readouterr()
    evaluate([f"run={old}/{name}_half", f"checkpoint={checkpoint}", "device=cpu"])
    scores = json.loads(capsys.readouterr().out)
    assert scores["top1"] == result["top1_last" if checkpoint == "last" else "top1_best_on_test"]


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.long
def test_an_old_run_is_drawn(name, old, tmp_path):
    pytest.importorskip("matplotlib")
    visualize([f"run={old}/{name}_half", f"out={tmp_path}", "queries=1,1"])
    assert {"neighbors.png", "blends.svg", "training.png"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.long
def test_old_folders_are_reported(old, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    report([*(f"{old}/{name}" for name in ("resnet_half", "vit_half", "sweep")), f"out={tmp_path}/report"])
    assert "6 runs: 6 complete" in capsys.readouterr().out
    assert (tmp_path / "report" / "index.html").stat().st_size > 10_000


def test_an_old_sweep_is_whole(old, capsys):
    before = {path: path.read_bytes() for path in (old / "sweep" / "status").iterdir()}
    assert run_sweep([*SWEEP, f"sweep.dir={old}/sweep", "sweep.report=false"]) == 0
    assert "4 points (4 complete), 0 to run" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in (old / "sweep" / "status").iterdir()} == before
