"""Pictures of many arms, of long names, of other architectures, data and classes."""

import warnings

import numpy as np
import pytest

from convnn.analysis import cka, classes
from convnn.analysis.base import ArmResults
from convnn.analysis.drawing import draw_headline, draw_series, figure_of, short_names

pytest.importorskip("matplotlib")
from figure_checks import texts_outside

RESNET, VIT = ["conv1", "layer1.0", "layer2.0"], ["patch_embed.proj", *(f"blocks.{i}" for i in range(6))]


def arm(name, layers=RESNET, values=None, **more):
    likeness = np.eye(len(layers)).tolist()
    result = {
        "series": {"s": {"at": layers, "values": [0.5] * len(layers)}},
        "layers": layers,
        "likeness": likeness,
        "images": "same",
        "arrays": {"vectors": np.eye(len(layers), 10)},
        "v": 1.0,
    }
    result["series"]["likeness to the last depth"] = {"at": layers, "values": likeness[-1]}
    return ArmResults(name, values or {"operator.name": name}, dict.fromkeys((0, 1), result | more))


def drawn(arms, *, panels=2):
    """Return a figure whose layout was possible."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return figure_of(
            panels,
            lambda axes: (
                draw_headline(axes[1], arms, lambda r: {"v": r["v"]}, "v", "v"),
                draw_series(axes[0], arms, "s", "s"),
            )[1],
            "title",
        )


def ticks(axes):
    return [label.get_text() for label in axes.get_xticklabels()]


def legend(figure):
    return [text.get_text() for one in figure.legends for text in one.get_texts()]


def test_other_architectures_share_no_names_of_layers():
    figure = drawn([arm("resnet"), arm("vit", VIT)])
    assert ticks(figure.axes[0]) == ["first", "last"] and figure.axes[0].get_xlabel() == "depth"
    for line, layers in zip(figure.axes[0].lines, (RESNET, VIT), strict=True):
        assert line.get_xdata() == pytest.approx(np.linspace(0, 1, len(layers)))


def test_layers_of_which_an_arm_has_only_some_stand_at_their_names():
    figure = drawn([arm("all"), arm("some", RESNET[1:])])
    assert ticks(figure.axes[0]) == RESNET
    assert [list(line.get_xdata()) for line in figure.axes[0].lines] == [[0, 1, 2], [1, 2]]


def test_many_arms_are_numbered():
    arms = [arm(f"vit_tiny_patch16_224, imagefolder, operator {i}, swap.kind=attention") for i in range(10)]
    figure = drawn(arms)
    assert ticks(figure.axes[1]) == [str(i) for i in range(1, 11)] and figure.axes[1].get_xlabel() == "arm"
    assert [label.split()[0] for label in legend(figure)] == ticks(figure.axes[1])
    assert "operator 9" in " ".join(legend(figure)[-1].split()) and not texts_outside(figure)


@pytest.mark.parametrize(("count", "name", "numbered"), [(3, "a", False), (7, "a", True), (2, "a" * 30, True)])
def test_numbers_stand_for_many_or_long_names_alone(count, name, numbered):
    arms = [arm(f"{name}{i}") for i in range(count)]
    assert (short_names(arms) == {one.name: one.name for one in arms}) is not numbered


def test_names_along_the_spectrum_stay():
    arms = [arm(f"blend={i / 10}", values={"operator.blend": i / 10}) for i in range(8)]
    assert short_names(arms)["blend=0.7"] == "blend=0.7"


def test_arms_of_many_settings_stand_side_by_side():
    """Labels of lines that list all that differs covered the panels."""
    more = {f"data.setting_{i}": i for i in range(9)}
    values = [{"operator.blend": float(i), **{key: v + i for key, v in more.items()}} for i in range(3)]
    figure = drawn([arm(f"arm {i}", values=value) for i, value in enumerate(values)])
    assert ticks(figure.axes[1]) == ["arm 0", "arm 1", "arm 2"] and figure.axes[1].get_legend() is None


def test_networks_are_compared_with_an_arm_of_the_same_data():
    arms = [arm("others", images="others"), arm("first"), arm("second"), arm("vit", VIT)]
    assert cka.first_arm(arms).name == "first"
    compared = cka.compare(arms)
    assert [one.name for one in compared if cka.FIRST in one.results[0]["series"]] == ["first", "second"]
    assert "CKA to first" in [axes.get_ylabel() for axes in cka.draw(compared).axes]


def test_a_likeness_that_no_arm_has_makes_no_panel():
    alone = [ArmResults(name, {}, {0: arm(name, images=name).results[0]}) for name in ("a", "b")]
    labels = [axes.get_ylabel() for axes in cka.draw(cka.compare(alone)).axes]
    assert "CKA to the last depth" in labels and not {"CKA to a", "CKA between seeds"} & set(labels)


def test_the_legend_of_classes_lists_the_arms_that_are_drawn():
    def of(name, own):
        series = {"accuracy": {"at": own, "values": [0.5] * len(own)}}
        return ArmResults(name, {}, {0: {"series": series, "arrays": {"confusion": np.eye(len(own))}}})

    arms = [of("others", ["x", "y"]), of("a", ["cat", "dog"]), of("b", ["cat", "dog"])]
    figure = classes.draw(arms)
    assert legend(figure) == ["a", "b"] and ticks(figure.axes[0]) == ["cat", "dog"]
    assert figure.axes[3].get_title() == "b less a (points)"
