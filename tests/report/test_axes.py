"""An axis joins only runs that are equal in all else, and a blend that moves is drawn at no number."""

import pytest
from fake_runs import write_run

from convnn.report.build import make_report
from convnn.report.looks import Looks
from convnn.report.plots import accuracy_against_cost, accuracy_heat_map, accuracy_over_number
from convnn.report.spectrum import draw_spectrum
from convnn.report.tables import find_results, runs_frame, summarize
from convnn.report.view import BLEND, K, View

SCHEDULED = {"schedule.blend.shape": "linear"}
LEARNED = {"operator.learn_blend": "layer"}
OWN = {"swap.operator.blend": 0.3}


def tables(folder):
    found = find_results([folder])
    frame = runs_frame(found)
    return frame, Looks(View(summarize(frame), "top1_last")), [run.folder for run in found.runs]


def write(folder, *runs):
    """Write runs given as (keys, top-1)."""
    for i, (keys, top1) in enumerate(runs):
        write_run(folder / f"r{i}", keys, top1, gflops=1.0 + i)


def drawn(made):
    """Return the joined lines of the first panel as {label: points}."""
    figure, _ = made
    lines = figure.axes[0].lines
    return [sorted(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in lines]


PLAIN = {"swap.match": None}


@pytest.mark.parametrize("mover", [SCHEDULED, LEARNED, OWN, PLAIN, {"swap.operator.learn_blend": "head"}])
def test_a_blend_that_moves_is_left_out_of_the_spectrum(mover, tmp_path):
    write(tmp_path, ({BLEND: 0.0}, 90.0), ({BLEND: 1.0}, 80.0), ({BLEND: 1.0} | mover, 10.0))
    frame, looks, folders = tables(tmp_path)
    made = draw_spectrum(frame, looks, folders)
    assert drawn(made) == [[(0.0, 90.0), (1.0, 80.0)]] and "Left out: 1 without one fixed blend" in made[1]
    made = accuracy_over_number(looks, BLEND)
    level = [[(0, 10.0), (1, 10.0)]] if mover == PLAIN else []  # the baseline has a line of its own
    assert drawn(made) == [[(0.0, 90.0), (1.0, 80.0)], *level]
    assert ("Left out: 1 without one fixed blend" in made[1]) == (not level)


def test_several_baselines_are_left_out(tmp_path):
    plain = [(PLAIN | {"optim.lr": lr}, 10.0) for lr in (0.1, 0.2)]
    write(tmp_path, ({BLEND: 0.0}, 90.0), ({BLEND: 1.0}, 80.0), *plain)
    made = accuracy_over_number(tables(tmp_path)[1], BLEND)
    assert len(drawn(made)) == 1 and "Left out: 2 without one fixed blend" in made[1]


@pytest.mark.parametrize("mover", [SCHEDULED, LEARNED])
def test_where_every_blend_moves_there_is_no_axis(mover, tmp_path):
    write(tmp_path, ({BLEND: 0.0} | mover, 90.0), ({BLEND: 1.0} | mover, 80.0))
    frame, looks, folders = tables(tmp_path)
    assert draw_spectrum(frame, looks, folders) is None and not looks.view.x_keys()
    assert "over_blend" not in [p.name for p in make_report([tmp_path], tmp_path / "out").pictures]
    assert set(mover) <= set(summarize(frame).columns)  # the table says that they move


def test_a_spectrum_has_a_line_for_each_value_of_all_else(tmp_path):
    runs = [({BLEND: b, "optim.lr": lr, K: k}, 50 + 10 * b + k + (lr > 0.01)) for b in (0.0, 1.0) for lr in (0.01, 0.1)
            for k in (4, 9)]  # fmt: skip
    write(tmp_path, *runs, ({BLEND: 0.5, "optim.lr": 0.5, K: 4}, 1.0))
    frame, looks, folders = tables(tmp_path)
    made = draw_spectrum(frame, looks, folders)
    assert drawn(made) == [[(0.0, 50 + more), (1.0, 60 + more)] for more in (4, 5, 9, 10)]
    assert "Left out: 1 that no run with another blend equals" in made[1]


@pytest.mark.parametrize(
    "key, values", [("optim.name", ("sgd", "adamw")), ("data.name", ("a", "b")), ("train.ema", (None, 0.9))]
)
def test_runs_that_differ_in_another_way_share_no_line(key, values, tmp_path):
    write(tmp_path, *[({BLEND: b, key: v}, 40 + 10 * b + i) for b in (0.0, 1.0) for i, v in enumerate(values)])
    frame, looks, folders = tables(tmp_path)
    assert sorted(drawn(draw_spectrum(frame, looks, folders))) == [[(0, 40), (1, 50)], [(0, 41), (1, 51)]]


def test_a_heat_map_and_an_axis_over_k_leave_out_what_moves(tmp_path):
    fixed = [({BLEND: b, K: k}, 50.0 + k + b) for b in (0.0, 1.0) for k in (4, 9)]
    moving = [({BLEND: 1.0, K: 9} | SCHEDULED, 1.0), ({BLEND: 1.0, K: 9, "schedule.k.shape": "step"}, 2.0)]
    write(tmp_path, *fixed, *moving)
    _, looks, _ = tables(tmp_path)
    figure, _ = accuracy_heat_map(looks.view)
    assert figure.axes[0].images[0].get_array().tolist() == [[54.0, 55.0], [59.0, 60.0]]
    points = [point for line in drawn(accuracy_over_number(looks, K)) for point in line]
    assert (9, 2.0) not in points and (9, 60.0) in points
    assert accuracy_against_cost(looks, "gflops", "GFLOPs") is not None


def test_a_label_says_that_a_blend_moves(tmp_path):
    write(tmp_path, ({BLEND: 0.5}, 60.0), ({BLEND: 1.0} | SCHEDULED, 50.0), ({BLEND: 0.5} | LEARNED, 40.0))
    _, looks, _ = tables(tmp_path)
    named = {row["top1_last_mean"]: row[BLEND] for row in looks.view.rows}
    assert named == {60.0: 0.5, 50.0: "linear schedule", 40.0: "learned from 0.5"}


def test_a_number_of_neighbours_of_each_layers_own_is_a_name_among_numbers(tmp_path):
    ks = [({BLEND: b, K: k}, 50.0 + i + b) for b in (0.0, 1.0) for i, k in enumerate((4, 9, "kernel"))]
    write(tmp_path, *ks)
    frame, looks, folders = tables(tmp_path)
    assert set(frame[K]) == {4, 9, "kernel"} and K in looks.view.numbers
    drawn_over_k = [x for line in drawn(accuracy_over_number(looks, K)) for x, _ in line]
    assert sorted(set(drawn_over_k)) == [4, 9]  # as what a schedule moves, it has no place on the axis
    lines = drawn(draw_spectrum(frame, looks, folders))
    assert lines == [[(0.0, 50.0 + i), (1.0, 51.0 + i)] for i in range(3)]
    assert make_report([tmp_path], tmp_path / "out").pictures
