"""Arms, baselines and differences of run folders as they are found, the good and the damaged."""

import json
import math

import numpy as np
import pytest
from fake_arms import PLAIN, arms, shares, write_predictions
from fake_runs import grid, write_run

from convnn.cli.compare import compare
from convnn.errors import ConfigError
from convnn.report.arms import few
from convnn.report.build import make_report
from convnn.report.comparison import read_differences
from convnn.report.differences import difference_frame, difference_table, difference_text, matched_table, verdict
from convnn.report.settings import CompareSettings

pytest.importorskip("pandas")
pytest.importorskip("matplotlib")
STUDY = {"plain": shares(0.70), "middle": shares(0.78, 0.012), "end": shares(0.705, 0.03)}


def differences(folder, baseline=None, **settings):
    return read_differences([folder], CompareSettings(baseline=baseline, **settings))


def rows_of(made):
    return {row["arm"]: row for row in difference_frame(made).to_dict("records")}


# ------------------------------------------------------------------------------------------- arms and baseline


def test_named_points_are_arms_and_the_plain_one_is_the_baseline(tmp_path):
    made = differences(arms(tmp_path, STUDY))
    assert [arm.name for arm in made.arms] == list(STUDY) and made.baseline.name == "plain"
    rows = rows_of(made)
    assert rows["middle"]["difference"] == pytest.approx(8.0) and rows["middle"]["p_holm"] < 0.01
    assert rows["middle"]["bootstrap_low"] < rows["middle"]["t_low"] < 8 < rows["middle"]["t_high"]
    assert rows["middle"]["beats"] == 1.0 and made.comparisons[0].no_bootstrap is None
    assert rows["end"]["p_holm"] > 0.05 and rows["end"]["seeds_needed"] > 3
    assert (rows["plain"]["seconds"], rows["middle"]["gflops"]) == (10.0, 1.1)
    assert verdict(made) == "Against plain (p < 0.05 after Holm): above it: middle. not decided: end."


def test_without_names_the_keys_that_differ_name_the_arms_and_sweeps_merge(tmp_path):
    grid(tmp_path / "a", ks=(9,), seeds=(0, 1))
    grid(tmp_path / "b", ks=(9,), seeds=(2, 3))
    made = differences(tmp_path, "blend=0.5")
    assert [arm.name for arm in made.arms] == ["blend=0", "blend=0.5", "blend=1"]
    assert all(sorted(arm.scores) == [0, 1, 2, 3] for arm in made.arms)


def test_an_axis_below_a_name_is_part_of_the_name(tmp_path):
    for k in (4, 9):
        arms(
            tmp_path / str(k), {"plain": shares(0.7, seeds=3), "far": shares(0.8, seeds=3)}, {"far": {"operator.k": k}}
        )
    assert [arm.name for arm in differences(tmp_path).arms] == ["plain", "far, k=4", "far, k=9"]
    assert (
        differences(tmp_path, "far,k=9").baseline.name == differences(tmp_path, "far, k=9").baseline.name == "far, k=9"
    )
    with pytest.raises(ConfigError, match="means none of: plain; far, k=4; far, k=9"):
        differences(tmp_path, "near,k=9")


def test_a_sentence_names_at_most_twenty_arms():
    assert few([f"a{i}" for i in range(20)]).endswith("; a19")
    assert few([f"a{i}" for i in range(22)]).endswith("; a19 and 2 more")


@pytest.mark.parametrize(
    "given", ["k=9, blend=0.5", "k=9,blend=0.5", "operator.k=9,operator.blend=.5", "blend=0.50,k=9.0"]
)
def test_a_baseline_by_name_or_by_keys(tmp_path, given):
    made = differences(grid(tmp_path), given)
    assert made.baseline.name == "k=9, blend=0.5" and len(made.comparisons) == 8


