"""The programs as a user starts them: exit codes, one-line errors, signals, resume."""

import json
import os
import re
import resource
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import TINY, TINY_VIT, without_times

from convnn.config.compose import compose_config
from convnn.models.backbones import create_backbone
from convnn.runs.checkpoint import load_checkpoint
from convnn.runs.metrics import read_metrics
from convnn.train.run import run

ROOT = Path(__file__).resolve().parents[2]
ENV = os.environ | {"PYTHONUNBUFFERED": "1"}


def call(script, *args, cwd=ROOT):
    return subprocess.run(
        [sys.executable, str(ROOT / script), *args], cwd=cwd, env=ENV, capture_output=True, text=True, timeout=300
    )


def start(*args):
    return subprocess.Popen(
        [sys.executable, "train.py", *args],
        cwd=ROOT,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def script(name, args, monkeypatch, capsys):
    """Run a script in this process, which has torch already; return its output, or exit code and last error."""
    monkeypatch.setattr(sys, "argv", [name, *args])
    capsys.readouterr()
    runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.long
def test_train_then_evaluate(tmp_path, monkeypatch, capsys):
    where = f"run.dir={tmp_path}/r"
    done = call("train.py", *TINY, "swap.last=2", where)
    assert done.returncode == 0, done.stderr
    assert "top-1" in done.stdout and "it/s" not in done.stderr  # no progress bar when output is no terminal
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    scores = json.loads(script("evaluate.py", [f"run={tmp_path}/r", "checkpoint=last"], monkeypatch, capsys))
    assert scores["top1"] == result["top1_last"]


def test_export_of_a_run_loads_into_plain_timm(tmp_path, monkeypatch, capsys):
    vit = [*TINY_VIT, "operator=mhsa", "swap.init=transfer", "train.epochs=1", f"run.dir={tmp_path}/r"]
    config = compose_config(vit)
    run(config)
    assert json.loads(script("export.py", [f"run={tmp_path}/r"], monkeypatch, capsys))["layers"] == 2
    plain = create_backbone(config.backbone, 10, 3, 16)
    plain.load_state_dict(torch.load(tmp_path / "r" / "exported.pt", weights_only=True))
    run(compose_config([*TINY, "operator=hybrid", "train.max_steps=1", f"run.dir={tmp_path}/h"]))
    with pytest.raises(SystemExit, match="2"):
        script("export.py", [f"run={tmp_path}/h"], monkeypatch, capsys)
    err = capsys.readouterr().err
    assert "cannot be exported" in err and err.count("\n") == 1


def test_a_wrong_command_is_one_line_within_seconds(tmp_path):
    """The program itself; the whole list is in test_bad_inputs.py."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = call("train.py", "operator.kk=9", cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 4  # 1.2 s alone on a core; loading torch and timm is far above it
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "did you mean 'operator.k'?" in done.stderr and not any(tmp_path.iterdir())


def test_help_names_the_groups():
    done = call("train.py", "--help")
    assert done.returncode == 0
    for text in ("experiment=quickstart", "operator:", "hybrid", "run.if_exists", "exit codes"):
        assert text in done.stdout


LONG = [
    *TINY,
    "swap.last=4",
    "operator=spectrum",
    "schedule=linear",
    "data.size=512",
    "train.epochs=4",
    "data.flip=true",
]


def wait_for(path, text, process, timeout=120):
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if path.exists() and re.search(text, path.read_text()):
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    raise AssertionError(f"{text} did not appear in {path}")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Rows of the whole run, in this process."""
    folder = tmp_path_factory.mktemp("whole")
    run(compose_config([*LONG, f"run.dir={folder}/w"]))
    return [without_times(r) for r in read_metrics(folder / "w" / "metrics.jsonl")]


@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
@pytest.mark.long
def test_stopped_and_resumed_equals_uninterrupted(signum, tmp_path, uninterrupted):
    process = start(*LONG, f"run.dir={tmp_path}/r")
    wait_for(tmp_path / "r" / "metrics.jsonl", '"epoch": 1', process)
    process.send_signal(signum)
    process.communicate(timeout=60)
    if signum == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        assert not (tmp_path / "r" / "result.json").exists()
    else:
        assert process.returncode == 128 + signum
        result = json.loads((tmp_path / "r" / "result.json").read_text())
        assert result["status"] == "interrupted" and result["signal"] == signum.name
    run(compose_config([*LONG, f"run.dir={tmp_path}/r", "run.if_exists=resume"]))
    rows = [without_times(r) for r in read_metrics(tmp_path / "r" / "metrics.jsonl")]
    assert rows == uninterrupted and len(rows) == 4


@pytest.mark.slow
def test_a_signal_that_arrives_twice_at_once_still_leaves_a_checkpoint(tmp_path):
    process = start(*LONG, f"run.dir={tmp_path}/r")
    wait_for(tmp_path / "r" / "metrics.jsonl", '"epoch": 0', process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    # The second may meet an interpreter that is shutting down, whose handlers are gone.
    assert process.returncode in (128 + signal.SIGINT, -signal.SIGINT)
    assert load_checkpoint(tmp_path / "r" / "checkpoints" / "last.pt")["step"] > 0
    assert json.loads((tmp_path / "r" / "result.json").read_text())["status"] == "interrupted"


@pytest.mark.long
def test_multirun_of_train(tmp_path):
    done = call(
        "train.py",
        "--multirun",
        *TINY,
        "swap.last=2",
        "train.epochs=1",
        "operator.k=4,9",
        f"run.root={tmp_path}/runs",
        f"hydra.sweep.dir={tmp_path}/multirun",
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(p.read_text()) for p in (tmp_path / "runs").glob("*/result.json")]
    assert len(results) == 2 and len({r["fingerprint"] for r in results}) == 2


def test_a_users_own_operator_is_one_file(tmp_path, monkeypatch):
    (tmp_path / "my_operators.py").write_text(
        "from torch import nn\n\n\n"
        "class Shift(nn.Module):\n"
        "    def __init__(self, conv):\n"
        "        super().__init__()\n"
        "        self.mix = nn.Conv2d(conv.in_channels, conv.out_channels, 1, conv.stride)\n\n"
        "    def forward(self, x):\n"
        "        return self.mix(x.roll((1, 1), (2, 3)))\n\n"
        "    @classmethod\n"
        "    def from_layer(cls, layer, config, init, site):\n"
        "        return cls(layer)\n"
    )
    shift = ["operator.name=shift", "operator.target=my_operators.Shift", "swap.last=2"]
    monkeypatch.syspath_prepend(str(tmp_path))
    assert run(compose_config([*TINY, *shift, f"run.dir={tmp_path}/r"]))["status"] == "complete"
    assert "Shift" in (tmp_path / "r" / "swap.txt").read_text()
