"""train.py on a run folder that it is given by name alone: resume=DIR, run.dir=DIR, from_run=DIR."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from helpers import tiny
from programs import assert_refused

from convnn.config.load import load_config
from convnn.runs.contents import MARKER
from convnn.train.run import run

SMALL = ("swap.last=1", "diagnostics.enabled=false", "train.epochs=1", "seed=3")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    where = tmp_path_factory.mktemp("finished") / "r"
    run(tiny(*SMALL, f"run.dir={where}"))
    return where


@pytest.fixture
def folder(finished, call):
    """A copy of a finished run, ``a (copy)`` of the present folder."""
    return Path(shutil.copytree(finished, "a (copy)"))


@pytest.mark.parametrize("args", [["resume=a (copy)"], ["run.dir='a (copy)'", "run.if_exists=resume"]])
def test_a_run_is_named_by_its_folder_alone(args, folder, call, capsys):
    result = (folder / "result.json").read_bytes()
    assert call("train.py", args)[0] == 0
    assert (folder / "result.json").read_bytes() == result
    code, err = call("train.py", [*args, "train.epochs=2"])
    assert code == 0, err
    longer = json.loads((folder / "result.json").read_text())
    assert longer["epochs"] == 2 and longer["extended_from"] == [{"epochs": 1, "steps": 2}]
    kept = yaml.safe_load((folder / "config.yaml").read_text())
    assert kept["train"]["extended_from"] == [{"epochs": 1}] and kept["seed"] == 3


def test_a_new_run_from_a_folder(folder, call):
    before = (folder / "result.json").read_bytes()
    code, err = call("train.py", ["from_run='a (copy)'", "seed=4", "swap.last=2"])
    assert code == 0, err
    assert (folder / "result.json").read_bytes() == before
    (made,) = Path("runs").iterdir()
    config, plan = load_config(made), load_config(folder)
    assert (config.seed, config.swap.last, config.backbone) == (4, 2, plan.backbone)
    code, err = call("train.py", ["from_run='a (copy)'", "seed=4", "swap.last=2"])
    assert code == 2 and "already holds a run (complete)" in err


def test_what_goes_on_is_shown_without_a_run(folder, call, capsys):
    from convnn.cli.train import run_from_folder

    assert run_from_folder(["resume=a (copy)", "train.epochs=5", "--cfg", "job"])
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["train"]["extended_from"] == [{"epochs": 1}] and shown["run"]["dir"] == "a (copy)"
    assert not run_from_folder(["seed=1"])


@pytest.mark.long
def test_help_is_shown_beside_a_folder(folder, call):
    assert call("train.py", ["resume=a (copy)", "--help"]) == (0, "")


REFUSED = {
    "resume=none": "resume=none: there is no such folder",
    "resume=": "resume= needs the folder of a run: resume=DIR",
    "resume=.": "resume=. is not a run folder",
    "from_run=.": "from_run=. is not a run folder",
    "resume=r from_run=r": "resume=r and from_run=r: give one of them",
    "resume=r run.dir=x": "run.dir=x: resume=r names the run folder; leave it out",
    "resume=r seed=4": r"resume=r is a run of another configuration \(seed: 3 -> 4\); leave that out.*from_run=r",
    "run.dir=r run.if_exists=resume seed=4": r"run.dir=r is a run of another configuration \(seed: 3 -> 4\)",
    "resume=r sed=4": "unknown key 'sed'; did you mean 'seed'",
    "resume=r --multirun": "--multirun does not go with a run folder",
    "from_run=r optim.sched=wave": "optim.sched=wave is not one of",
}


@pytest.mark.parametrize("line", REFUSED)
def test_mistakes_are_one_line(line, finished, call):
    shutil.copytree(finished, "r")
    assert_refused(call, "train.py", line.split(), REFUSED[line])


def test_other_programs_say_where_it_belongs(call):
    assert_refused(
        call, "sweep.py", ["resume=x"], "resume=x: the same command again continues a sweep; train.py resume=DIR"
    )
    assert_refused(call, "sweep.py", ["from_run=x"], "from_run=x: train.py from_run=DIR begins one run")


def test_a_folder_that_was_about_to_be_overwritten_is_not_taken_for_the_old_run(folder, call):
    marker = json.loads((folder / MARKER).read_text())
    (folder / MARKER).write_text(json.dumps(marker | {"overwriting": True}))
    assert_refused(call, "train.py", ["resume=a (copy)"], "was about to be overwritten; give the whole command")
    (folder / "config.yaml").write_text("[torn")
    (folder / MARKER).write_text(json.dumps(marker))
    assert_refused(call, "train.py", ["resume=a (copy)"], "config.yaml is damaged")
