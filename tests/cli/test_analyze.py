"""scripts/analyze.py: what it refuses, in one line, and what it prints."""

import shutil
import sys

import pytest
from fake_runs import write_run
from folder_runs import folder_config, write_pets
from programs import assert_refused

from convnn.analysis.registry import ANALYSES
from convnn.cli import analyze as analyze_module
from convnn.cli.analyze import analyze
from convnn.train.run import run

pytest.importorskip("pandas")
pytest.importorskip("matplotlib")
SCRIPT = "scripts/analyze.py"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "name a folder that holds runs"),
        (["{done}", "analyses=[erff]"], "analyses=erff is not one of .*did you mean 'erf'"),
        (["{done}", "analyses=erf,nothing"], "analyses=nothing is not one of"),
        (["{done}", "analyses=[]"], "names none"),
        (["{done}", "images=0"], "images=0 must"),
        (["{done}", "images=many"], "images"),
        (["{done}", "checkpoint=first"], "checkpoint=first"),
        (["{done}", "depth=3"], "depth"),
        (["nowhere"], "nowhere: no such folder"),
        (["{empty}"], "no runs in .*empty"),
        (
            ["{done}", "out={done}/config.yaml/x"],
            "out=.*config.yaml/x cannot be written: Not a directory; name another",
        ),
        (["{open}"], "no finished run in .*open: 1 unfinished"),
    ],
)
def test_what_cannot_be_analysed_is_one_line(args, said, tmp_path, call):
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "done")
    write_run(tmp_path / "open", status=None)
    places = {name: tmp_path / name for name in ("done", "empty", "open")}
    assert_refused(call, SCRIPT, [arg.format(**places) for arg in args], said)


def test_without_matplotlib_it_says_what_to_install(tmp_path, call, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert_refused(call, SCRIPT, [str(write_run(tmp_path / "done"))], "needs pandas, matplotlib and scipy: uv sync")


def test_a_run_without_its_checkpoint_fails_and_is_named(tmp_path, call):
    code, err = call(SCRIPT, [str(write_run(tmp_path / "done")), "analyses=erf", "device=cpu"])
    assert code == 1 and "last.pt: no such checkpoint" in err and len([x for x in err.splitlines() if x]) == 2


def test_help_names_every_analysis(capsys):
    with pytest.raises(SystemExit):
        analyze(["--help"])
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in ANALYSES)


def test_a_sweeps_runs_become_pictures_tables_and_a_summary(tmp_path, capsys):
    write_pets(tmp_path / "pets")
    run(folder_config(tmp_path / "pets", tmp_path / "s" / "a", "operator=convnn"))
    shutil.copytree(tmp_path / "s" / "a", tmp_path / "s" / "copy")  # one configuration counts once
    write_run(tmp_path / "s" / "open", status=None, seed=7)
    capsys.readouterr()
    assert analyze([str(tmp_path / "s"), "analyses=variance,distance", "images=4", "device=cpu"]) == 0
    out, err = capsys.readouterr()
    assert "left out: 1 unfinished (open)" in err and err.count("\nvariance ") == 1
    lines = out.splitlines()
    assert lines[1].split()[:3] == ["variance", "1", "1"] and lines[-1] == "2 measured, 0 kept, 0 runs failed"
    assert {"variance.png", "variance.csv", "distance.svg"} <= {
        file.name for file in (tmp_path / "s" / "analyses").iterdir()
    }
    assert analyze([str(tmp_path / "s"), "analyses=distance", "images=4", "device=cpu"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0 measured, 1 kept, 0 runs failed"
    assert (tmp_path / "s" / "analyses" / "variance.png").exists()  # of the call before
    (tmp_path / "s" / "analyses" / "distance.csv").write_text("mine")
    with pytest.raises(Exception, match=r"distance\.csv would be replaced"):
        analyze([str(tmp_path / "s"), "analyses=distance", "images=4", "device=cpu"])


def test_a_place_to_write_to_is_tried_and_left_as_it_was(tmp_path):
    analyze_module._check_writable(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


def test_arms_are_named_among_those_that_are_measured(tmp_path):
    write_run(tmp_path / "done", {"operator.blend": 0.5})
    write_run(tmp_path / "open", {"operator.blend": 1.0}, status=None)
    (arm,), left_out = analyze_module._arms([tmp_path])
    assert arm.name == "all runs" and left_out == "1 unfinished (open)"
