"""The wheel in an environment of its own: every program from an empty folder outside the checkout."""

import json
import os
import shutil
import site
import subprocess
import venv
import zipfile
from pathlib import Path

import pytest
from helpers import TINY
from own_options import OPERATOR, write_options

from convnn.config.folders import CONF_DIR
from convnn.version import __version__

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("uv") is None, reason="uv builds the wheel")]
ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("train", "sweep", "evaluate", "predict", "prepare-data", "report", "compare", "visualize", "export")
PROGRAMS += ("reproduce", "status")
QUICK = ["tracker=jsonl", "device=cpu"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from the source distribution as ``uv build`` does."""
    folder = tmp_path_factory.mktemp("dist")
    done = subprocess.run(["uv", "build", "--out-dir", folder, ROOT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (folder / f"convnn-{__version__}.tar.gz").is_file()
    return folder / f"convnn-{__version__}-py3-none-any.whl"


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A function that calls a program of the environment in a folder outside the checkout, and that folder."""
    home, work = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("work")
    venv.create(home)
    python = home / "bin" / "python"
    install = ["uv", "pip", "install", "--no-deps", "--no-index", "--python", python, wheel]
    assert subprocess.run(install, capture_output=True).returncode == 0
    (own,) = home.glob("lib/python*/site-packages")
    # The dependencies are those of this environment. Its own .pth files, such as the checkout's, have no effect there.
    (own / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "CONVNN_CONFIG_PATH")}

    def call(program, *args):
        command = [home / "bin" / program, *args]
        done = subprocess.run(command, cwd=work, env=kept, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{program} {' '.join(args)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    found = call("python", "-c", "import convnn; print(convnn.__file__, convnn.__version__)").split()
    assert Path(found[0]).is_relative_to(own) and found[1] == __version__
    return call, work


def test_the_wheel_has_all_of_conf_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    packed = {f"convnn/conf/{path.relative_to(CONF_DIR)}" for path in CONF_DIR.rglob("*") if path.is_file()}
    assert {"convnn/conf/table/vgg11_k.csv", "convnn/conf/config.yaml"} <= packed <= names
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "convnn").rglob("*.py")}
    data = {"convnn/py.typed", "convnn/report/page.css", "convnn/report/page.js"}
    assert names == packed | modules | data


def test_one_run_from_training_to_a_report(installed):
    call, work = installed
    assert list(work.iterdir()) == []
    call("convnn-train", "experiment=quickstart", "train.max_steps=5", "run.dir=first", *QUICK)
    result = json.loads((work / "first" / "result.json").read_text())
    assert result["status"] == "complete" and result["steps"] == 5
    assert json.loads(call("convnn-evaluate", "run=first", "device=cpu"))["top1"] == result["top1_last"]
    assert "first/pictures/neighbors.png" in call("convnn-visualize", "run=first", "layers=layer1.0.conv1.neighbors")
    assert "1 runs: 1 complete" in call("convnn-report", "first", "out=report")
    assert (work / "report" / "index.html").is_file()


def test_options_and_modules_of_a_users_own(installed):
    call, work = installed
    write_options(work / "conf")
    (work / "my_shift.py").write_text(OPERATOR)
    tiny = [*TINY, "swap.last=1", "train.epochs=1"]
    text = call("convnn-sweep", "--config-dir", "conf", "operator=mine,convnn", *tiny, "sweep.dir=sweep")
    assert "sweep sweep: 2 complete" in text
    (mine,) = (work / "sweep" / "points").glob("*-mine-*")
    assert "Shift" in (mine / "swap.txt").read_text()
    assert "top1" in json.loads(call("convnn-evaluate", f"run={mine}", "device=cpu"))
    again = call("convnn-sweep", "hydra.searchpath=[conf]", "operator=mine,convnn", *tiny, "sweep.dir=sweep")
    assert "2 points (2 complete), 0 to run" in again


def test_every_program_says_how_it_is_called(installed):
    call, _ = installed
    for program in PROGRAMS:
        assert f"convnn-{program}" in call(f"convnn-{program}", "--help")
    rows = "rows=cifar10-k1-conv1", "dry_run=true"
    assert "1 equal or unpublished, 0 different" in call("convnn-reproduce", "table=vgg11_k", *rows)
