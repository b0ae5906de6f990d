"""Values as people write them: YAML's booleans, the home folder, quotes, names for W&B."""

import shlex

import pytest
import yaml
from helpers import TINY

from convnn.cli.folders import take_config_folders
from convnn.cli.program import script_options
from convnn.cli.visualize import Options
from convnn.config.compose import compose_config
from convnn.config.composer import Composer
from convnn.config.keys import meant
from convnn.config.load import load_config, to_config
from convnn.config.overrides import quoted, quoted_once
from convnn.errors import ConfigError
from convnn.sweep.options import sweep_options

CHOICES = [("train.sync_batchnorm", "true", "false"), ("train.deterministic", "true", "false")]
CHOICES += [("data.stream", "true", "false")]


def value_of(config, key):
    for name in key.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize("key, yes, no", CHOICES)
def test_yamls_booleans_are_choices(key, yes, no):
    composer = Composer()
    for texts, choice in ((("true", "True", "TRUE", "yes", "on"), yes), (("false", "False", "no", "Off"), no)):
        assert value_of(compose_config(["data=imagefolder", f"{key}={texts[-1]}"]), key) == choice
        for text in texts:
            assert value_of(composer(["data=imagefolder", f"{key}={text}"]), key) == choice
            section, name = key.split(".")
            plain = {"data": {"target": "mine.load"}}
            plain.setdefault(section, {})[name] = yaml.safe_load(text)
            assert value_of(to_config(plain), key) == choice


def test_a_choice_that_yaml_reads_as_a_boolean():
    config = to_config(yaml.safe_load("train: {amp: off}\noperator: {learn_blend: no}\nswap: {operator: {}}"))
    assert config.train.amp == "off" and config.operator.learn_blend == "no"
    rules = {"swap": {"rules": {"a": {"operator": {"learn_blend": False}}}}}
    assert to_config(rules).swap.rules["a"].operator == {"learn_blend": "no"}
    assert meant(True, ("auto", "bf16", "off")) is True and meant("x", ("true", "false")) == "x"
    for override in ("train.amp=true", "tracker.mode=true", "train.sync_batchnorm=maybe"):
        with pytest.raises(ConfigError, match="is not one of"):
            compose_config([override])


# ---------------------------------------------------------------------------------------------------- home


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "my home"))
    return tmp_path / "my home"


@pytest.mark.parametrize("key", ["run.dir", "run.root", "data.root"])
def test_a_tilde_is_the_home_folder(key, home):
    for config in (
        compose_config([f"{key}='~/x'"]),
        Composer()([f"{key}='~/x'"]),
        compose_config(take_config_folders([f"{key}=~/x"])),
        to_config({key.split(".")[0]: {key.split(".")[1]: "~/x"}}),
    ):
        assert value_of(config, key) == f"{home}/x"
    assert value_of(compose_config([f"{key}='x/~'"]), key) == "x/~"  # in other places it is a name


def test_a_tilde_in_the_other_programs(home):
    assert sweep_options(take_config_folders(["sweep.dir=~/s"])).dir == f"{home}/s"
    assert sweep_options(["sweep.dir='~'"]).dir == str(home)
    options = script_options(Options, ["run=~/r", "out=~/o", "image=~/i.png", "data_root=~", "layers=~/x"], "")
    assert (options.run, options.out, options.image) == (f"{home}/r", f"{home}/o", f"{home}/i.png")
    assert options.data_root == str(home) and options.layers == "~/x"


@pytest.mark.parametrize("key", ["run.dir", "data.root"])
def test_without_a_home_folder_it_says_so(key):
    with pytest.raises(ConfigError, match=rf"{key}=~nobody-here/x: there is no home folder"):
        compose_config([f"{key}='~nobody-here/x'"])


