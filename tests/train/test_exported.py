"""What scripts/export.py writes as a folder: the same logits elsewhere, nothing pickled, a card that says what was."""

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from helpers import TINY, TINY_VIT
from huggingface_hub import ModelCard

import convnn
from convnn.cli.export import export
from convnn.config.compose import compose_config
from convnn.errors import CheckpointError, ConfigError
from convnn.runs.card import _accuracy_lines, model_card
from convnn.stats.proportions import wilson_interval
from convnn.train.run import run

MIDDLE = [*TINY, "operator=spectrum", "operator.blend=0.4", "operator.learn_blend=layer", "swap.min_kernel=3"]
END = [*TINY_VIT, "operator=mhsa", "+backbone.kwargs.num_heads=1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "points"
    for name, overrides in {"s0": [*MIDDLE, "seed=0"], "s1": [*MIDDLE, "seed=1"], "end": END}.items():
        run(compose_config([*overrides, "train.max_steps=1", f"run.dir='{folder / name}'"]))
    return folder


def exported(where, *args):
    """Export in this process; return what was printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        export([f"run={where}", *args])
    return json.loads(out.getvalue())


@pytest.fixture(scope="module")
def middle(runs):
    exported(runs / "s0", "format=safetensors", f"out={runs.parent / 'middle'}")
    return runs.parent / "middle"


def logits(model, images):
    with torch.no_grad():
        return model.eval()(images)


def images_of(found):
    return torch.randn(
        2, found.shape[0], found.image_size, found.image_size, generator=torch.Generator().manual_seed(0)
    )


def test_a_model_in_the_middle_comes_back_without_pickle(runs, middle, monkeypatch):
    ours = convnn.load_run(runs / "s0", device="cpu")
    monkeypatch.setattr(torch, "load", None)
    found = convnn.load_exported(middle, device="cpu")
    images = images_of(found)
    assert torch.equal(logits(found.model, images), logits(ours.model, images))
    blends = {name: layer.spectrum() for name, layer in convnn.neighbor_layers(found.model).items()}
    assert blends == {name: layer.spectrum() for name, layer in convnn.neighbor_layers(ours.model).items()} != {}
    assert (found.classes, found.shape, found.step) == (ours.classes, ours.shape, 1)
    pixels = torch.randint(0, 255, (3, *found.shape), dtype=torch.uint8)
    assert (found.predict(pixels).probabilities == ours.predict(pixels).probabilities).all()
    assert sorted(path.name for path in middle.iterdir()) == [
        ".convnn-export", "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip


@pytest.mark.long
def test_a_fresh_process_gives_the_same_logits(runs, middle, tmp_path):
    program = "import sys, torch, convnn; m = convnn.load_exported(sys.argv[1], device='cpu').model.eval()\n"
    program += "with torch.no_grad(): print(m(torch.load(sys.argv[2], weights_only=True)).tolist())"
    ours = convnn.load_run(runs / "s0", device="cpu")
    images = images_of(ours)
    torch.save(images, tmp_path / "images.pt")
    moved = shutil.copytree(middle, tmp_path / "elsewhere")
    done = subprocess.run(
        [sys.executable, "-c", program, moved, tmp_path / "images.pt"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), logits(ours.model, images))


def test_timm_alone_loads_an_end(runs, tmp_path):
    printed = exported(runs / "end", "format=hf", f"out={tmp_path}/hf")
    assert printed["plain"] and printed["load"] == f"timm.create_model('local-dir:{tmp_path}/hf', pretrained=True)"
    assert printed["upload"] == f"hf upload USER/end {tmp_path}/hf --exclude .convnn-export"
    ours = convnn.load_run(runs / "end", device="cpu")
    images = images_of(ours)
    plain = timm.create_model(f"local-dir:{tmp_path}/hf", pretrained=True)
    assert not any("convnn" in type(module).__module__ for module in plain.modules())
    assert plain.pretrained_cfg["label_names"] == ours.classes
    for model in (plain, convnn.load_exported(tmp_path / "hf", device="cpu").model):
        torch.testing.assert_close(logits(model, images), logits(ours.model, images), rtol=1e-4, atol=1e-5)


def test_the_hub_has_what_timm_lacks_in_our_own_form(runs, tmp_path):
    printed = exported(runs / "s0", "format=hf", f"out={tmp_path}/hf")
    assert not printed["plain"] and printed["load"].startswith("convnn.load_exported")
    assert ModelCard.load(tmp_path / "hf" / "README.md").data.to_dict()["library_name"] == "convnn"
    assert convnn.neighbor_layers(convnn.load_exported(tmp_path / "hf", device="cpu").model)


def test_the_card_says_what_the_run_was(runs, middle):
    card = ModelCard.load(middle / "README.md")
    results = [json.loads((runs / name / "result.json").read_text()) for name in ("s0", "s1")]
    top1, images = results[0]["top1_last"], results[0]["data"]["images"]["test"]
    assert card.data.eval_results[0].metric_value == top1
    low, high = (100 * share for share in wilson_interval(round(top1 * images / 100), images))
    assert f"{top1:.2f} % top-1 on {images:,} test images" in card.text
    assert f"95 % interval {low:.2f} to {high:.2f}" in card.text
    assert f"{(top1 + results[1]['top1_last']) / 2:.2f} ± " in card.text and "seeds 0, 1." in card.text
    commit = json.loads((runs / "s0" / "env.json").read_text())["git_commit"]
    assert f"- commit of convnn: {f'`{commit}`' if commit else 'not known'}" in card.text
    assert "- licence of the data: " in card.text and "| train.max_steps | 1 |" in card.text
    assert results[0]["data"]["content"]["test"] in card.text and re.search(r"\| ConvNN2d \| 0\.\d+ \|", card.text)


def test_a_run_that_demanded_kernels_predicts_without(middle, tmp_path):
    where = shutil.copytree(middle, tmp_path / "x")
    values = json.loads((where / "config.json").read_text())
    config = values["convnn"]["config"]
    config["operator"]["backend"] = "triton"
    config["backbone"] |= {"checkpoint": "/not/here.pt", "checkpoint_sha256": "0"}  # of which nothing is asked
    (where / "config.json").write_text(json.dumps(values))
    found = convnn.load_exported(where, device="cpu")
    images = torch.zeros(2, found.shape[0], found.image_size, found.image_size, dtype=torch.uint8)
    assert len(found.predict(images).predicted) == len(found.predict(images.numpy()).predicted) == 2
    with pytest.raises(ConfigError, match="a list of files"):
        found.predict([images])


def test_a_command_that_goes_on_from_elsewhere_is_not_told(runs, tmp_path):
    where = shutil.copytree(runs / "s0", tmp_path / "r")
    environment = json.loads((where / "env.json").read_text())
    for given, told in (
        (["data=digits", "optim.lr=0.1"], True),
        (["resume=/a/b"], False),
        (["from_run=/a", "seed=1"], False),
    ):
        (where / "env.json").write_text(json.dumps(environment | {"command": given}))
        out = tmp_path / f"{len(given)}{given[0][:3]}"
        exported(where, "format=safetensors", f"out={out}")
        assert ("It was trained by" in (out / "README.md").read_text()) == told


def test_licences_are_told_where_they_are_known(runs):
    ours = convnn.load_run(runs / "end")
    for target, told in (
        ("convnn.data.load_digits", "CC BY 4.0"),
        ("convnn.data.load_synthetic", "none needed"),
        ("convnn.data.load_imagefolder", "not known"),
        ("my.own", "not known"),
    ):
        ours.config.data.target = target
        card = model_card(runs / "end", ours.config, None, [], checkpoint="last", library="timm", usage="")
        assert f"- licence of the data: {told}" in card


@pytest.mark.parametrize(
    ("values", "told"),
    [([1.0, 30.0], "0.00 to 100.00 (t)"), ([1.0, 3.0], "0.00 to 14.71 (t)"), ([50.0, 51.0], "44.15 to 56.85 (t)")],
)
def test_an_interval_of_accuracies_ends_where_they_do(values, told):
    assert f"95 % interval of the mean {told}" in _accuracy_lines(2.0, "in the last epoch", 100, [0, 1], values)


def test_a_run_that_has_not_ended_has_no_accuracy(runs, tmp_path):
    where = shutil.copytree(runs / "s0", tmp_path / "r")
    (where / "result.json").unlink()
    exported(where, "format=safetensors")
    card = ModelCard.load(where / "exported-safetensors" / "README.md")
    assert card.data.eval_results is None and "Not known: the run has not ended." in card.text


def test_nothing_of_this_machine_is_written(runs, middle):
    for name in ("README.md", "config.json"):
        assert str(runs.parent) not in (middle / name).read_text()


def test_a_file_of_others_stays(runs, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"README\.md would be replaced"):
        exported(runs / "s0", "format=safetensors", f"out={tmp_path}")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"must be a folder for format=hf"):
        exported(runs / "s0", "format=hf", f"out={tmp_path}/file")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"config": {"backbone": {"module": "antigravity"}}}, ConfigError, "code that is not convnn's: antigravity"),
        ({"config": {"operator": {"target": "os.system"}}}, ConfigError, r"not convnn's: os\.system"),
        ({"format": 2}, ConfigError, "newer convnn"),
        ({"classes": ["one"]}, CheckpointError, "does not fit the model"),
        ({"image_size": None}, ConfigError, "damaged"),
        ({"image_size": "abc"}, ConfigError, "damaged"),
        ({"step": "x"}, ConfigError, "damaged"),
        ({"shape": []}, ConfigError, "damaged"),
    ],
)
def test_what_cannot_be_trusted_or_read_is_refused(change, error, message, middle, tmp_path):
    where = shutil.copytree(middle, tmp_path / "x")
    values = json.loads((where / "config.json").read_text())
    for key, value in change.items():
        if key == "config":
            for section, own in value.items():
                values["convnn"]["config"][section] |= own
        else:
            values["convnn"][key] = value
    (where / "config.json").write_text(json.dumps(values))
    with pytest.raises(error, match=message):
        convnn.load_exported(where)
    assert "antigravity" not in sys.modules


def test_damaged_weights_are_refused(middle, tmp_path):
    where = shutil.copytree(middle, tmp_path / "x")
    whole = (where / "model.safetensors").read_bytes()
    (where / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="is damaged"):
        convnn.load_exported(where)
    with pytest.raises(ConfigError, match="no exported model"):
        convnn.load_exported(tmp_path)


@pytest.mark.long
def test_onnx_gives_the_same_logits_for_any_number_of_images(runs, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    printed = exported(runs / "s0", "format=onnx", f"out={tmp_path}/o")
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == [
        ".convnn-export", "README.md", "config.json", "model.onnx",
    ]  # fmt: skip
    session = runtime.InferenceSession(str(tmp_path / "o" / "model.onnx"))
    ours = convnn.load_run(runs / "s0", device="cpu")
    images = torch.cat([images_of(ours)] * 2)[:3]
    found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    torch.testing.assert_close(found, logits(ours.model, images), rtol=1e-3, atol=1e-3)
    assert "onnxruntime" in printed["load"]
    with pytest.raises(ConfigError, match=r"format=safetensors or format=hf"):
        convnn.load_exported(tmp_path / "o")


def test_onnx_names_its_packages(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"pip install convnn\[onnx\]"):
        exported(runs / "s0", "format=onnx", f"out={tmp_path}/o")
    assert not (tmp_path / "o").exists()
