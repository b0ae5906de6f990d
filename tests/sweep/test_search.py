"""hydra/sweeper=optuna: which runs a search makes, what the study knows of them, and what a kill leaves."""

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
from hydra.core.global_hydra import GlobalHydra
from optuna.storages.journal import JournalFileBackend
from sweeps import stand_in_for_train, sweep, wait_for

from convnn.config.compose import CONF_DIR
from convnn.errors import ConfigError
from convnn.runtime.locks import lock
from convnn.sweep import process
from convnn.sweep.plan import Point
from convnn.sweep.space import read_space
from convnn.sweep.state import prune_file
from convnn.sweep.study import JOURNAL, Follower, SearchConfig, open_study
from convnn.sweep.sweep import run_sweep

SEARCH = ["hydra/sweeper=optuna", "operator=spectrum", "train.epochs=6", "sweep.warm=false"]
BLEND = "operator.blend=interval(0,1)"


STAND_IN = Path(__file__).parents[1] / "support" / "search_train.py"


@pytest.fixture
def search(tmp_path, monkeypatch, capsys):
    """Return a function that searches in this process, with the stand-in for training."""
    monkeypatch.setattr(process, "TRAIN", ("-m", STAND_IN.stem))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(STAND_IN.parent), str(CONF_DIR.parent)]))
    monkeypatch.setattr(sys, "argv", ["sweep.py"])
    monkeypatch.chdir(tmp_path)

    def run(*overrides):
        capsys.readouterr()
        code = run_sweep(["sweep.dir=sweep", "tracker=jsonl", "sweep.report=false", *overrides])
        GlobalHydra.instance().clear()
        return code, capsys.readouterr().out

    return run


def trials(tmp_path):
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(tmp_path / "sweep" / JOURNAL)))
    return optuna.load_study(study_name="convnn", storage=storage).trials


def calls(tmp_path):
    return {path.parent.name: path.read_text().split("\n")[:-1] for path in tmp_path.glob("sweep/points/*/calls")}


@pytest.mark.long
def test_the_best_is_told_and_the_study_goes_on(search, tmp_path):
    arguments = [*SEARCH, BLEND, "hydra.sweeper.pruner=none"]
    code, text = search(*arguments, "hydra.sweeper.n_trials=3")
    assert code == 0, text
    found = trials(tmp_path)
    assert [t.state.name for t in found] == ["COMPLETE"] * 3
    assert [t.value for t in found] == pytest.approx([40 * t.params["operator.blend"] + 5 for t in found], abs=1e-3)
    best = max(found, key=lambda t: t.value)
    assert f"best: trial {best.number}, val top-1 {best.value:.2f} %" in text and "warning" not in text
    assert "to train it again: uv run train.py " in text and "operator=spectrum train.epochs=6" in text
    assert f"operator.blend={best.params['operator.blend']:.6g}\n" in text
    before = calls(tmp_path)
    code, text = search(*arguments, "hydra.sweeper.n_trials=3")
    assert code == 0 and calls(tmp_path) == before and "3 of 3 trials (3 complete)" in text
    code, text = search(*arguments, "hydra.sweeper.n_trials=4")
    assert code == 0 and len(calls(tmp_path)) == 4
    assert len({t.params["operator.blend"] for t in trials(tmp_path)}) == 4


@pytest.mark.long
def test_a_killed_search_loses_and_doubles_nothing(search, tmp_path):
    arguments = [*SEARCH, BLEND, "hydra.sweeper.n_trials=3", "hydra.sweeper.pruner=none"]
    driver = stand_in_for_train(tmp_path / "path", STAND_IN)
    killed = sweep(driver, tmp_path, *arguments, "+data.options.seconds=0.4", wait=False)
    end = time.monotonic() + 300
    journal = tmp_path / "sweep" / JOURNAL
    while not journal.exists() or '"intermediate_value"' not in journal.read_text():
        assert time.monotonic() < end and killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    killed.communicate()
    (running,) = trials(tmp_path)
    assert running.state.name == "RUNNING" and running.intermediate_values
    code, text = search(*arguments, "+data.options.seconds=0.4")
    assert code == 0, text
    found, made = trials(tmp_path), calls(tmp_path)
    assert [t.state.name for t in found] == ["COMPLETE"] * 3 and found[0].params == running.params
    assert len(made) == 3 and sorted(map(len, made.values())) == [1, 1, 2]
    (resumed,) = [name for name, one in made.items() if len(one) == 2]
    assert Path(found[0].user_attrs["run"]).name == resumed and int(made[resumed][1].split()[1]) > 0
    assert list(found[0].intermediate_values) == [0, 1, 2, 3, 4, 5]


