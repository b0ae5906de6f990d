"""Neighbours drawn on images: the right cells, any shape of image, and scripts/visualize.py from a run to its files."""

import json
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import tiny

from convnn import ConvNN2d, ConvNNAttention
from convnn.cli import visualize
from convnn.errors import ConfigError
from convnn.train.run import run

pytest.importorskip("matplotlib")

from convnn.figures.neighbors import draw_blends, draw_neighbors, draw_weights, query_at
from convnn.train.pictures import read_image


def cells(axes):
    """(left, top) of the coloured cells of a panel, best rank first."""
    marks = [p for p in axes.patches if p.get_zorder() == 3]
    return [(round(p.get_x(), 3), round(p.get_y(), 3)) for p in marks[::-1]]


def test_the_query_of_a_pixel_is_the_token_below_it():
    found = ConvNN2d(3, 4, 9, 2, blend=0.0).neighborhood(torch.randn(1, 3, 6, 10))
    assert found.geometry.out_shape == (3, 5)
    assert query_at(found, (0, 0), (60, 100)) == 0
    assert query_at(found, (25, 81), (60, 100)) == 1 * 5 + 4  # row 2, column 8: the tokens of every second pixel
    assert query_at(found, (59, 99), (60, 100)) == 14
    attention = ConvNNAttention(8, 2, 4, num_prefix_tokens=1, grid_size=(3, 4)).neighborhood(torch.randn(1, 13, 8))
    assert query_at(attention, (59, 0), (60, 80)) == 1 + 2 * 4


def test_neighbours_stand_where_they_were_chosen_on_an_image_that_is_not_square():
    image = torch.rand(3, 12, 20)
    found = ConvNN2d(3, 4, 9, blend=0.0).neighborhood(torch.randn(1, 3, 6, 10))
    figure = draw_neighbors(image, {"conv": found}, [(0, 0), (7, 9)])
    panels = figure.axes
    corner, inner = (panels[i] for i in (1, 3))
    assert cells(corner)[0] == (0, 0) and sorted(cells(corner)) == [(x, y) for x in (-2, 0, 2) for y in (-2, 0, 2)]
    assert sorted(cells(inner)) == [(x, y) for x in (6, 8, 10) for y in (4, 6, 8)]
    assert [panel.texts[-1].get_text() for panel in (corner, inner)] == ["9 of 9 in window"] * 2
    assert any(text.get_text() == "zero padding" for text in figure.legends[0].get_texts())


def test_blends_and_weights_with_cls():
    layer = ConvNNAttention(8, 2, 5, num_prefix_tokens=1, grid_size=(3, 4))
    x, image = torch.randn(1, 13, 8), torch.rand(1, 30, 40)
    answers = {blend: {"blocks.0.attn": layer.neighborhood(x, blend=blend)} for blend in (0.0, 1.0)}
    figure = draw_blends(image, answers, (15, 20))
    labels = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert "blend 0\n(convolution)" in labels and "blend 1\n(attention)" in labels
    weights = draw_weights(image, answers[1.0], [(15, 20)])
    found = answers[1.0]["blocks.0.attn"]
    chosen = set(found.index[0, :, query_at(found, (15, 20), (30, 40))].flatten().tolist())
    assert len(cells(weights.axes[1])) == len(chosen)
    assert "class token (CLS)" in [text.get_text() for text in weights.legends[0].get_texts()]
    assert draw_weights(image, {"conv": ConvNN2d(1, 1).neighborhood(torch.rand(1, 1, 4, 4))}) is None


def test_queries_outside_are_refused():
    found = ConvNN2d(1, 1).neighborhood(torch.rand(1, 1, 4, 4))
    with pytest.raises(ValueError, match=r"query \(4, 0\) lies outside the image of 4 rows"):
        draw_neighbors(torch.rand(1, 4, 4), found, [(4, 0)])


def test_a_head_that_a_layer_lacks_is_refused():
    image, conv = torch.rand(1, 30, 40), ConvNN2d(1, 1).neighborhood(torch.rand(1, 1, 4, 4))
    layer = ConvNNAttention(12, 3, 5, grid_size=(3, 4))
    found = {"conv": conv, "blocks.0.attn": layer.neighborhood(torch.randn(1, 12, 12))}
    for head in (3, -1):
        with pytest.raises(ValueError, match=f"head={head}: layer blocks.0 has heads 0 to 2; choose one of them"):
            draw_neighbors(image, found, head=head)
        with pytest.raises(ValueError, match=f"head={head}: layer blocks.0 has heads 0 to 2"):
            draw_blends(image, {0.5: found}, (2, 2), head=head)
    with pytest.raises(ValueError, match="head=1: no layer that is drawn has several heads; leave it at 0"):
        draw_neighbors(image, {"conv": conv}, head=1)


