"""Every bad input of the users' list, by group: one line that names the key and the way out, and nothing changed.

The programs are called in this process. Groups whose faults need real processes are tested elsewhere, see ELSEWHERE.
"""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY, TINY_VIT, write_image_folder
from programs import ROOT, assert_refused

from convnn.cli import program as cli
from convnn.data import folders
from convnn.errors import EXIT_CONFIG, EXIT_DIVERGED
from convnn.runs import folder as rundir

SMALL = [*TINY, "swap.last=1", "train.epochs=1"]


# ------------------------------------------------------------- commands that are wrong before torch is imported

COMMANDS = [
    ("01", "operator.kk=9", r"did you mean 'operator\.k'\?"),
    ("01", "+operator.kk=9", r"did you mean 'operator\.k'\?"),
    ("01", "++operator.kk=9", r"did you mean 'operator\.k'\?"),
    ("01", "operator=convn", "did you mean 'convnn'"),
    ("01", "experiment=quickstrat", "did you mean 'quickstart'"),
    ("01", "experimnt=quickstart", "did you mean 'experiment'"),
    ("02", "operator.k=abc", r"operator\.k"),
    ("02", "operator.k=1.5", r"operator\.k"),
    ("02", "operator.k=null", r"operator\.k"),
    ("02", "operator.k=0", r"operator\.k=0 must lie in \[1"),
    ("02", "operator.k=-1", r"operator\.k=-1 must lie in \[1"),
    ("02", "operator.candidates=random operator.num_candidates=4", r"raise operator\.num_candidates"),
    ("03", "operator.blend=1.5", r"operator\.blend=1\.5 must lie in \[0, 1\]"),
    ("03", "operator.blend=-0.1", r"operator\.blend"),
    ("03", "operator.blend=nan", r"operator\.blend=nan must lie"),
    ("03", "operator=hybrid operator.branch_ratio=1.1", r"operator\.branch_ratio"),
    ("03", "operator=hybrid operator.branch_ratio=nan", r"operator\.branch_ratio"),
    ("05", "backbone=resnet81", "did you mean 'resnet18'"),
    ("05", "backbone=vit_tiny data.image_size=33", r"backbone\.patch_size=\d+ does not divide"),
    ("06", "data=cifar1000", "did you mean 'cifar100'"),
    ("13", "device=gpu", "device=gpu is not one of auto"),
    ("14", "train.batch_size=0", r"train\.batch_size=0 must lie in \[1"),
    ("14", "train.epochs=0", r"train\.epochs"),
    ("14", "optim.lr=0", r"optim\.lr"),
    ("14", "optim.lr=-0.1", r"optim\.lr"),
    ("14", "optim.lr=inf", r"optim\.lr"),
    ("14", "seed=-1", "seed"),
    ("14", "data.workers=-1", r"data\.workers"),
    ("14", "train.skip_nonfinite=-1", r"train\.skip_nonfinite"),
    ("15", "operator.k=1,9", "sweep.py takes several"),
    ("18", "tracker.mode=onlin", "did you mean 'online'"),
]