@pytest.mark.long
def test_what_is_worse_than_the_others_ends_early_and_can_go_on(search, tmp_path):
    arguments = [*SEARCH, BLEND, "hydra.sweeper.n_trials=6", "hydra.sweeper.sampler=random", "+data.options.seconds=1"]
    early = ["hydra.sweeper.startup_trials=1", "hydra.sweeper.warmup_epochs=0"]
    code, text = search(*arguments, *early)
    assert code == 0, text
    found = trials(tmp_path)
    pruned = [t for t in found if t.state.name == "PRUNED"]
    best = max(t.params["operator.blend"] for t in found)
    assert pruned and not any(t.params["operator.blend"] == best for t in pruned)
    assert {t.state.name for t in found} == {"PRUNED", "COMPLETE"}
    folder = tmp_path / "sweep" / pruned[0].user_attrs["run"]
    epochs = len((folder / "metrics.jsonl").read_text().splitlines())
    assert 0 < epochs < 6 and not (folder / "result.json").exists()
    records = [json.loads(path.read_text()) for path in tmp_path.glob("sweep/status/*.json")]
    (record,) = [r for r in records if r["name"] == folder.name]
    assert record["status"] == "pruned" and record["reason"].startswith("pruned after epoch ")
    assert f"trial {pruned[0].number}: {record['reason']}" in text
    assert not list(tmp_path.glob("sweep/status/*.prune"))
    blend = f"operator.blend={pruned[0].params['operator.blend']:.6g}"
    code, text = search("operator=spectrum", "train.epochs=6", "+data.options.seconds=1", blend)
    assert code == 0 and calls(tmp_path)[folder.name] == ["from 0", f"from {epochs}"], text


def test_nothing_is_left_of_a_request_that_came_too_late(tmp_path):
    """The run has ended by itself in the moment when it was told to."""
    point = Point("p", "0" * 16, ("seed=1",))
    asked = prune_file(tmp_path, point)
    asked.parent.mkdir()

    def report(folder, *, judge):
        asked.write_text("pruned after epoch 2")

    with Follower(tmp_path, [SimpleNamespace(point=point, report=report)]):
        wait_for("status/*.prune", tmp_path)
    assert not asked.exists()