def test_a_report_without_a_home_folder(monkeypatch):
    from pathlib import Path

    from convnn.report.results import tidy

    def none(*_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    assert tidy("a  b") == "a b"


# ---------------------------------------------------------------------------------------------------- quotes


ODD = [
    "r/lr=0.1",
    "a (copy)",
    "x[1]",
    "{a",
    "it's",
    "a b$c(",
    'say "x" (',
    "a: b, c(",
    "back\\slash=1",
    "a,b",
    "100%(",
    "!(",
]


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("key", ["run.dir", "data.root"])
def test_the_quotes_in_the_message_work(value, key):
    with pytest.raises(ConfigError) as error:
        compose_config([f"{key}={value}"])
    text = str(error.value)
    assert text.startswith(f"{key}={value}") and "\n" not in text
    given = shlex.split(text.partition("for the shell and for Hydra: ")[2])
    assert value_of(compose_config(given), key) == value


@pytest.mark.parametrize("override", ["operator.k=1,(2", "operator.k=[1", "train.epochs={"])
def test_numbers_are_not_told_to_be_quoted(override):
    with pytest.raises(ConfigError, match=r"Hydra cannot read|is a sweep") as error:
        compose_config([override])
    assert "quotes" not in str(error.value)


def test_names_may_be_swept_and_are_not_told_to_be_quoted():
    with pytest.raises(ConfigError, match=r"sweep\.py takes several"):
        compose_config(["backbone.name=resnet18,resnet34"])


# ---------------------------------------------------------------------------------------------------- W&B


@pytest.mark.parametrize(
    "override, says",
    [
        ("tracker.project='a/b'", r"tracker\.project=a/b has /, which W&B refuses"),
        ("tracker.project='50%:#'", r"has # % :, which"),
        ("tracker.project=''", r"tracker\.project: W&B takes 1 to 128 characters, and '' has 0"),
        (f"tracker.project={'p' * 129}", r"'p{30}\.\.\.' has 129"),
        (f"tracker.tags=[ok,{'t' * 65}]", r"tracker\.tags: W&B takes 1 to 64 characters"),
        ("tracker.tags=['']", r"tracker\.tags"),
        (f"tracker.group={'g' * 129}", r"tracker\.group"),
    ],
)
@pytest.mark.long
def test_names_that_wandb_refuses_are_refused_at_once(override, says, tmp_path):
    with pytest.raises(ConfigError, match=says):
        compose_config(["tracker=wandb", override])
    for unused in (["tracker=jsonl"], ["tracker=wandb", "tracker.mode=disabled"]):
        compose_config([*unused, override])


def test_wandb_takes_what_is_let_pass():
    wandb = pytest.importorskip("wandb")
    config = compose_config(["tracker=wandb", f"tracker.project={'p' * 128}", f"tracker.tags=[{'t' * 64},a b]"])
    settings = wandb.Settings(project=config.tracker.project, run_tags=config.tracker.tags)
    assert settings.project == "p" * 128
    for bad in ({"project": "a/b"}, {"project": "p" * 129}, {"run_tags": ["t" * 65]}, {"run_tags": [""]}):
        with pytest.raises(Exception, match=r"(?i)invalid|characters"):
            wandb.Settings(**bad)


def test_an_old_run_with_such_names_is_still_read(tmp_path):
    from dataclasses import asdict

    config = compose_config([*TINY, "tracker=jsonl"])
    values = asdict(config)
    values["tracker"] |= {"name": "wandb", "tags": [""], "project": "a/b"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert load_config(tmp_path).backbone == config.backbone


@pytest.mark.parametrize(
    "value, shown",
    [
        ("schedule", "tracker.group=schedule"),
        ("/data/a-b_c/r.1", "tracker.group=/data/a-b_c/r.1"),
        ("a b", "'tracker.group=a b'"),
        ("10", "'tracker.group=\"10\"'"),
        ("null", "'tracker.group=\"null\"'"),
        ("x=y,z", "'tracker.group=\"x=y,z\"'"),
    ],
)
def test_a_command_is_quoted_once_and_says_the_same(value, shown):
    override = f"tracker.group={quoted(value)}"
    assert shlex.join([quoted_once(override)]) == shown
    (read,) = shlex.split(shown)
    assert compose_config([*TINY, read]).tracker.group == value


@pytest.mark.parametrize(
    "override", ["seed=0", "swap.stages=[1,2]", f"run.name={quoted('it' + chr(39) + 's')}", "a", "a='"]
)
def test_other_overrides_stay_as_they_are(override):
    assert quoted_once(override) == override
