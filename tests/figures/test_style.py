"""Nothing of a figure is cut: titles, legends, layers' names and markers, with one, two and many of what it shows."""

import pytest
import torch
from fake_runs import write_run
from figure_checks import texts_outside

from convnn import ConvNN2d, ConvNNAttention

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from convnn.figures.curves import draw_curves, draw_layer_heat_maps, draw_over_depth, read_layer_measures
from convnn.figures.neighbors import draw_blends, draw_neighbors, draw_weights
from convnn.figures.style import (
    add_legend,
    add_title,
    axis_from_zero,
    integer_axis,
    line_styles,
    new_figure,
    plain_text,
)

COUNTS = [1, 2, 9]
NAMES = ["layer1.0.conv1", "stages.0.blocks.0.token_mixer.conv"]


def convolutions(name, count, k):
    torch.manual_seed(0)
    x = torch.randn(1, 4, 6, 6)
    return {name.replace("0", str(i), 1): ConvNN2d(4, 4, k).neighborhood(x) for i in range(count)}


@pytest.mark.parametrize("count, name, k", [(1, NAMES[0], 1), (1, NAMES[1], 30), (2, NAMES[1], 4), (9, NAMES[1], 9)])
def test_neighbors_with_any_number_of_layers(count, name, k):
    found = convolutions(name, count, k)
    image = torch.rand(3, 24, 24)
    assert texts_outside(draw_neighbors(image, found, [(23, 23)])) == []
    if count < 9:
        assert texts_outside(draw_blends(image, {0.0: found, 1.0: found}, (12, 12))) == []


@pytest.mark.parametrize("count", [1, 2])
def test_weights_with_any_number_of_layers(count):
    layer = ConvNNAttention(12, 3, 5, num_prefix_tokens=1, grid_size=(3, 4))
    found = {f"blocks.{i}.attn": layer.neighborhood(torch.randn(1, 13, 12)) for i in range(count)}
    assert texts_outside(draw_weights(torch.rand(1, 30, 40), found, [(15, 20)])) == []


@pytest.mark.parametrize("layers", COUNTS)
@pytest.mark.parametrize("epochs", [1, 40])
def test_a_runs_figures_with_any_number_of_layers_and_epochs(layers, epochs, tmp_path):
    folder = write_run(tmp_path / "r", {"operator.blend": 0.5}, layers=layers, epochs=max(epochs, 2))
    figures = draw_curves(folder) | {"other": draw_layer_heat_maps(read_layer_measures(folder), "A title " * 12)}
    assert {name: texts_outside(figure) for name, figure in figures.items()} == {name: [] for name in figures}


@pytest.mark.parametrize("runs", COUNTS)
def test_legends_of_long_labels_stay_inside(runs, tmp_path):
    measures = read_layer_measures(write_run(tmp_path / "r", {"operator.blend": 0.5}, layers=3))
    label = "a configuration with many keys, optim.lr=0.001, swap.fraction=[0.25, 0.75], operator.k=9, number "
    assert texts_outside(draw_over_depth({f"{label}{i}": measures for i in range(runs)})) == []


def test_legends_of_many_short_labels_stay_inside():
    figure, (axes,) = new_figure(1)
    lines = {str(k): axes.plot([0, 1], [0, k], marker="o")[0] for k in range(2, 14)}
    add_legend(figure, lines, "k")
    figure.canvas.draw()
    box, (legend,) = figure.bbox, figure.legends
    assert legend.get_window_extent().x0 >= box.x0 and legend.get_window_extent().x1 <= box.x1


@pytest.mark.parametrize("width", [3, 6.4, 13])
def test_titles_are_wrapped_to_their_figure_which_grows(width):
    figure = Figure(figsize=(width, 4), layout="constrained")
    figure.subplots()
    add_title(figure, "The same query from convolution to attention: its 9 neighbours at each blend")
    assert texts_outside(figure) == []
    assert (figure.get_figheight() > 4) == (width < 13)


def test_text_that_is_cut_says_so():
    assert plain_text("one two\nthree $x$") == "one two three \\$x\\$"
    assert plain_text("word " * 100, 20).split("\n")[-1].endswith("...")


def test_markers_on_an_axis_are_whole():
    _, (axes,) = new_figure(1)
    (line,) = axes.plot([0, 1], [0, 5], marker="o")
    assert line.get_clip_on()
    axis_from_zero(axes)
    assert axes.get_ylim()[0] == 0 and not line.get_clip_on()


def test_a_query_at_the_border_is_whole():
    figure = draw_neighbors(torch.rand(3, 24, 24), convolutions("layer1.0", 1, 4), [(0, 0)])
    assert all(not line.get_clip_on() for axes in figure.axes[:2] for line in axes.lines)


def test_twelve_names_have_twelve_colours():
    names = [f"name{i}" for i in range(12)]
    assert len({style["color"] for style in line_styles(names).values()}) == 12


@pytest.mark.parametrize("last", [1, 2, 7, 300])
def test_epochs_have_integer_ticks_be_it_one(last):
    _, (axes,) = new_figure(1)
    axes.plot([1, last], [0, 1])
    integer_axis(axes, 1, last)
    low, high = axes.get_xlim()
    shown = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert shown and all(tick == round(tick) for tick in shown) and len(shown) <= 12
    assert low < 1 <= last < high


def test_a_run_of_one_epoch_names_no_measure_that_it_lacks(tmp_path):
    folder = write_run(tmp_path / "r", {"operator.blend": 0.5}, layers=2, epochs=2)
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().splitlines()[0] + "\n")
    (folder / "result.json").unlink()
    labels = [line.get_label() for line in draw_curves(folder)["training"].axes[2].lines]
    assert labels == ["blend", "neighbours in the\nconvolution window"]
