"""Options in folders of the user: found by all programs and by the processes they start, refused in one line."""

import json
import os
from pathlib import Path

import pytest
from helpers import TINY
from own_options import OPERATOR, write_options
from programs import assert_refused
from sweeps import stand_in_for_train, statuses, sweep

from convnn.cli.folders import take_config_folders
from convnn.config.compose import compose_config
from convnn.config.folders import CONF_DIR, CONFIG_PATH, config_folders, config_groups
from convnn.errors import ConfigError

RECORD = """
import json, sys
from pathlib import Path
from convnn.config.compose import compose_config
from convnn.config.identity import fingerprint
config = compose_config(sys.argv[1:])
folder = Path(config.run.dir)
folder.mkdir(parents=True)
result = {"status": "complete", "fingerprint": fingerprint(config), "top1_last": 50.0, "exit_code": 0}
(folder / "result.json").write_text(json.dumps(result | {"target": config.operator.target}))
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The current folder, with options in ``conf`` and ``own/conf``."""
    write_options(tmp_path / "conf")
    write_options(tmp_path / "own" / "conf")
    (tmp_path / "my_shift.py").write_text(OPERATOR)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv(CONFIG_PATH, "")
    return tmp_path


@pytest.mark.parametrize(
    "given, place",
    [
        ("--config-dir conf", "conf"),
        ("--config-dir=conf", "conf"),
        ("-cd conf", "conf"),
        ("hydra.searchpath=[conf]", "conf"),
        ("hydra.searchpath=[file://conf]", "conf"),
        ("hydra.searchpath=[pkg://own.conf]", "own/conf"),
    ],
)
def test_every_spelling(given, place, project):
    assert take_config_folders(["seed=1", *given.split(), "operator=mine"]) == ["seed=1", "operator=mine"]
    assert config_folders() == [CONF_DIR, project / place]
    assert compose_config(["operator=mine"]).operator.target == "my_shift.Shift"
    assert "mine" in config_groups()["operator"] and "convnn" in config_groups()["operator"]


def test_folders_add_up(project, monkeypatch):
    monkeypatch.setenv(CONFIG_PATH, "conf")
    assert take_config_folders(["-cd", "own/conf", "hydra.searchpath=[conf]"]) == []
    assert config_folders() == [CONF_DIR, project / "own/conf", project / "conf"]
    assert os.environ[CONFIG_PATH] == f"{project}/own/conf{os.pathsep}{project}/conf"


@pytest.mark.parametrize(
    "given, hint",
    [
        ("--config-dir", "--config-dir needs a folder"),
        ("--config-dir nowhere", "--config-dir=nowhere: there is no folder /"),
        ("hydra.searchpath=[pkg://nowhere.conf]", "there is no package nowhere.conf"),
        ("hydra.searchpath=3", r"write hydra.searchpath=\[DIR,DIR\]"),
        ("hydra.searchpath=[", "Hydra|no viable alternative"),
    ],
)
def test_folders_that_cannot_be_used(given, hint, project):
    with pytest.raises(ConfigError, match=hint) as error:
        take_config_folders(given.split())
    assert "\n" not in str(error.value)


def test_an_option_of_the_packages_name_is_refused_unless_it_is_the_same(project):
    own = CONF_DIR / "operator" / "convnn.yaml"
    (project / "conf" / "operator" / "convnn.yaml").write_bytes(own.read_bytes())
    take_config_folders(["-cd", "conf"])
    (project / "conf" / "operator" / "convnn.yaml").write_text("name: other\n")
    with pytest.raises(ConfigError, match="operator=convnn is convnn's own; rename the file"):
        take_config_folders(["-cd", "conf"])


def test_train_imports_an_operator_beside_the_command(call):
    write_options(Path("conf"))
    Path("my_shift.py").write_text(OPERATOR)
    args = ["--config-dir", "conf", "operator=mine", *TINY, "swap.last=1", "train.max_steps=1", "run.dir=r"]
    assert call("train.py", args) == (0, "")
    assert "Shift" in Path("r/swap.txt").read_text()
    command = json.loads(Path("r/env.json").read_text())["command"]
    assert command == [f"--config-dir={Path.cwd()}/conf", *args[2:]]


@pytest.mark.parametrize(
    "program, args, hint",
    [
        ("train.py", ["operator=mien"], "did you mean 'mine'"),
        ("train.py", ["operator=broken"], r"broken\.yaml\", line 2"),
        ("sweep.py", ["grid=tow"], "did you mean 'two'"),
        ("scripts/reproduce.py", ["table=vgg11_k", "dry_run=true", "operator=mien"], "did you mean 'mine'"),
        ("scripts/evaluate.py", [], "'--config-dir' is not key=value"),
    ],
)
def test_hints_know_the_users_options(program, args, hint, call):
    write_options(Path("conf"))
    Path("conf/operator/broken.yaml").write_text("name: [broken\nkind: conv\n")
    assert_refused(call, program, ["--config-dir", "conf", *args], hint)


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
@pytest.mark.long
def test_points_and_workers_find_the_users_options(launcher, project):
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    (project / "record.py").write_text(RECORD)
    driver = stand_in_for_train(project / "path", project / "record.py")
    own = ["-cd", "conf", "grid=two", "operator=mine", f"hydra/launcher={launcher}"]
    parallel = ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    code, text = sweep(driver, project, *own, *parallel)
    assert code == 0, text
    assert {record["status"] for record in statuses(project, by="name").values()} == {"complete"}
    targets = [json.loads(p.read_text())["target"] for p in project.glob("sweep/points/*/result.json")]
    assert targets == ["my_shift.Shift"] * 2
    assert json.loads((project / "sweep/plan.json").read_text())["command"][-len(own + parallel) :] == [*own, *parallel]
