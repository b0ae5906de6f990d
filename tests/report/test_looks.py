"""One colour a configuration in all pictures of a page; colours of a heat map that do not make noise look large."""

import math

import pytest
from fake_runs import grid, write_run
from figure_checks import texts_outside

from convnn.figures.style import NEUTRAL, add_title
from convnn.report import plots, spectrum
from convnn.report.looks import Looks
from convnn.report.plots import accuracy_heat_map
from convnn.report.tables import find_results, runs_frame, summarize
from convnn.report.view import BLEND, K, View

pytest.importorskip("pandas")
pytest.importorskip("matplotlib")

from matplotlib.colors import to_hex


def looks_of(*roots):
    return Looks(View(summarize(runs_frame(find_results(roots))), "top1_last"))


@pytest.fixture
def draw(monkeypatch):
    """Return what draws all figures of a report and returns them by title, without the files."""

    def drawn(folder, subject=""):
        figures = {}

        def keep(name, title, figure, caption, out, subject):
            add_title(figure, f"{title} ({subject})" if subject else title)
            figures[title] = figure

        monkeypatch.setattr(plots, "_save", keep)
        found = find_results([folder])
        frame = runs_frame(found)
        plots.draw_all(frame, summarize(frame), "top1_last", [run.folder for run in found.runs], folder, subject)
        return figures

    return drawn


def legend(figure):
    """Return the colours of a figure's legend by label."""
    (box,) = figure.legends
    texts = [text.get_text().replace("\n", " ") for text in box.get_texts()]
    return {text: to_hex(handle.get_color()) for text, handle in zip(texts, box.legend_handles, strict=True)}


def test_a_configuration_has_one_colour_in_all_pictures(tmp_path, draw):
    for i in range(9):
        write_run(tmp_path / f"r{i}", {"operator.name": f"o{i}"}, 80.0 + i, gflops=1.0 + i, layers=2)
    figures = draw(tmp_path)
    shown = ["Accuracy against computation", "Training curves", "What the layers choose, over depth"]
    first, *others = [legend(figures[title]) for title in shown]
    assert len(first) == len(set(first.values())) == 9 and all(one == first for one in others)
    dots = figures["Accuracy by configuration"].axes[0].containers
    assert [to_hex(dot.lines[0].get_color()) for dot in dots] == list(first.values())


def test_a_colour_is_a_value_of_one_key(tmp_path, draw):
    figures = draw(grid(tmp_path / "runs", layers=2))
    colour = legend(figures["Accuracy over blend"])
    assert list(colour) == ["4", "9", "16"]
    for title in ("Accuracy, loss and cost along the spectrum", "Accuracy against computation", "Training curves"):
        entries = legend(figures[title])
        assert {label: entries[label] for label in entries if label.startswith("k=")} == {
            label: colour[label.split(",")[0].removeprefix("k=")] for label in entries if label.startswith("k=")
        }
    assert legend(figures["Accuracy against computation"])["blend=0"] == NEUTRAL
    curves = figures["Training curves"].axes[0].lines
    looks = {(to_hex(line.get_color()), line.get_linestyle()) for line in curves}
    assert len(looks) == len(curves) == 9


def test_a_line_through_several_colours_is_grey(tmp_path, draw):
    for blend in (0.0, 0.5, 1.0):
        write_run(tmp_path / f"r{blend}", {BLEND: blend}, 80 + blend)
    figures = draw(tmp_path)
    (line,) = figures["Accuracy over blend"].axes[0].lines
    assert to_hex(line.get_color()) == NEUTRAL
    assert len(set(legend(figures["Training curves"]).values())) == 3


