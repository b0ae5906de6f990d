"""Diagnostics as pictures: what is read and drawn."""

import statistics

import pytest
from fake_runs import grid, write_run

from convnn.figures.curves import (
    LEAST_TOP,
    LayerMeasures,
    draw_curves,
    draw_layer_heat_maps,
    draw_over_depth,
    read_layer_measures,
)
from convnn.report.build import make_report

pytest.importorskip("pandas")
pytest.importorskip("matplotlib")


def test_a_trend_holds_what_the_metrics_say(tmp_path):
    trend = read_layer_measures(write_run(tmp_path / "r", {"operator.blend": 0.5}, layers=4))
    assert trend.epochs == [1, 2, 3] and trend.layers == [f"layer{i}.conv1" for i in (1, 2, 3, 4)]
    assert trend.last("overlap") == [1 - 0.5 * i / 4 for i in (1, 2, 3, 4)]
    assert trend.values["outside"]["layer2.conv1", 3] == 0.2  # padding and prefix together
    assert "entropy" not in trend.values and ("layer1.conv1", 1) not in trend.values["agreement"]
    assert trend.mean("distance_mean")[0] == pytest.approx(statistics.fmean([0.15, 0.2, 0.25, 0.3]))


def labels_of(figure):
    return " ".join(axes.get_title() + axes.get_ylabel() for axes in figure.axes)


def test_what_says_nothing_gets_no_panel(tmp_path):
    figures = draw_curves(write_run(tmp_path / "r", {"operator.blend": 0.5}, layers=4))
    assert list(figures) == ["diagnostics", "training"]
    shown = labels_of(figures["diagnostics"])
    assert "convolution window" in shown and "entropy" not in shown and "blend" not in shown
    assert "mean over layers" in labels_of(figures["training"])
    image = next(axes for axes in figures["diagnostics"].axes if "window" in axes.get_title()).images[0]
    assert image.get_array().tolist() == [[1 - 0.5 * i / 4] * 3 for i in (1, 2, 3, 4)]


def measures_of(layers, network=()):
    return LayerMeasures([1], list(layers), list(network), {"overlap": {(name, 1): 0.5 for name in layers}})


def places(figure):
    return [list(map(float, line.get_xdata())) for line in figure.axes[0].lines]


def test_depth_is_that_of_the_network_not_of_what_was_replaced():
    network = [f"l{i}" for i in range(9)]
    runs = {"early": measures_of(["l1", "l2"], network), "late": measures_of(["l7"], network)}
    figure = draw_over_depth(runs)
    assert places(figure) == [[2, 3], [8]] and figure.axes[0].get_xlabel() == "layer of the network"
    low, high = figure.axes[0].get_xlim()
    assert low < 1 and high > 9  # all of it is shown
    runs["other"] = measures_of(["b", "c"], ["a", "b", "c"])
    figure = draw_over_depth(runs)
    assert places(figure) == [[1 / 8, 2 / 8], [7 / 8], [1 / 2, 1]] and "last" in figure.axes[0].get_xlabel()


def test_depth_of_runs_that_did_not_keep_the_networks_layers():
    """They stand in the order of a run that replaced all of them, else of the numbers in their names."""
    late, early = measures_of(["blocks.10.attn"]), measures_of(["blocks.9.attn", "blocks.2.attn"])
    assert places(draw_over_depth({"late": late, "early": early})) == [[3], [2, 1]]
    every = measures_of(["stem", "blocks.9.attn", "blocks.2.attn", "blocks.10.attn"])
    assert places(draw_over_depth({"late": late, "every": every})) == [[4], [1, 2, 3, 4]]
    assert draw_over_depth({"late": late}) is None


def test_a_colour_of_the_training_figure_means_one_thing(tmp_path):
    figure = draw_curves(write_run(tmp_path / "r", {"operator.blend": 0.5}, layers=2))["training"]
    meanings = {(line.get_color(), line.get_label()) for axes in figure.axes for line in axes.lines}
    assert len(meanings) == len({colour for colour, _ in meanings}) == len({label for _, label in meanings}) == 5


def test_what_hardly_happens_does_not_fill_the_colours(tmp_path):
    folder = write_run(tmp_path / "r", {"operator.blend": 0.5}, layers=2)
    measures = read_layer_measures(folder)
    measures.values["hub_share"] = dict.fromkeys(measures.values["hub_share"], 0.001)
    panel = next(axes for axes in draw_layer_heat_maps(measures).axes if "most chosen" in axes.get_title())
    assert panel.images[0].get_clim() == (0, LEAST_TOP)


@pytest.mark.parametrize(
    "text", ["", "{}", '{"epoch": 0}', '{"epoch": 0, "layers": [1, {"overlap": "x"}]}', "[1]", "\x00"]
)
def test_damaged_metrics_leave_what_can_be_drawn(text, tmp_path):
    folder = write_run(tmp_path / "r")
    (folder / "metrics.jsonl").write_text(text + "\n")
    assert read_layer_measures(folder).epochs == [] and "diagnostics" not in draw_curves(folder)


@pytest.mark.slow
def test_a_report_shows_layers_and_the_spectrum(tmp_path):
    report = make_report([grid(tmp_path / "runs", (0.0, 1.0), ks=(9,), seeds=(0,), layers=3)], tmp_path / "report")
    names = [picture.name for picture in report.pictures]
    assert {"spectrum", "layers_depth", "layers_epochs1", "layers_epochs2"} <= set(names)
    page = (tmp_path / "report" / "index.html").read_text()
    assert "Accuracy, loss and cost along the spectrum" in page and "over depth" in page


def test_a_runs_own_pictures_are_in_its_report(tmp_path):
    folder = write_run(tmp_path / "r")
    (folder / "pictures").mkdir()
    for kind in ("png", "svg"):
        (folder / "pictures" / f"neighbors.{kind}").write_bytes(b"<svg/>")
    names = [picture.name for picture in make_report([folder], tmp_path / "report").pictures]
    assert "run1_neighbors" in names and "run1_blends" not in names
    (folder / "pictures" / "neighbors.svg").unlink()
    make_report([folder], tmp_path / "report")
    assert not list((tmp_path / "report").glob("run1_*"))
