"""Hints lie where their points are drawn, on every kind of axis, and say what is plotted there."""

import math

import pytest

pytest.importorskip("matplotlib")

from convnn.figures.hints import placed_hints, tell, tell_line
from convnn.figures.style import new_figure, save_figure


def test_hints_lie_on_their_points(tmp_path):
    figure, (axes,) = new_figure(1)
    axes.set_xscale("log")
    axes.plot([1, 10, 1000], [5, 6, 7], "o", color="#ff0000", markersize=9, markeredgewidth=0)
    for x, y in ((1, 5), (10, 6), (1000, 7)):
        tell(axes, x, y, f"{x}: {y}")
    tell(axes, 10, math.nan, "nothing")
    tell(axes, 1e9, 6, "outside")
    png, _ = save_figure(figure, tmp_path / "f", dpi=100)
    from matplotlib.image import imread

    picture = imread(png)
    found = placed_hints(figure)
    assert [hint.text for hint in found] == ["1: 5", "10: 6", "1000: 7"]
    for hint in found:
        red, green, blue = picture[int(hint.y * picture.shape[0]), int(hint.x * picture.shape[1]), :3]
        assert (red, green, blue) == pytest.approx((1, 0, 0))


def test_a_line_says_its_label_and_its_numbers_of_many_evenly(tmp_path):
    figure, (axes,) = new_figure(1)
    (line,) = axes.plot(range(1, 101), [i / 8 for i in range(100)])
    axes.set_xlabel("epoch")
    axes.set_ylabel("test\ntop-1 (%)")
    tell_line(line, "k=9")
    save_figure(figure, tmp_path / "f", dpi=50)
    texts = [hint.text for hint in placed_hints(figure)]
    assert len(texts) == 25 and texts[0] == "k=9, epoch 1: test top-1 (%) 0"
    assert texts[-1] == "k=9, epoch 100: test top-1 (%) 12.38"


def test_a_level_says_it_at_its_right_end(tmp_path):
    figure, (axes,) = new_figure(1)
    axes.plot([0, 1], [0, 2])
    tell(axes, None, 1, "plain")
    save_figure(figure, tmp_path / "f", dpi=50)
    (hint,) = placed_hints(figure)
    assert hint.text == "plain" and 0.8 < hint.x <= 1 and 0.3 < hint.y < 0.7
