"""scripts/export.py: what it writes is loaded by timm alone, or says in what timm has another network."""

import contextlib
import io
import json
import shutil
import sys

import pytest
import timm
import torch
from helpers import TINY, TINY_VIT
from programs import snapshot
from torch import nn

from convnn.cli.export import export
from convnn.config.compose import compose_config
from convnn.config.load import load_config
from convnn.errors import ConfigError
from convnn.train.restore import load_run
from convnn.train.run import run

ENDS = {
    "small stem": [*TINY, "operator=conv2d", "swap.min_kernel=3"],
    "stem of timm": [*TINY, "operator=conv2d", "swap.match=layer*", "swap.min_kernel=3", "backbone.stem=default"],
    "one head": [*TINY_VIT, "operator=mhsa", "+backbone.kwargs.num_heads=1"],
    "three heads": [*TINY_VIT, "operator=mhsa", "backbone.patch_size=8", "backbone.drop_rate=0.1"],
    "no bias": [*TINY_VIT, "operator=mhsa", "operator.bias=false"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, overrides in ENDS.items():
        run(compose_config([*overrides, "train.max_steps=1", f"run.dir='{folder / name}'"]))
    return folder


def exported(where, *args):
    """Export in this process; return the description that was written, the warnings, and the printed line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        export([f"run={where}", *args])
    printed = json.loads(out.getvalue())
    with open(printed["description"]) as file:  # noqa: PTH123
        return json.load(file), err.getvalue(), printed


def logits(model, images):
    with torch.no_grad():
        return model.eval()(images)


def check_equal(plain, where, weights, side):
    plain.load_state_dict(torch.load(weights, weights_only=True), strict=True)
    config = load_config(where)
    images = torch.randn(3, 3, side, side)
    ours = load_run(config, where, "last").model
    torch.testing.assert_close(logits(plain, images), logits(ours, images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["stem of timm", "one head", "three heads"])
@pytest.mark.long
def test_timm_alone_loads_it(name, runs, tmp_path):
    found, warnings, printed = exported(runs / name, f"out={tmp_path}/x/w.pt")
    assert found["differs"] == printed["differs"] == [] and warnings == ""
    assert found["image_size"] in (8, 16) and len(found["classes"]) == 10 and printed["layers"] > 0
    plain = timm.create_model(found["model"], **found["kwargs"])
    check_equal(plain, runs / name, tmp_path / "x" / "w.pt", found["image_size"])
    if "head" in name:
        assert {m.num_heads for m in plain.modules() if hasattr(m, "num_heads")} == {1 if name == "one head" else 3}


@pytest.mark.parametrize("name, modules", [("small stem", ["conv1", "maxpool"]), ("no bias", None)])
def test_what_timm_has_otherwise_is_named_and_enough(name, modules, runs, tmp_path):
    found, warnings, printed = exported(runs / name, f"out={tmp_path}/w.pt")
    modules = modules or [f"blocks.{i}.attn.proj" for i in range(2)]
    assert [change["module"] for change in found["differs"]] == modules and found["differs"] == printed["differs"]
    assert warnings.splitlines() == [
        f"warning: not plain timm: {c['module']} is {c['here']}, timm has {c['timm']}" for c in found["differs"]
    ]
    plain = timm.create_model(found["model"], **found["kwargs"])
    state = torch.load(tmp_path / "w.pt", weights_only=True)
    with pytest.raises(RuntimeError, match=r"size mismatch|Missing key"):
        plain.load_state_dict(state)
    for change in found["differs"]:
        plain.set_submodule(change["module"], eval(change["here"], vars(nn)))
    check_equal(plain, runs / name, tmp_path / "w.pt", found["image_size"])


def test_the_next_export_leaves_nothing_of_the_first(runs, tmp_path):
    exported(runs / "small stem", f"out={tmp_path}/w.pt")
    (tmp_path / "notes.txt").write_text("mine")
    found, _, _ = exported(runs / "one head", f"out={tmp_path}/w.pt", "checkpoint=best")
    assert found["model"].startswith("vit") and found["run"] == "one head" and found["checkpoint"] == "best"
    assert sorted(snapshot(tmp_path)) == [".w.pt.convnn-export", "notes.txt", "w.json", "w.pt"]
    exported(runs / "small stem", f"out={tmp_path}/v.pt")  # of another name: both stay
    assert {"v.pt", "v.json", "w.pt", "w.json"} <= snapshot(tmp_path).keys()


@pytest.mark.parametrize("name", ["w.pt", "w.json"])
@pytest.mark.parametrize("how", ["before", "changed since", "link"])
def test_a_file_of_others_is_not_replaced(name, how, runs, tmp_path):
    where = tmp_path / "out"
    where.mkdir()
    if how == "changed since":
        exported(runs / "one head", f"out={where}/w.pt")
        (where / name).write_text("mine")
    elif how == "before":
        (where / name).write_text("mine")
    else:
        (tmp_path / "mine").write_text("mine")
        (where / name).symlink_to(tmp_path / "mine")
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match=rf"{name} would be replaced, which no export wrote or which was changed"):
        exported(runs / "one head", f"out={where}/w.pt")
    assert snapshot(tmp_path) == before


def test_the_default_place_is_the_run_folder(runs, tmp_path):
    where = shutil.copytree(runs / "one head", tmp_path / "r")
    for _ in range(2):
        _, _, printed = exported(where)
        assert (printed["out"], printed["description"]) == (f"{where}/exported.pt", f"{where}/exported.json")


@pytest.mark.parametrize("out", ["x.json", "."])
def test_a_place_that_cannot_hold_weights_is_refused(out, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"must be a file for the weights"):
        exported(runs / "one head", f"out={out}")
    assert not list(tmp_path.iterdir())


MINE = """
import timm
from timm.models.resnet import BasicBlock, ResNet
@timm.models.register_model
def my_resnet(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs):
    return ResNet(BasicBlock, **{"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]} | kwargs)
"""


@pytest.mark.long
def test_a_model_from_elsewhere_names_its_module(tmp_path, monkeypatch):
    (tmp_path / "my_nets.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    own = [o for o in ENDS["stem of timm"] if "kwargs" not in o]
    run(
        compose_config(
            [*own, "backbone.name=my_resnet", "backbone.module=my_nets", "train.max_steps=1", f"run.dir={tmp_path}/r"]
        )
    )
    found, _, _ = exported(tmp_path / "r")
    assert found["module"] == "my_nets" and found["model"] == "my_resnet" and found["differs"] == []
    sys.modules.pop("my_nets")