@pytest.mark.parametrize(
    "given, words",
    [
        ("k=9", "means 3"),
        ("blend=7", "means none"),
        ("nothing", "means none"),
        ("size=3", "means none"),
        (None, "no arm is without replaced layers"),
    ],
)
def test_no_baseline_or_several_list_the_arms(tmp_path, given, words):
    with pytest.raises(ConfigError, match=words) as caught:
        differences(grid(tmp_path), given)
    assert "k=4, blend=0; k=4, blend=0.5" in str(caught.value)


def test_two_plain_arms_are_no_default(tmp_path):
    arms(tmp_path, {"plain": shares(0.7), "wide": shares(0.8)}, {"wide": PLAIN | {"train.batch_size": 64}})
    with pytest.raises(ConfigError, match="2 arms are without replaced layers"):
        differences(tmp_path)
    assert differences(tmp_path, "swap.match=null,train.batch_size=64").baseline.name == "wide"


def test_one_arm_cannot_be_compared(tmp_path):
    with pytest.raises(ConfigError, match="needs two arms"):
        differences(arms(tmp_path, {"plain": shares(0.7)}))


# ------------------------------------------------------------------------------------------- what is told besides


def test_more_than_one_key_is_told_and_settings_of_the_optimizer_apart(tmp_path):
    more = {"far": {"operator.k": 16, "optim.lr": 0.01, "train.batch_size": 64}, "near": {"optim.lr": 0.02}}
    made = differences(arms(tmp_path, {"plain": shares(0.7), "near": shares(0.7), "far": shares(0.7)}, more), "near")
    told = "\n".join(made.notes)
    line = "far differs from near in 3 keys: operator.k, operator.blend, train.batch_size; and in settings of the"
    assert f"{line} optimizer: optim.lr=0.01 instead of 0.02" in told
    assert "plain differs from near in settings of the optimizer: optim.lr=0.001 instead of 0.02" in told


def test_unpaired_seeds_are_named_and_do_not_count(tmp_path):
    made = differences(arms(tmp_path, {"plain": shares(0.7), "late": shares(0.8, first=2)}))
    (one,) = made.comparisons
    assert one.seeds == [2, 3, 4] and one.paired.n == 3
    assert "late: not paired: seed 5, 6 only here, seed 0, 1 only in plain" in made.warnings


def test_runs_that_do_not_count_are_told(tmp_path):
    root = arms(tmp_path, STUDY)
    for name in ("middle-s4", *(f"end-s{seed}" for seed in range(5))):
        file = root / "points" / name / "result.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"status": "diverged"}))
    made = differences(root)
    assert [arm.name for arm in made.arms] == ["plain", "middle"]
    assert "runs that are not complete and do not count: 6 diverged" in made.warnings
    assert not any("not complete" in line for line in differences(arms(tmp_path / "all", STUDY)).warnings)


def test_fewer_than_three_seeds_have_no_test(tmp_path):
    made = differences(
        arms(tmp_path, {"plain": shares(0.7), "two": shares(0.9, seeds=2), "other": shares(0.9, first=9)})
    )
    rows = rows_of(made)
    assert rows["two"]["p_holm"] is None or math.isnan(rows["two"]["p_holm"])
    assert rows["two"]["no_test"] == "2 common seeds" and rows["other"]["no_test"] == "no common seed"
    text = difference_text(made)
    assert "+20.00 (no test: 2 common seeds)" in text and "no arm differs beyond chance" in text


def test_equal_results_are_no_winner_and_no_zero_p(tmp_path):
    made = differences(
        arms(tmp_path, {"plain": shares(0.7), "same": shares(0.7), "shifted": shares(0.75)}, predictions=False)
    )
    rows = rows_of(made)
    assert rows["same"]["no_test"] == rows["shifted"]["no_test"] == "5 equal differences"
    assert "nan" not in difference_text(made).lower() and "no arm differs beyond chance" in verdict(made)