@pytest.mark.parametrize("blends, ks, most", [(6, 4, 12), (7, 2, 12), (40, 1, 12), (2, 30, 12), (3, 3, 12)])
def test_the_lines_picked_can_be_told_apart(blends, ks, most, tmp_path):
    for b in range(blends):
        for k in range(ks):
            write_run(tmp_path / f"r{b}-{k}", {BLEND: b / blends, K: k + 1}, epochs=2)
    looks = looks_of(tmp_path)
    picked = looks.pick(looks.view.rows, most)
    seen = {(to_hex(look["color"]), str(look["linestyle"])) for look in looks.of(picked)}
    assert len(seen) == len(picked) and min(6, blends * ks) <= len(picked) <= most


def test_a_scheduled_run_has_a_place_in_the_picture_of_costs(tmp_path, draw):
    for i, keys in enumerate(({BLEND: 0.0}, {BLEND: 1.0}, {BLEND: 1.0, "schedule.blend.shape": "linear"})):
        write_run(tmp_path / f"r{i}", keys, 80.0 + i, gflops=1.0 + i)
    figures = draw(tmp_path)
    figure = figures["Accuracy against computation"]
    assert len(figure.axes[0].collections) >= 3 and "blend=linear schedule" in legend(figure)
    assert not any(math.isnan(x) for dots in figure.axes[0].collections for x, _ in dots.get_offsets())


@pytest.mark.parametrize("number", [1, 2, pytest.param(14, marks=pytest.mark.long)])
def test_nothing_of_a_reports_figures_is_cut(number, tmp_path, draw):
    for i in range(number):
        keys = {"operator.name": f"an operator with a long name {i}", BLEND: 0.5}
        write_run(tmp_path / f"r{i}", keys, 80.0 + i, gflops=1.0 + i, layers=number)
    figures = draw(tmp_path, "a sweep with a long name: a data set and another data set, 3 to 10 epochs")
    cut = {title: texts_outside(figure) for title, figure in figures.items()}
    assert cut == {title: [] for title in figures} and figures


# ------------------------------------------------------------------------------------------------- heat maps


def span(folder, top1, seeds):
    for blend in (0.0, 1.0):
        for k in (4, 9):
            for seed in range(seeds):
                value = top1 * (blend + (k == 9)) / 2 + (2.0 if seed else -2.0) * (seeds > 1) + 50
                write_run(folder / f"b{blend}k{k}s{seed}", {BLEND: blend, K: k}, value, seed=seed)
    figure, caption = accuracy_heat_map(looks_of(folder).view)
    low, high = figure.axes[0].images[0].get_clim()
    return high - low, caption


def test_noise_does_not_fill_the_colours(tmp_path):
    """Means that lie 1.5 points apart, of seeds that differ by two standard deviations of 2.83."""
    wide, caption = span(tmp_path / "two", 1.5, seeds=2)
    assert wide == pytest.approx(4 * 8**0.5) and "The colours span 11 points or more" in caption
    wide, caption = span(tmp_path / "one", 1.5, seeds=1)
    assert wide == plots.LEAST_SPAN_OF_ONE_SEED and "what one seed's noise may be" in caption
    assert span(tmp_path / "far", 30.0, seeds=2)[0] == pytest.approx(30)


@pytest.mark.parametrize("top1, ends", [(99.9, (95, 100)), (0.5, (0, 5))])
def test_colours_end_where_accuracies_do(top1, ends, tmp_path):
    for blend in (0.0, 1.0):
        for k in (4, 9):
            write_run(tmp_path / f"b{blend}k{k}", {BLEND: blend, K: k}, top1)
    figure, _ = accuracy_heat_map(looks_of(tmp_path).view)
    assert figure.axes[0].images[0].get_clim() == pytest.approx(ends)


def test_markers_on_the_axis_of_layers_are_whole(tmp_path):
    folder = write_run(tmp_path / "r", {BLEND: 1.0}, layers=3)
    frame = runs_frame(find_results([tmp_path]))
    (_, _, made), *_ = spectrum.draw_layers(frame, looks_of(tmp_path), [folder])
    lines = made[0].axes[0].lines
    assert min(lines[0].get_ydata()) == 0 and not lines[0].get_clip_on()