def test_the_title_names_the_head_as_it_was_asked_for():
    layer = ConvNNAttention(12, 3, 5, grid_size=(3, 4))
    found = {"blocks.0.attn": layer.neighborhood(torch.randn(1, 12, 12))}
    for head in (0, 2):
        figure = draw_neighbors(torch.rand(1, 30, 40), found, [(15, 20)], head=head)
        assert f"(head {head})" in figure.get_suptitle().replace("\n", " ")
        own = found["blocks.0.attn"].index[0, head, query_at(found["blocks.0.attn"], (15, 20), (30, 40))]
        assert cells(figure.axes[1]) == [(int(t) % 4 * 10, int(t) // 4 * 10) for t in own]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    run(tiny("operator=hybrid", "swap.last=2", f"run.dir={root}/conv"))
    run(tiny(f"run.dir={root}/vit", vit=True))
    run(tiny("swap=none", f"run.dir={root}/plain"))
    return root


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
def test_the_script_draws_everything_of_a_run(runs, capsys):
    visualize.visualize([f"run={runs}/conv", "index=3", "queries=2,3;7,7", "layers=layer4.0.conv2.neighbors"])
    every = [f"{name}.{kind}" for name in ("blends", "diagnostics", "neighbors", "training") for kind in ("png", "svg")]
    assert names(runs / "conv" / "pictures") == sorted([".convnn-pictures", *every])
    assert len(capsys.readouterr().out.splitlines()) == 4
    visualize.visualize([f"run={runs}/vit", f"out={runs}/elsewhere", "head=1"])
    assert {"weights.png", "weights.svg", "neighbors.png"} <= set(names(runs / "elsewhere"))
    assert (runs / "elsewhere" / "neighbors.svg").stat().st_size < 500_000


@pytest.mark.slow
def test_image_files_keep_their_proportions_where_the_model_can(runs):
    from PIL import Image

    Image.new("RGB", (90, 40), (200, 10, 10)).save(runs / "wide.png")
    config = tiny().data
    assert read_image(runs / "wide.png", 3, config, 8, square=False).x.shape == (1, 3, 8, 16)
    grey = read_image(runs / "wide.png", 1, config, 8, square=True)
    assert grey.x.shape == (1, 1, 8, 8) and grey.picture.min() > 0
    for name in ("conv", "vit"):  # a ViT takes its own size only
        visualize.visualize([f"run={runs}/{name}", f"image={runs}/wide.png", f"out={runs}/wide-{name}"])
        assert (runs / f"wide-{name}" / "neighbors.png").stat().st_size > 5_000


BEFORE_LOADING = [
    ("queries=1", "queries=1 must be ROW,COLUMN"),
    ("head=-1", "head=-1"),
    ("checkpoint=worst", "checkpoint=worst"),
    ("", "no-run is not a run folder"),
    ("kk=1", "unknown key 'kk'"),
]
AFTER_LOADING = [
    ("index=16", "index=16: the test set has images 0 to 15"),
    ("image=missing.png", "image=missing.png cannot be read"),
    ("queries=0,99", r"query \(0, 99\) lies outside the image of 8 rows and 8 columns"),
    ("layers=nope", "layers=nope: this run has layer4.0.conv1.neighbors"),
]


@pytest.mark.parametrize("argument, message", BEFORE_LOADING)
def test_mistakes_are_named_early(argument, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        visualize.visualize([word for word in (f"run={tmp_path}/no-run", argument) if word])


@pytest.mark.slow
@pytest.mark.parametrize("argument, message", AFTER_LOADING)
def test_mistakes_are_named(argument, message, runs):
    with pytest.raises(ConfigError, match=message):
        visualize.visualize([f"run={runs}/conv", argument, f"out={runs}/nothing"])
    assert not (runs / "nothing").exists()


@pytest.mark.slow
def test_a_head_that_the_run_lacks_is_named(runs):
    with pytest.raises(ConfigError, match=r"head=\d: layer blocks\.0 has heads 0 to \d; choose one of them"):
        visualize.visualize([f"run={runs}/vit", "head=9", f"out={runs}/nothing"])
    assert not (runs / "nothing").exists()


@pytest.mark.slow
def test_a_run_without_neighbours_says_so(runs):
    with pytest.raises(ConfigError, match="no layer that chooses neighbours"):
        visualize.visualize([f"run={runs}/plain"])


@pytest.mark.slow
def test_the_readmes_six_lines(tmp_path):
    """As written, but for the size of the model and the images."""
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    code = next(block for block in text.split("```python\n")[1:] if "draw_neighbors" in block).split("```")[0]
    assert (
        len([line for line in code.splitlines() if line.strip() and not line.startswith(("import", "from", "#"))]) <= 6
    )
    small = 'timm.create_model("resnet18", channels=[4, 4, 8, 8], layers=[1, 1, 1, 1], '
    assert 'timm.create_model("resnet18", ' in code
    prelude = "import torch\nimages, labels = torch.rand(2, 3, 64, 64), torch.tensor([0, 1])\n"
    script = prelude + code.replace('timm.create_model("resnet18", ', small)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "neighbors.png").stat().st_size > 10_000


@pytest.mark.slow
def test_pictures_go_to_wandb_at_the_end_of_a_run(tmp_path):
    """The offline run on disk holds the metrics of each layer and the pictures."""
    pytest.importorskip("wandb")
    run(tiny("tracker=wandb", "swap.last=2", f"run.dir={tmp_path}/r"))
    (folder,) = (tmp_path / "r" / "wandb").glob("offline-run-*")
    media = {path.name.split("_")[0] for path in (folder / "files" / "media" / "images" / "pictures").iterdir()}
    assert media == {"neighbors", "blends", "diagnostics", "training"}
    wanted = {"test_top1", "layers/layer4.0.conv1/overlap", "layers/layer4.0.conv1/agreement"}
    wanted |= {"pictures/neighbors", "pictures/diagnostics"}
    deadline = time.monotonic() + 60
    while not wanted <= (keys := logged_keys(next(folder.glob("*.wandb")))) and time.monotonic() < deadline:
        time.sleep(0.5)  # W&B's own process writes the file, and may not be done yet
    assert wanted <= keys


def logged_keys(path):
    return {item.nested_key[0] for record in wandb_records(path) for item in record.history.item}


def wandb_records(path):
    """The records of an offline run's file: a LevelDB log (blocks of 32 KiB; checksum, length, kind) of protobufs."""
    from wandb.proto import wandb_internal_pb2

    data, at, part = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        if at + 7 + length > len(data):  # not written to its end yet
            return
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            yield record
            part = b""


@pytest.mark.slow
def test_the_reports_run_holds_tables_and_plots(tmp_path):
    pytest.importorskip("wandb")
    pytest.importorskip("pandas")
    from fake_runs import grid

    from convnn.config.schema import TrackerConfig
    from convnn.report.build import make_report
    from convnn.runs.tracking import publish_report

    report = make_report([grid(tmp_path / "runs", ks=(4,), seeds=(0,), layers=2)], tmp_path / "report")
    tables = [json.loads(table.to_json(orient="records")) for table in (report.summary, report.runs)]
    (tmp_path / "w").mkdir()
    publish_report(TrackerConfig(name="wandb"), tmp_path / "w", "g", *tables, [p.png for p in report.pictures])
    (folder,) = (tmp_path / "w" / "wandb").glob("offline-run-*")
    files = folder / "files" / "media"
    runs = json.loads(next((files / "table").glob("runs_*.table.json")).read_text())
    assert len(runs["data"]) == 3 and {"name", "status", "operator.blend", "top1_last"} <= set(runs["columns"])
    assert any(path.name.startswith("spectrum") for path in (files / "images" / "pictures").iterdir())


def test_an_image_file_that_pillow_refuses_is_named(tmp_path, monkeypatch):
    """Pillow refuses with other errors than OSError too: a picture of too many pixels."""
    from PIL import Image

    Image.new("RGB", (40, 40)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ConfigError, match=r"large\.png cannot be read as an image"):
        read_image(tmp_path / "large.png", 3, tiny().data, 8, square=True)