def test_seven_equal_configurations_of_one_seed_have_no_winner(tmp_path):
    published = [0.808008, 0.814453, 0.809277, 0.809668, 0.810547, 0.819336, 0.810645]
    names = {f"table{i}": {42: share} for i, share in enumerate(published)}
    made = differences(arms(tmp_path, names), "table5")
    assert len(made.comparisons) == 6 and all(one.p is None for one in made.comparisons)
    assert made.verdicts()[:2] == ([], [])


def test_a_metric_that_some_lack_or_chosen_on_the_test_set(tmp_path):
    arms(tmp_path, {"plain": shares(0.7), "near": shares(0.8)})
    with pytest.raises(ConfigError, match="val_top1_best"):
        differences(tmp_path, metric="val_top1_best")
    made = differences(tmp_path, metric="top1_best_on_test")
    assert any("chosen on the test set" in line for line in made.warnings)
    assert made.comparisons[0].bootstrap is None  # the file has the last epoch's predictions alone


def test_nan_results_do_not_count(tmp_path):
    root = arms(tmp_path, {"plain": shares(0.7), "near": shares(0.8)})
    place = root / "points" / "near-s0" / "result.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"top1_last": math.nan}))
    (one,) = differences(root).comparisons
    assert one.seeds == [1, 2, 3, 4]


def test_seconds_of_different_machines_are_warned_of(tmp_path):
    root = arms(tmp_path, {"plain": shares(0.7), "near": shares(0.8)})
    assert not any("machines" in line for line in differences(root).warnings)
    place = root / "points" / "near-s0" / "env.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"gpu": "NVIDIA H100", "cores": 16}))
    (line,) = [line for line in differences(root).warnings if "machines" in line]
    assert "NVIDIA H100, cpu, 16 cores" in line


@pytest.mark.parametrize("settings, words", [({"family": 1}, "fewer than the 2"), ({"metric": "loss"}, "not one of"),
                                             ({"level": 1.0}, "level"), ({"power": 0.0}, "power"),
                                             ({"effect": 0.0}, "effect"), ({"resamples": 9}, "resamples"),
                                             ({"seed": -1}, "seed")])  # fmt: skip
def test_settings_that_cannot_be(tmp_path, settings, words):
    with pytest.raises(ConfigError, match=words):
        differences(arms(tmp_path, STUDY), **settings)


def test_a_larger_family_corrects_for_more(tmp_path):
    root = arms(tmp_path, STUDY)
    small, large = (rows_of(differences(root, family=m))["middle"] for m in (None, 27))
    assert large["p_holm"] == pytest.approx(27 * large["p"]) and small["p_holm"] == pytest.approx(2 * small["p"])


# ------------------------------------------------------------------------------------------- predictions


def test_missing_predictions_leave_the_t_interval_and_say_how_to_have_them(tmp_path):
    made = differences(arms(tmp_path, STUDY, predictions=False))
    assert made.comparisons[0].bootstrap is None and made.comparisons[0].p < 0.05
    (line,) = [line for line in made.notes if "predictions.npz" in line]
    assert "15 runs" in line and "scripts/evaluate.py run=DIR" in line


def damaged(folder):
    (folder / "predictions.npz").write_bytes(b"PK\x03\x04 torn")


def other_images(folder):
    write_predictions(folder, np.ones(1000) > 0, index=np.arange(1000) + 1)


def of_another_run(folder):
    write_predictions(folder, np.ones(1000) > 0)


@pytest.mark.parametrize("spoil, words", [(damaged, "is damaged"), (of_another_run, "100.00 % right")])
def test_predictions_that_cannot_be_used_are_told_and_their_seed_left_out(tmp_path, spoil, words):
    root = arms(tmp_path, STUDY)
    spoil(root / "points" / "middle-s1")
    made = differences(root)
    assert made.comparisons[0].bootstrap.seeds == 4 and made.comparisons[0].paired.n == 5
    assert any(words in line for line in made.warnings)
    assert "(4 seeds)" in difference_text(made)