@pytest.mark.long
def test_failures_stop_nothing_and_equal_trials_are_one_run(search, tmp_path):
    code, text = search(*SEARCH, "operator.blend=0.5", "seed=1,13", "data.name=no_val", "hydra.sweeper.n_trials=8")
    assert code == 0, text
    found = trials(tmp_path)
    assert {t.state.name for t in found} == {"COMPLETE", "FAIL"} and len(found) == 8
    assert all((t.state.name == "FAIL") == (t.params["seed"] == "13") for t in found)
    made = {name: len(one) for name, one in calls(tmp_path).items()}
    assert len(made) == 2 and min(made.values()) == 1
    assert "failed: RuntimeError: a fault of the test" in text
    assert text.count("warning: there are no validation images") == 1 and "note: there are no" in text
    again = [*SEARCH, "operator.blend=0.5", "seed=1,13", "data.name=no_val", "hydra.sweeper.n_trials=8"]
    search(*again, "sweep.retry_failed=false")
    assert {name: len(one) for name, one in calls(tmp_path).items()} == made
    code, text = search(*again)
    assert code == 0 and "8 of 8 trials" in text
    after = {name: len(one) for name, one in calls(tmp_path).items()}
    assert sum(after[name] > made[name] for name in made) == 1  # what failed is tried again, what is complete is not


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["operator.blend=0.5"], "has nothing to choose"),
        ([BLEND, "hydra/launcher=submitit_slurm"], "hydra/launcher=joblib here|there is no srun here"),
        ([BLEND, "hydra.sweeper.sampler=gp"], "sampler"),
        ([BLEND, "hydra.sweeper.n_trials=0"], "n_trials"),
        ([BLEND, "hydra.sweeper.trials=3"], "trials"),
        (["optim.lr=tag(log,interval(0,1))"], "cannot be searched"),
        (["operator.k=tag(log,range(1,9))"], "the only tag is log"),
        (["operator.k=int(interval(0.1,0.9))"], "nothing to choose"),
        (["operator.blend=interval(0,2)"], r"interval\(0,2\): operator.blend=2.0 must lie in \[0, 1\]"),
        (["operator.blend=choice(0,0.5,-1)"], r"operator.blend=-1.0 must lie in \[0, 1\]"),
        (["operator.similarity=cosine,dott"], "operator.similarity=dott is not one of"),
        (
            [BLEND, "hydra.sweeper.ntrials=3"],
            "ntrials'; did you mean 'hydra.sweeper.n_trials'",
        ),
        (["tracker=wandb,tensorboard"], "list of options"),
        (["grid=study_resnet", BLEND], "sweep.points"),
    ],
)
def test_what_cannot_be_searched_is_refused(arguments, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run_sweep(["hydra/sweeper=optuna", f"sweep.dir={tmp_path}/s", *arguments])
    assert not (tmp_path / "s").exists()


def study_of(folder, *overrides):
    return open_study(folder, SearchConfig(n_jobs=1), read_space([BLEND, *overrides]))


def test_a_study_of_something_else_is_refused(tmp_path):
    study_of(tmp_path, "data=synthetic")
    study = study_of(tmp_path, "data=digits", "tracker=jsonl")  # nothing has been compared yet
    study.tell(study.ask(read_space([BLEND]).searched), 50.0)
    study_of(tmp_path, "data=digits")
    with pytest.raises(ConfigError, match=r"study of other runs \(data=digits; data=synthetic\)"):
        study_of(tmp_path, "data=synthetic")


def test_a_search_that_goes_on_can_be_looked_at(tmp_path, capsys):
    status = ["hydra/sweeper=optuna", f"sweep.dir={tmp_path}/s", "sweep.status=true", BLEND, "data=digits"]
    assert run_sweep(status) == 0 and not (tmp_path / "s").exists()
    assert "not begun" in capsys.readouterr().out
    (tmp_path / "s").mkdir()
    study_of(tmp_path / "s", "data=digits")
    torn = (tmp_path / "s" / JOURNAL).read_bytes() + b'{"op_code": 4, "wor'  # somebody is writing
    (tmp_path / "s" / JOURNAL).write_bytes(torn)
    with contextlib.closing(lock(tmp_path / "s" / ".search.lock", wait=1.0)):
        assert run_sweep(status) == 0
    assert "0 of 20 trials (none yet)" in capsys.readouterr().out
    assert (tmp_path / "s" / JOURNAL).read_bytes() == torn


def test_a_torn_line_is_dropped(tmp_path):
    study_of(tmp_path)
    path = tmp_path / JOURNAL
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"op_code": 4, "wor')
    study_of(tmp_path)
    assert path.read_bytes().startswith(whole) and all(json.loads(line) for line in path.read_text().splitlines())


def test_optuna_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna.storages.journal", None)
    with pytest.raises(ConfigError, match="uv sync --extra optuna"):
        run_sweep(["hydra/sweeper=optuna", f"sweep.dir={tmp_path}/s", BLEND])


def test_the_space_is_that_of_hydras_sweep_syntax():
    space = read_space([
        "data=digits", "operator=convnn,hybrid", "+operator.options.a=choice(1,x)", "operator.blend=interval(0,1)",
        "optim.lr=tag(log,interval(1e-4,1e-1))", "operator.k=int(interval(1,9))", "seed=range(0,5,2)",
        "optim.weight_decay=range(0.5,1.1,0.25)",
    ])  # fmt: skip
    d = optuna.distributions
    assert space.fixed == ("data=digits",)
    assert space.searched == {
        "operator": d.CategoricalDistribution(["convnn", "hybrid"]),
        "+operator.options.a": d.CategoricalDistribution(["1", "x"]),
        "operator.blend": d.FloatDistribution(0, 1),
        "optim.lr": d.FloatDistribution(1e-4, 1e-1, log=True),
        "operator.k": d.IntDistribution(1, 9),
        "seed": d.IntDistribution(0, 4, step=2),
        "optim.weight_decay": d.FloatDistribution(0.5, 1.0, step=0.25),
    }
    params = {key: getattr(one, "low", None) or one.choices[0] if hasattr(one, "choices") else one.low
              for key, one in space.searched.items()}  # fmt: skip
    assert space.overrides(params | {"optim.lr": 0.00123456789})[4] == "optim.lr=0.00123457"
