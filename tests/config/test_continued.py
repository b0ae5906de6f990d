"""The configuration of a run folder with changes: to go on with the run, or to begin another."""

import subprocess
import sys
from dataclasses import asdict

import pytest
from helpers import tiny
from omegaconf import OmegaConf

from convnn.config.continued import derived_config, resumed_config
from convnn.config.identity import differences, fingerprint, identity, lengthened
from convnn.config.schema import RunConfig
from convnn.errors import ConfigError


@pytest.fixture
def folder(tmp_path):
    """A folder with the configuration of a run whose options, keys and mappings are not the defaults."""
    where = tmp_path / "a run"
    where.mkdir()
    config = tiny("operator=kvt", "operator.k=4", "train.epochs=10", "seed=3", "run.dir=elsewhere", vit=True)
    (where / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(asdict(config))))
    return where


def resumed(folder, *overrides):
    return resumed_config(folder, overrides, f"resume={folder}")


def test_a_run_goes_on_as_its_folder_says(folder):
    config = resumed(folder)
    assert (config.operator.name, config.operator.k, config.seed, config.train.epochs) == ("kvt", 4, 3, 10)
    assert config.backbone.kwargs == {"depth": 2, "embed_dim": 24}
    assert (config.run.dir, config.run.if_exists) == (str(folder), "resume")
    assert identity(config) == identity(tiny("operator=kvt", "operator.k=4", "train.epochs=10", "seed=3", vit=True))


@pytest.mark.parametrize(
    "overrides",
    [
        ["seed=3", "operator.k=4"],
        ["operator=kvt", "operator.k=4"],
        ["+backbone.kwargs.depth=2"],
        ["++backbone.kwargs.depth=2", "train.epochs=10"],
        ["device=cpu", "tracker=wandb", "tracker.mode=disabled", "diagnostics.enabled=false", "data.workers=0"],
    ],
)
def test_what_says_the_same_or_decides_nothing_may_be_given(overrides, folder):
    config = resumed(folder, *overrides)
    assert identity(config) == identity(resumed(folder)) and config.train.extended_from == []
    if "tracker=wandb" in overrides:
        assert config.tracker.mode == "disabled" and config.tracker.name == "wandb"


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["operator.k=9"], "operator.k: 4 -> 9"),
        (["operator=kvt"], "operator.k: 4 -> 9"),  # an option is all of its keys
        (["operator=mhsa", "operator.k=4"], "operator.name: kvt -> mhsa"),
        (["optim.lr=1"], "optim.lr: 0.001 -> 1.0"),
        (["+backbone.kwargs.depth=3"], "backbone.kwargs.depth: 2 -> 3"),
        (["~backbone.kwargs.depth"], r"backbone.kwargs.depth: 2 -> \(missing\)"),
        (["train=paper"], "train.epochs: 10 -> 150"),  # a length that nobody asked for
        (["experiment=quickstart"], "backbone.name: vit_tiny_patch16_224 -> resnet18"),
        (["train.epochs=9"], "train.epochs=9 is less than the 10 of resume=.*; a run can be made longer, not shorter"),
        (["train.max_steps=9"], "train.max_steps=9 is a limit that was none of resume="),
        (["operator.kk=1"], "unknown key 'operator.kk'; did you mean 'operator.k'"),
        (["operator=kvtt"], "operator=kvtt: no such option; did you mean 'kvt'"),
    ],
)
def test_what_contradicts_the_run_is_refused_by_name(overrides, said, folder):
    with pytest.raises(ConfigError, match=said) as error:
        resumed(folder, *overrides)
    assert "\n" not in str(error.value)


def test_an_extension_is_part_of_what_the_run_is(folder):
    begun, longer = resumed(folder), resumed(folder, "train.epochs=20")
    assert longer.train.epochs == 20 and longer.train.extended_from == [{"epochs": 10}]
    planned = tiny("operator=kvt", "operator.k=4", "train.epochs=20", "seed=3", vit=True)
    assert len({fingerprint(one) for one in (begun, longer, planned)}) == 3
    assert "extended_from" not in identity(begun)["train"]
    assert differences(lengthened(identity(begun), identity(longer)), identity(longer)) == []
    for other in (planned, begun):  # not extended from it
        assert lengthened(identity(longer), identity(other)) == identity(longer)
    assert lengthened(identity(begun), identity(planned)) == identity(begun)

    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(asdict(longer))))
    assert resumed(folder).train == longer.train
    again = resumed(folder, "train.epochs=30")
    assert again.train.extended_from == [{"epochs": 10}, {"epochs": 20}]
    assert differences(lengthened(identity(begun), identity(again)), identity(again)) == []


@pytest.mark.parametrize("earlier", ["[{max_steps: 3}]", "[{epochs: 0}]", "[{epochs: 3, steps: 4}]"])
def test_earlier_lengths_are_checked(earlier, folder):
    with pytest.raises(
        ConfigError, match=r"train.extended_from=.* must be earlier lengths, such as \[\{epochs: 10\}\]"
    ):
        tiny(f"train.extended_from={earlier.replace(' ', '')}")


def test_a_new_run_has_the_configuration_with_changes(folder):
    config = derived_config(folder, ["seed=5", "data=digits", "+backbone.kwargs.depth=3"])
    assert (config.operator.name, config.operator.k, config.seed, config.data.name) == ("kvt", 4, 5, "digits")
    assert config.data.size == 2048 and config.backbone.kwargs == {"depth": 3, "embed_dim": 24}
    assert config.run == RunConfig()
    assert derived_config(folder, ["operator=mhsa"]).operator == tiny("operator=mhsa", vit=True).operator
    assert derived_config(folder, ["run.dir=x"]).run.dir == "x"
    longer = resumed(folder, "train.epochs=20")
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(asdict(longer))))
    plan = derived_config(folder, []).train
    assert (plan.epochs, plan.extended_from) == (20, [])  # of which it has the whole from its beginning
    with pytest.raises(ConfigError, match="experiment= describes a whole run; leave it out, or from_run"):
        derived_config(folder, ["experiment=quickstart"])


def test_no_torch_is_needed():
    code = "import sys, convnn.cli.continuing; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