def test_other_images_refuse_the_bootstrap_of_that_pair(tmp_path):
    root = arms(tmp_path, STUDY)
    for seed in range(5):
        hits = np.arange(1000) < round(1000 * STUDY["middle"][seed])
        write_predictions(root / "points" / f"middle-s{seed}", hits, labels=np.arange(1000) % 7)
    middle, end = differences(root).comparisons
    assert middle.bootstrap is None and middle.no_bootstrap == "other test images" and middle.p < 0.05
    assert end.bootstrap is not None


def test_equal_labels_of_other_images_are_no_pairs(tmp_path):
    root = arms(tmp_path, STUDY)
    for file in root.glob("points/*/result.json"):
        test = "a" if file.parent.name.startswith("middle") else "b"
        values = json.loads(file.read_text()) | {"data": {"classes": ["x"], "content": {"train": "c", "test": test}}}
        file.write_text(json.dumps(values))
    made = differences(root)
    middle, end = made.comparisons
    assert middle.no_bootstrap == "other test images" and middle.bootstrap is None and end.bootstrap is not None
    (line,) = [line for line in made.warnings if "test images" in line]
    assert line == "middle: its test images are not those of plain, by equal settings"


def test_a_single_image_has_no_bootstrap(tmp_path):
    root = arms(tmp_path, {"plain": shares(1, 0), "far": shares(1, 0)})
    for folder in root.glob("points/*"):
        write_predictions(folder, np.ones(1, bool))
    assert differences(root).comparisons[0].no_bootstrap == "one test image"


def test_the_order_of_images_does_not_matter(tmp_path):
    root = arms(tmp_path, STUDY)
    before = differences(root).comparisons[0].bootstrap
    place = root / "points" / "middle-s2"
    with np.load(place / "predictions.npz") as file:
        np.savez(place / "predictions.npz", **{name: file[name][::-1] for name in file.files})
    assert differences(root).comparisons[0].bootstrap == before


# ------------------------------------------------------------------------------------------- tuning


def test_settings_tried_are_counted_by_arm(tmp_path):
    root = arms(tmp_path / "study", STUDY, {"middle": {"optim.lr": 0.01}, "end": {"optim.lr": 0.02}})
    tuned = tmp_path / "tuned"
    free = {"data.val_fraction": 0.1, "train.epochs": 3, "train.max_steps": 100, "data.limit_test": 50}
    for i, lr in enumerate((0.003, 0.01, 0.03)):
        write_run(tuned / f"m{i}", {"operator.blend": 0.1, "optim.lr": lr} | free, seed=7)
        write_run(tuned / f"e{i}", {"operator.blend": 0.2, "optim.lr": lr} | free, seed=7)
    write_run(tuned / "again", {"operator.blend": 0.1, "optim.lr": 0.03} | free, seed=8)  # the same setting
    write_run(tuned / "bad", {"operator.blend": 0.2, "optim.lr": 1.0} | free, status="diverged")  # tried too
    write_run(tuned / "p", PLAIN | {"operator.k": 25} | free)  # without a swap no operator counts
    write_run(tuned / "q", {"operator.blend": 0.2, "operator.k": 25, "optim.lr": 5.0} | free)  # of no arm
    made = differences(root, tuning=str(tuned))
    assert {name: trials.count for name, trials in made.trials.items()} == {"plain": 1, "middle": 3, "end": 4}
    assert "arms were not tuned alike; settings tried: plain 1, middle 3, end 4" in made.warnings
    assert not any("not recorded" in line for line in made.notes)
    header, rows = difference_table(made)
    assert [row[header.index("tried")] for row in rows] == ["1", "3", "4"]
    assert any("not recorded" in line for line in differences(root).notes)


