"""Runs are measured once, kept, averaged over seeds and drawn; what cannot be measured is told."""

import csv
import json
import math
import os
import shutil
import statistics
from dataclasses import replace

import numpy as np
import pytest
from figure_checks import texts_outside
from folder_runs import folder_config, write_pets
from helpers import tiny

from convnn.analysis import measuring
from convnn.analysis.base import ArmResults, Mean, headline_means, series_means
from convnn.analysis.drawing import draw_headline, draw_series, figure_of, looks_of, spectrum_key
from convnn.analysis.kept import keep_result, kept_result
from convnn.analysis.measuring import ArmRuns, Asked, measure_arms
from convnn.analysis.registry import ANALYSES, chosen, load_analysis
from convnn.errors import ConfigError
from convnn.runs.contents import remove_earlier
from convnn.stats.paired import mean_interval
from convnn.train.run import run

pytest.importorskip("pandas")
pytest.importorskip("matplotlib")
OWN = ["erf", "distance", "fourier", "noise", "variance", "cka"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two blends of a ResNet on 8 x 8 pixels, one seed each."""
    place = tmp_path_factory.mktemp("analysed")
    write_pets(place / "pets")
    for blend in (0, 1):
        more = ["operator=spectrum", f"operator.blend={blend}", "swap=all_conv", "swap.last=null"]
        run(folder_config(place / "pets", place / f"b{blend}", *more))
    return place


@pytest.fixture
def runs(finished, tmp_path):
    """Copies of the runs, whose data stays where it is."""
    for name in ("b0", "b1"):
        shutil.copytree(finished / name, tmp_path / name)
    return tmp_path


def arms_of(place):
    return [ArmRuns(f"blend={b}", {"operator.blend": float(b)}, {0: place / f"b{b}"}) for b in (0, 1)]


# ------------------------------------------------------------------------------------------- all analyses


@pytest.mark.long
def test_every_analysis_measures_keeps_and_draws(runs, tmp_path):
    from convnn.analysis.files import table, write_analysis

    lines = []
    found = measure_arms(arms_of(runs), Asked(OWN, device="cpu"), lines.append)
    assert (found.measured, found.kept, found.failed) == (12, 0, []) and len(lines) == 12
    again = measure_arms(arms_of(runs), Asked(OWN, device="cpu"), lines.append)
    assert (again.measured, again.kept) == (0, 12) and lines[-1].endswith("(kept)")
    for name in OWN:
        analysis = load_analysis(name)
        first, second = ([arm.results[0] for arm in one.arms[name]] for one in (found, again))
        for fresh, kept in zip(first, second, strict=True):
            assert json.dumps(analysis.headline(fresh)) == json.dumps(analysis.headline(kept))
            for key, array in fresh.get("arrays", {}).items():
                assert np.array_equal(array, kept["arrays"][key])
        entry = json.loads((runs / "b0" / "analyses" / f"{name}.json").read_text())
        assert entry["headline"] == pytest.approx(analysis.headline(first[0])) and entry["source"] and entry["title"]
        files = write_analysis(tmp_path / "out", name, analysis, again.arms[name])
        assert sorted(file.name for file in files) == [f"{name}.{kind}" for kind in ("csv", "png", "svg")]
        header, rows = table(analysis, found.arms[name])
        assert {row[0] for row in rows} == {"blend=0", "blend=1"} and header[1] == "operator.blend"
        written = list(csv.reader((tmp_path / "out" / f"{name}.csv").open()))
        assert len(written) >= len(rows) + 1
        assert not texts_outside(analysis.draw(found.arms[name]))
    fields = found.arms["erf"][0].results[0]["arrays"]["fields"]
    assert fields.shape[1:] == (8, 8) and fields.sum((1, 2)) == pytest.approx(1, abs=1e-5)
    # At blend 0 all neighbours lie in a 3 x 3 window, on 8 x 8 pixels in the first block.
    distance = found.arms["distance"][0].results[0]["series"]["distance"]
    first = distance["values"][distance["at"].index("layer1.0.conv1")]
    assert first == pytest.approx((4 + 4 * math.sqrt(2)) / 9, abs=1e-6)


@pytest.mark.long
def test_a_vits_tokens_are_maps_and_its_heads_are_told_apart(tmp_path):
    run(tiny("train.max_steps=1", "operator.k=4", f"run.dir={tmp_path}/vit", vit=True))
    found = measure_arms([ArmRuns("vit", {}, {0: tmp_path / "vit"})], Asked(OWN, device="cpu"))
    assert found.measured == 6 and not found.failed
    heads = found.arms["distance"][0].results[0]["heads"]
    assert list(heads) == ["blocks.0.attn", "blocks.1.attn"] and len(set(map(len, heads.values()))) == 1
    assert found.arms["fourier"][0].results[0]["series"]["high_frequency"]["at"][-1] == "blocks.1"
    for name in OWN:
        assert not texts_outside(load_analysis(name).draw(found.arms[name]))


# ------------------------------------------------------------------------------------------- what is kept


def test_other_settings_and_other_checkpoints_are_measured_again(runs):
    arms, asked = arms_of(runs)[:1], {"names": ["variance"], "device": "cpu"}
    assert measure_arms(arms, Asked(**asked)).measured == 1
    assert measure_arms(arms, Asked(**asked, images=4)).measured == 1
    assert measure_arms(arms, Asked(**asked, images=4)).kept == 1
    checkpoints = runs / "b0" / "checkpoints"
    shutil.copy(runs / "b1" / "checkpoints" / "last.pt", checkpoints / "last.pt")
    other = measure_arms(arms, Asked(**asked, images=4))
    assert not other.kept and "operator.blend" in other.failed[0]  # it is not even of this configuration


def test_a_damaged_record_is_measured_again(runs):
    arms, asked = arms_of(runs)[:1], Asked(["cka"], device="cpu")
    first = measure_arms(arms, asked).arms["cka"][0].results[0]
    file = runs / "b0" / "analyses" / "cka.npz"
    file.write_bytes(file.read_bytes()[:100])
    again = measure_arms(arms, asked)
    assert again.measured == 1 and np.array_equal(
        again.arms["cka"][0].results[0]["arrays"]["vectors"], first["arrays"]["vectors"]
    )
    file.with_suffix(".json").write_text('{"settings"')
    assert measure_arms(arms, asked).measured == 1


def test_an_overwritten_run_leaves_no_results_behind(runs):
    keep_result(runs / "b0", "cka", {}, {"arrays": {"x": np.ones(2)}}, {}, {})
    (runs / "b0" / "analyses" / "notes.json").write_text("{}")
    assert kept_result(runs / "b0", "cka", {})["arrays"]["x"].tolist() == [1, 1]
    remove_earlier(runs / "b0")
    assert [path.name for path in (runs / "b0" / "analyses").iterdir()] == ["notes.json"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_run_that_cannot_be_written_is_measured_all_the_same(runs):
    (runs / "b0").chmod(0o500)
    lines = []
    found = measure_arms(arms_of(runs)[:1], Asked(["variance"], device="cpu"), lines.append)
    assert found.measured == 1 and "is not kept" in lines[-1]


# ------------------------------------------------------------------------------------------- what does not apply


def test_a_plain_network_has_no_neighbours_and_that_is_no_failure(finished, tmp_path):
    run(folder_config(finished / "pets", tmp_path / "plain", "swap=none"))
    lines = []
    found = measure_arms(
        [ArmRuns("plain", {}, {0: tmp_path / "plain"})], Asked(["distance", "variance"], device="cpu"), lines.append
    )
    assert found.left_out == {"distance": ["no layer chooses neighbours (swap.txt says what was replaced)"]}
    assert not found.arms["distance"] and found.arms["variance"] and not found.failed
    assert lines[0].startswith("distance  plain seed=0: does not apply: no layer")


def test_a_run_that_cannot_be_read_does_not_stop_the_others(runs):
    (runs / "b0" / "checkpoints" / "last.pt").write_bytes(b"no checkpoint")
    found = measure_arms(arms_of(runs), Asked(["variance", "cka"], device="cpu"))
    assert len(found.failed) == 1 and str(runs / "b0") in found.failed[0]
    assert [arm.name for arm in found.arms["cka"]] == ["blend=1"]


def test_an_analysis_that_fails_does_not_stop_the_others(runs, monkeypatch):
    analysis, lines = load_analysis("variance"), []

    def measure(subject):
        if str(subject.folder).endswith("b0"):
            raise ValueError("Expected more than 1 value\nand more")
        return analysis.measure(subject)

    failing = replace(analysis, measure=measure)
    monkeypatch.setattr(measuring, "load_analysis", lambda name: failing if name == "variance" else load_analysis(name))
    found = measure_arms(arms_of(runs), Asked(["variance", "cka"], device="cpu"), lines.append)
    assert found.failed == [f"{runs / 'b0'}: variance: ValueError: Expected more than 1 value"]
    assert found.failed_runs == {runs / "b0"} and "variance  blend=0 seed=0: failed: ValueError" in lines[0]
    assert [arm.name for arm in found.arms["variance"]] == ["blend=1"] and len(found.arms["cka"]) == 2


def test_a_single_image_is_too_few_for_the_loss_on_the_way(runs):
    found = measure_arms(arms_of(runs)[:1], Asked(["path", "variance"], images=1, device="cpu"))
    assert "2 images or more" in found.left_out["path"][0] and found.arms["variance"] and not found.failed


def test_names_are_checked():
    assert chosen(None) == list(ANALYSES) and chosen(["cka", "erf", "cka"]) == ["cka", "erf"]
    for names, said in ((["ckaa"], "did you mean 'cka'"), ([], "names none")):
        with pytest.raises(ConfigError, match=said):
            chosen(names)


@pytest.mark.parametrize("name", ANALYSES)
def test_every_analysis_says_what_it_is(name):
    analysis = load_analysis(name)
    assert analysis.title and analysis.source and load_analysis(name) is analysis


# ------------------------------------------------------------------------------------------- means and pictures


def arm(blend, values, **more):
    series = {seed: {"series": {"s": {"at": ["a", "b"], "values": [v, None]}}, "v": v} for seed, v in enumerate(values)}
    return ArmResults(f"blend={blend}", {"operator.blend": blend, **more}, series)


def test_means_have_the_t_interval_over_seeds():
    values = [1.0, 2.0, 4.0]
    low, high = mean_interval(statistics.mean(values), statistics.stdev(values), 3)
    expected = Mean(statistics.mean(values), low, high, 3)
    assert headline_means(arm(0.5, values), lambda result: {"v": result["v"]})["v"] == expected
    places, means = series_means(arm(0.5, values), "s")
    assert places == ["a", "b"] and means[0] == expected and means[1].n == 0 and math.isnan(means[1].mean)
    assert math.isnan(Mean.of([3.0]).low) and Mean.of([3.0]).mean == 3


def test_arms_stand_along_the_number_that_tells_them_apart():
    arms = [arm(1.0, [3.0]), arm(0.0, [1.0]), arm(0.5, [2.0, 2.5])]
    assert spectrum_key(arms) == "operator.blend"
    figure = figure_of(
        2,
        lambda axes: (
            draw_headline(axes[0], arms, lambda r: {"v": r["v"]}, "v", "v"),
            draw_series(axes[1], arms, "s", "s"),
        )[1],
        "title",
    )
    (line,) = (one for one in figure.axes[0].lines if len(one.get_xdata()) == 3 and one.get_marker() == "o")
    assert line.get_xdata().tolist() == [0, 0.5, 1] and line.get_ydata().tolist() == [1, 2.25, 3]
    assert len(set(map(str, (look["color"] for look in looks_of(arms).values())))) == 3
    assert not texts_outside(figure)
    named = [ArmResults(name, {"operator.name": name}, arms[0].results) for name in ("one", "two")]
    assert spectrum_key(named) is None
    figure = figure_of(1, lambda axes: draw_headline(axes[0], named, lambda r: {"v": r["v"]}, "v", "v"), "title")
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["one", "two"]