CHECK_ALL = """
import contextlib, io, json, os, sys, time
from convnn.cli.train import check_arguments
found = []
for line in sys.stdin.read().splitlines():
    err, code = io.StringIO(), 0
    with contextlib.redirect_stderr(err):
        try:
            check_arguments(line.split())
        except SystemExit as error:
            code = error.code
    found.append([code, err.getvalue(), "torch" in sys.modules, time.process_time()])
print(json.dumps([found, os.listdir()]))
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """What one process without torch says to each of the commands."""
    folder = tmp_path_factory.mktemp("empty")
    lines = "\n".join(args for _, args, _ in COMMANDS)
    command = [sys.executable, "-c", CHECK_ALL]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, input=lines, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    found, files = json.loads(done.stdout)
    assert files == []
    assert found[0][3] < 2  # seconds of CPU time, with all imports
    return {args: rest for (_, args, _), rest in zip(COMMANDS, found, strict=True)}


@pytest.mark.parametrize("args, hint", [pytest.param(a, h, id=f"group{g}-{a}") for g, a, h in COMMANDS])
def test_a_wrong_command(args, hint, refusals):
    code, err, torch_loaded, _ = refusals[args]
    assert code == EXIT_CONFIG and not torch_loaded
    assert err.startswith("error: ") and err.count("\n") == 1 and re.search(hint, err), err


# ------------------------------------------------------------------------- what shows when the parts are built

BUILT = [
    ("02", TINY, "operator.k=200", r"layer '.*': k=200 exceeds"),
    ("03", TINY, "operator=hybrid operator.branch_ratio=0.01", "branch_ratio"),
    ("04", TINY, "swap.depths=[99]", "depths"),
    ("04", TINY, "swap.match=layer9.*", r"layer9\.\*"),
    ("04", TINY, "+swap.rules.a.match=layer1.* +swap.rules.b.match=layer*", r"layer1\.0\.conv1"),
    ("05", TINY, "backbone.name=resnet81", "did you mean 'resnet"),
    ("05", TINY_VIT, "backbone.patch_size=5", "do not divide the image side 16|does not divide"),
    ("05", TINY_VIT, "+backbone.kwargs.num_heads=5", "num_heads"),
    ("06", TINY, "data=cifar10 data.root=nowhere data.download=false", r"put cifar-10-python\.tar\.gz .* into"),
    ("06", TINY, "data=imagefolder data.root=nowhere", "expected train/CLASS/IMAGE"),
    ("14", TINY, "train.batch_size=1000", r"train\.batch_size=1000 exceeds the 64"),
    ("14", TINY, "data.val_fraction=0.001", r"data\.val_fraction"),
    ("14", TINY, "optim.name=adamx", r"optim\.name=adamx"),
]


@pytest.mark.parametrize("base, args, hint", [pytest.param(b, a, h, id=f"group{g}-{a}") for g, b, a, h in BUILT])
@pytest.mark.long
def test_parts_that_do_not_fit(base, args, hint, call):
    assert_refused(call, "train.py", [*base, *args.split()], hint)


NET = """
import timm
from torch import nn
@timm.models.register_model
def {name}(pretrained=False, num_classes=10, **kwargs):
    layers = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, {conv})
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))
"""


@pytest.mark.parametrize(
    "name, conv, why",
    [
        ("net_wide", "4", "4x4 kernel and needs operator.k >= 16, not 9, or operator.k=kernel"),
        ("net_reflect", "3, padding_mode='reflect'", "padding_mode=reflect"),
    ],
)
def test_group04_convolutions_that_cannot_be_transferred(name, conv, why, call, tmp_path, monkeypatch):
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / f"{name}.py").write_text(NET.format(name=name, conv=conv))
    monkeypatch.syspath_prepend(str(tmp_path / "nets"))
    own = [a for a in TINY if "kwargs" not in a]
    backbone = [f"backbone.module={name}", f"backbone.name={name}", "backbone.stem=default"]
    assert_refused(call, "train.py", [*own, *backbone, "swap.init=transfer", "operator=spectrum"], rf"'1'.*{why}")


def test_group06_an_archive_cut_off_and_no_network(call, monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    data = Path("data")
    assert_refused(call, "train.py", [*SMALL, "data=cifar10"], r"no download .*put cifar-10-python\.tar\.gz")
    data.mkdir()
    (data / "cifar-10-python.tar.gz").write_bytes(b"\x1f\x8b cut off")
    assert_refused(call, "train.py", [*SMALL, "data=cifar10"], r"no valid files in .*put cifar-10-python\.tar\.gz")


def test_group06_image_folders(call, monkeypatch):
    args = [*SMALL, "data=imagefolder", "data.root=images"]
    write_image_folder(Path("images"), per_class=2)
    (Path("images") / "test" / "cat").rename(Path("images") / "test" / "bird")
    assert_refused(call, "train.py", args, "classes differ: train lacks 'bird'; test lacks 'cat'")

    def unreadable(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(folders, "os", SimpleNamespace(**{**vars(os), "scandir": unreadable}))
    with monkeypatch.context() as patch:
        patch.setattr(rundir.RunFolder, "discard", lambda self: shutil.rmtree(self.path.parent))
        assert_refused(call, "train.py", args, r"data\.root=images cannot be read: .*Permission denied")


def test_group07_pretrained_without_a_network(call, monkeypatch):
    def offline(*_, **__):
        raise OSError("We couldn't connect to 'https://huggingface.co'")

    monkeypatch.setattr("timm.models._builder.load_pretrained", offline)
    own = [a for a in SMALL if "kwargs" not in a]
    assert_refused(
        call, "train.py", [*own, "backbone.pretrained=true"], r"backbone\.pretrained=true: .*backbone\.checkpoint=FILE"
    )


def test_group12_divergence(call):
    code, err = call("train.py", [*SMALL, "optim=sgd", "optim.lr=1e30", "optim.sched=constant", "run.dir=r"])
    assert code == EXIT_DIVERGED and err.count("\n") == 1
    assert re.search(
        r"diverged: (loss|gradient) is not finite at step \d+ \(epoch 1, lr 1e\+30\); there is no check", err
    )
    result = json.loads(Path("r/result.json").read_text())
    assert result["status"] == "diverged" and result["exit_code"] == EXIT_DIVERGED


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_group13_no_cuda(call):
    assert_refused(
        call, "train.py", [*SMALL, "device=cuda"], "device=cuda: this machine has 0 .* set device=cpu or auto"
    )


@pytest.mark.parametrize("where", ["_build_training", "_train_step"])
def test_group13_out_of_cuda_memory(where, call, monkeypatch):
    from convnn.train.trainer import Trainer

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(Trainer, where, out_of_memory)
    code, err = call("train.py", [*SMALL, "run.dir=r"])
    way_out = "try train.batch_size=16, or train.grad_accumulation=2"
    assert (code, err) == (EXIT_CONFIG, f"error: out of CUDA memory; {way_out}\n")
    assert Path("r").exists() == (where == "_train_step")


@pytest.mark.parametrize(
    "args, hint",
    [
        pytest.param([], "the sweep has no points", id="group15-empty"),
        pytest.param(["grid=spectrm"], "did you mean 'spectrum'", id="group15-unknown-grid"),
        pytest.param(["+sweep.axes.seed=[]"], r"sweep\.axes\.seed is empty", id="group15-empty-axis"),
        pytest.param(["hydra/launcher=submitit_slurm", "seed=0,1"], "no srun here|uv sync --extra slurm", id="group16"),
    ],
)
def test_a_wrong_sweep(args, hint, call, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert_refused(call, "sweep.py", args, hint)


def test_group15_duplicates_are_merged():
    from convnn.sweep.options import SweepConfig
    from convnn.sweep.plan import make_plan

    assert make_plan(SweepConfig(), ["seed=0,0,1"]).duplicates == 1


SCRIPT = {
    "rum=x": "did you mean 'run'",
    "": "run: is required",
    "x": "not key=value",
    "run=.": "not a run folder",
    "run=. checkpoint=first": "last, best",
}


@pytest.mark.parametrize("args", SCRIPT)
def test_a_wrong_script_argument(args, call):
    assert_refused(call, "scripts/evaluate.py", args.split(), SCRIPT[args])


def test_debug_shows_the_traceback(call):
    with pytest.raises(cli.ConfigError, match=r"operator\.k=0"):
        call("train.py", ["operator.k=0", "debug=true"])


ELSEWHERE = {
    11: "scripts/fault_trials.py: SIGKILL inside a write",
    19: "tests/report/test_report.py: def test_script_fails_with_one_line",
    18: "tests/runs/test_tracking.py: def test_wandb_never_prompts_or_blocks",
    20: "tests/sweep/test_sweep.py: def test_signals_leave_checkpoints_and_no_process",
}


def test_no_group_is_left_out():
    files = (ROOT / "tests" / "whole" / "test_bad_inputs.py", ROOT / "tests" / "runs" / "test_bad_files.py")
    here = "".join(file.read_text() for file in files)
    groups = {int(n) for n in re.findall(r"group(\d\d)", here)} | {int(g) for g, *_ in [*COMMANDS, *BUILT]}
    assert groups | set(ELSEWHERE) == set(range(1, 21))
    for place in ELSEWHERE.values():
        file, _, text = place.partition(": ")
        assert text in (ROOT / file).read_text()
