"""A trained model at other settings, from the command line to the files."""

import csv
import json

import numpy as np
import pytest
import torch
from figure_checks import texts_outside
from helpers import tiny, write_image_folder
from programs import assert_refused, snapshot

from convnn.cli.evaluate import evaluate
from convnn.cli.moved import grid_of_run
from convnn.config.load import load_config
from convnn.data import stream
from convnn.data.datasets import load_dataset
from convnn.errors import ConfigError
from convnn.figures.moved import draw_layers_alone, draw_settings
from convnn.models.inspect import choosing_layers
from convnn.train import moved, restore
from convnn.train.moved import Point, evaluate_points, trained_run
from convnn.train.restore import Asked, predict_run
from convnn.train.run import run

ATTENTION = ["operator=convnn_attention", "swap=all_attention", "operator.aggregation=sum"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of a ViT of 17 tokens without a swap."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    run(tiny("swap=none", "train.epochs=1", "optim.lr=0.01", f"run.dir={folder}", vit=True))
    return folder


@pytest.fixture(scope="module")
def swapped(tmp_path_factory):
    """A run whose layers have a weight for each of 9 neighbours, and draw candidates at evaluation."""
    folder = tmp_path_factory.mktemp("swapped") / "run"
    draws = ["operator.candidates=random", "operator.num_candidates=12", "operator.eval_candidates=resample"]
    given = ["train.epochs=1", "optim.lr=0.01", "diagnostics.enabled=false", f"run.dir={folder}"]
    run(tiny(*draws, *given, "schedule=linear", vit=True))
    return folder


def rows_of(folder, *words, each=False, asked=None):
    config = load_config(folder)
    points = [Point(*given) for given in grid_of_run(config, folder, words).points]
    config.device = "cpu"
    return evaluate_points(trained_run(config, folder, "last", asked or Asked()), points, each=each)


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_own_settings_have_the_accuracy_of_the_run(swapped):
    config = load_config(swapped)
    config.device = "cpu"
    scores, _, _ = predict_run(config, swapped, "last")
    own, same, other = rows_of(swapped, "operator.k=9,2")
    assert (own.loss, own.top1, own.top5) == (scores["loss"], scores["top1"], scores["top5"])
    assert (same.loss, same.top1, same.agreement, same.difference) == (own.loss, own.top1, 100, 0)
    assert same.difference_low < 0 < same.difference_high and own.difference is None
    assert other.loss != own.loss and [layer["k"] for layer in other.layers.values()] == [2, 2]
    assert [layer["blend"] for layer in other.layers.values()] == [1, 1]  # where the schedule ended
    assert 0 < other.mass < same.mass < 1 and own.top1_low < own.top1 < own.top1_high


def test_all_tokens_are_plain_attention(plain):
    own, few, whole = rows_of(plain, *ATTENTION, "operator.k=2,17")
    assert whole.agreement == 100 and whole.loss == pytest.approx(own.loss, abs=1e-6)
    assert whole.mass == pytest.approx(1, abs=1e-9) and few.mass < 0.9 and few.loss != own.loss
    assert own.mass is None and not own.layers and own.gflops == whole.gflops
    assert (few.values, few.label) == ({"operator.k": "2"}, "k=2")


def test_one_layer_at_a_time(plain, monkeypatch):
    seen, real = [], moved.predict

    def spied(model, *args, **kwargs):
        seen.append([layer.k for layer in choosing_layers(model).values()] + [len(choosing_layers(model))])
        return real(model, *args, **kwargs)

    monkeypatch.setattr(moved, "predict", spied)
    rows = rows_of(plain, *ATTENTION, "operator.k=2", each=True)
    assert seen == [[0], [2, 2, 2], [2, 1], [2, 1]]
    assert [(row.moved, row.depth) for row in rows] == [
        ("none", None), ("all", None), ("blocks.0.attn", 0), ("blocks.1.attn", 1),
    ]  # fmt: skip
    assert [list(row.layers) for row in rows[2:]] == [["blocks.0.attn"], ["blocks.1.attn"]]
    assert len({row.loss for row in rows}) == 4


def test_files_tables_and_pictures(plain, capsys, tmp_path):
    words = [
        f"run={plain}",
        *ATTENTION,
        "operator.k=1,4,17",
        "operator.blend=0,1",
        "layers=each",
        "device=cpu",
        "limit=10",
    ]
    evaluate(words)
    told = capsys.readouterr()
    (out,) = (plain / "evaluation").glob("last-limit10-k-blend-*-each")
    names = {path.name for path in out.iterdir()} - {".convnn-evaluation"}
    pictures = {f"{name}.{kind}" for name in ("spectrum", "spectrum_layers") for kind in ("png", "svg")}
    assert names == {"spectrum.csv", "spectrum_layers.csv", "spectrum.md", "scores.json"} | pictures
    points, layers = table(out / "spectrum.csv"), table(out / "spectrum_layers.csv")
    assert [row["setting"] for row in points] == ["own"] + [f"k={k} blend={b}" for k in (1, 4, 17) for b in (0, 1)]
    assert len(layers) == 6 * (2 + 1 + 1) and {row["moved"] for row in layers} == {
        "all", "blocks.0.attn", "blocks.1.attn",
    }  # fmt: skip
    assert points[-1]["agreement"] == "100" and points[0]["images"] == "10" and points[0]["mass"] == ""
    lines = told.out.splitlines()
    assert lines[0].startswith("setting") and lines[1].startswith("own") and str(out) in lines[-1]
    assert "one layer moved" in told.out and told.err.count("top-1") == 1 + 6 * 3
    assert json.loads((out / "scores.json").read_text())["axes"] == ["operator.k", "operator.blend"]
    before = snapshot(out)
    (out / "spectrum.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"spectrum.md would be replaced, which no evaluation wrote"):
        evaluate([*words, f"out={out}"])
    assert snapshot(out) == before | {"spectrum.md": b"mine"}


def test_nothing_is_cut_off_in_the_pictures(plain):
    rows = rows_of(plain, *ATTENTION, "operator.k=1,9,17", each=True, asked=Asked(limit=10))
    for figure in (draw_settings([row for row in rows if row.depth is None]), draw_layers_alone(rows)):
        assert texts_outside(figure) == []
    named = rows_of(plain, *ATTENTION, "operator.k=4", "operator.similarity=dot,cosine", asked=Asked(limit=10))
    figure = draw_settings(named)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["similarity=dot", "similarity=cosine"]
    assert draw_settings(named[:1]) is None and draw_layers_alone(named) is None


def test_a_corruption_is_made_once_and_is_that_of_an_evaluation(plain):
    config, asked = load_config(plain), Asked(corruption="gaussian_noise", severity=5)
    config.device = "cpu"
    own, _ = rows_of(plain, *ATTENTION, "operator.k=4", asked=asked)
    scores, _, _ = predict_run(config, plain, "last", asked)
    assert (own.loss, own.top1) == (scores["loss"], scores["top1"]) and own.loss != rows_of(plain, *ATTENTION)[0].loss


def test_files_are_read_once_and_as_an_evaluation_reads_them(plain, tmp_path, monkeypatch):
    config = load_config(plain)
    config.device = "cpu"
    classes = load_dataset(config.data).classes
    write_image_folder(tmp_path / "images", classes, per_class=2)
    asked, calls = Asked(folder=tmp_path / "images" / "test"), []
    scores, _, _ = predict_run(config, plain, "last", asked)
    for name in ("load_checkpoint", "class_folder"):
        real = getattr(restore, name)
        monkeypatch.setattr(restore, name, lambda *a, real=real, **kw: calls.append(real.__name__) or real(*a, **kw))
    reads = count_reads(monkeypatch)
    own, *others = rows_of(plain, *ATTENTION, "operator.k=1,4,17", asked=asked)
    assert (own.loss, own.top1, own.images) == (scores["loss"], scores["top1"], 2 * len(classes))
    assert sorted(calls) == ["class_folder", "load_checkpoint"] and len(others) == 3
    assert len(reads) == 2 * len(classes)


def count_reads(monkeypatch):
    """Count the image files that are read in this process."""
    reads, real = [], stream.square_transform
    monkeypatch.setattr(stream, "square_transform", lambda path, side: reads.append(path) or real(path, side))
    return reads


def test_a_backbone_with_weights_of_a_file_and_no_run(plain, tmp_path, capsys):
    weights = tmp_path / "weights.pth"
    torch.save(torch.load(plain / "checkpoints" / "last.pt", weights_only=True)["model"], weights)
    given = ["data=synthetic", "data.size=64", "data.load_size=16", "backbone=vit_tiny", "backbone.image_size=16"]
    given += ["+backbone.kwargs.depth=2", "+backbone.kwargs.embed_dim=24", f"out={tmp_path}/out", "device=cpu"]
    with pytest.raises(ConfigError, match="there is no trained model: give run=DIR, or the weights"):
        evaluate([*given, *ATTENTION])
    evaluate([*given, f"backbone.checkpoint={weights}", *ATTENTION, "operator.k=17,3"])
    own, whole, few = table(tmp_path / "out" / "spectrum.csv")
    result = json.loads((plain / "result.json").read_text())
    assert float(own["top1"]) == pytest.approx(result["top1_last"], abs=1e-3) and whole["agreement"] == "100"
    assert few["loss"] != own["loss"]
    capsys.readouterr()
    evaluate([*given, f"backbone.checkpoint={weights}"])
    assert [row["setting"] for row in table(tmp_path / "out" / "spectrum.csv")] == ["own"]


REFUSED = {
    "run={plain} operator.k=2": "was trained without a swap; say which layers to replace by what",
    "run={swapped} swap.last=1": "swap.last=1: run=.* was trained with a swap, which stays",
    "run={swapped} operator.k=10": "operator.k=10: 'blocks.0.attn' has a weight for each of 9 neighbours",
    "run={swapped} operator.k=0": r"operator.k=0 must lie in \[1, inf\]",
    "run={swapped} operator.kk=4": "unknown key 'operator.kk'; did you mean 'operator.k'",
    "run={swapped} optim.lr=1": "optim.lr=1: of a trained model the words of operator and swap alone can change",
    "run={swapped} layers=each": "layers=each moves layers to other settings; say which",
    "run={plain} {attention} operator.k=18": "layer 'blocks.0.attn': k=18 exceeds the 17 candidates",
    "run={plain} {attention} swap.init=fresh": "swap.init=fresh would draw new weights",
    "run={plain} operator=convnn swap=all_conv operator.aggregation=sum": "'patch_embed.proj': aggregation=sum",
    "backbone=vit_tiny data=synthetic operator.k=4": "out=FOLDER is needed",
    "backbone=vit_tiny checkpoint=best out=x": "checkpoint=best is of a run",
    "backbone=vit_tiny data=synthetic seed=0,1 operator.k=4 out=x": "seed has several values|seed=0,1 is a sweep",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_evaluated_is_refused_in_a_line(words, call, plain, swapped):
    text = words.format(plain=plain, swapped=swapped, attention=" ".join(ATTENTION))
    assert_refused(call, "scripts/evaluate.py", [*text.split(), "device=cpu"], REFUSED[words], where=plain.parent)


def test_agreement_and_intervals_are_of_the_predictions(plain, monkeypatch):
    kept, real = [], moved.predict

    def keeping(*args, **kwargs):
        scores, found = real(*args, **kwargs)
        kept.append(found)
        return scores, found

    monkeypatch.setattr(moved, "predict", keeping)
    own, few = rows_of(plain, *ATTENTION, "operator.k=1")
    a, b = kept
    assert few.agreement == 100 * np.mean(a.predicted == b.predicted)
    assert few.difference == pytest.approx(few.top1 - own.top1)