def test_an_arm_without_a_trial_says_what_the_nearest_has_otherwise(tmp_path):
    root = arms(tmp_path / "study", {"plain": shares(0.7), "near": shares(0.8)})
    write_run(tmp_path / "tuned" / "a", {"operator.blend": 0.1, "train.batch_size": 64})
    warnings = differences(root, tuning=str(tmp_path / "tuned")).warnings
    assert any(line.startswith("near: no run") and line.endswith("differs in train.batch_size") for line in warnings)


# ------------------------------------------------------------------------------------------- costs, files, program


def test_matched_cost_names_the_best_other_arm(tmp_path):
    header, rows = matched_table(differences(arms(tmp_path, STUDY)))
    best = {row[0]: row[3] for row in rows}
    assert header[3].startswith("best other in seconds") and best == {
        "plain": "none",
        "middle": "plain",
        "end": "middle",
    }


@pytest.mark.long
def test_files_of_a_comparison(tmp_path, capsys):
    root, out = arms(tmp_path / "s", STUDY), tmp_path / "out"
    compare([str(root), f"out={out}", "resamples=200"])
    names = {path.name for path in out.iterdir()}
    pictures = {f"{name}.{kind}" for name in ("differences", "intervals_blend", "pareto") for kind in ("png", "svg")}
    assert names == {"differences.csv", "matched.csv", "comparison.md", ".convnn-comparison"} | pictures
    text = (out / "comparison.md").read_text()
    assert text.startswith("# Differences to plain") and "![Accuracy at a cost](pareto.png)" in text
    assert "above it: middle" in capsys.readouterr().out
    (out / "matched.csv").write_text("my own")
    with pytest.raises(ConfigError, match=r"matched\.csv would be replaced"):
        compare([str(root), f"out={out}"])


def test_the_report_has_the_differences(tmp_path):
    report = make_report([arms(tmp_path / "s", STUDY)], tmp_path / "out")
    page, table = ((tmp_path / "out" / name).read_text() for name in ("index.html", "table.md"))
    assert "<h2>Differences</h2>" in page and "above it: middle" in page and "Accuracy at a cost" in page
    assert "## Differences" in table and "| middle | 5 |" in table
    assert (tmp_path / "out" / "differences.csv").is_file() and "above it: middle" in report.text()


@pytest.mark.long
def test_a_report_without_baseline_says_how_to_name_one(tmp_path):
    report = make_report([grid(tmp_path / "g", (0.0, 1.0), (4,), (0,))], tmp_path / "out")
    assert report.differences is None and "baseline=ARM" in report.text()
    assert "baseline=ARM" in (tmp_path / "out" / "index.html").read_text()
    named = make_report([tmp_path / "g"], tmp_path / "out", baseline="operator.blend=0")
    assert named.differences.baseline.name == "blend=0"
    with pytest.raises(ConfigError, match="must mean one arm"):
        make_report([tmp_path / "g"], tmp_path / "out", baseline="k=5")


def test_a_single_configuration_has_no_such_section(tmp_path):
    write_run(tmp_path / "r")
    make_report([tmp_path], tmp_path / "out")
    assert "Differences" not in (tmp_path / "out" / "index.html").read_text()


@pytest.mark.long
def test_names_are_escaped(tmp_path):
    root = arms(tmp_path / "s", {"plain": shares(0.7), "<b>|$x": shares(0.8)})
    make_report([root], tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<b>" not in page and "&lt;b&gt;" in page


@pytest.mark.parametrize(
    "given", ["level=1", "power=0", "effect=0", "effect=101", "resamples=9", "seed=-1", "family=0"]
)
def test_a_setting_out_of_range_is_one_line(given, tmp_path):
    with pytest.raises(ConfigError, match=rf"^{given}(\.0)? must lie in"):
        compare([str(tmp_path), given])
    with pytest.raises(ConfigError, match="metric=top1 is not one of top1_last"):
        compare([str(tmp_path), "metric=top1"])
