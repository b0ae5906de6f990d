"""What a report says first: a winner only where a test says so, and why there is none."""

import numpy as np
import pytest
from fake_arms import arms, shares, write_predictions
from fake_runs import write_run

from convnn.report.answer import answer_of
from convnn.report.build import _differences
from convnn.report.content import Report
from convnn.report.results import find_results
from convnn.report.tables import runs_frame, summarize

pytest.importorskip("pandas")
pytest.importorskip("matplotlib")


def answer(folder, baseline=None, metric="top1_last"):
    found = find_results([folder])
    runs = runs_frame(found)
    report = Report(runs, summarize(runs), metric, folder, "runs", [], [], [], ([], []), 0)
    report.differences, report.verdict = _differences(found, runs, report.summary, metric, baseline)
    return answer_of(report)


def facts(made):
    return [fact.answer for fact in made.facts]


def test_a_winner_beyond_chance_with_its_price(tmp_path):
    made = answer(arms(tmp_path, {"plain": shares(0.70), "middle": shares(0.78, 0.012), "end": shares(0.705, 0.03)}))
    assert made.headline == "middle beats plain by 8.00 points, beyond chance"
    assert made.text.startswith("middle has 78.00 % against 70.00 % of plain over 5 common seeds: +8.00 points (95 % ")
    assert "hardly chance (p < 0.0001, corrected for 2 comparisons)" in made.text or "(p = 0.00" in made.text
    assert facts(made) == ["middle", "+8.00 points", "Yes, beyond chance", "1.10× time"]
    assert "1.10× GFLOPs, 1.00× memory, 1.00× parameters; middle against plain" in made.facts[3].note
    assert made.cost_header == ["what it cost", "middle", "plain", "ratio"]
    assert made.costs[0] == ["training time", "11 s", "10 s", "1.10×"]
    assert made.costs[2:] == [["peak memory", "1 GB", "1 GB", "1.00×"], ["parameters", "11 M", "11 M", "1.00×"]]
    assert made.cautions == []


def test_several_winners_are_named_and_not_ranked(tmp_path):
    made = answer(arms(tmp_path, {"plain": shares(0.60), "a": shares(0.78, 0.012), "b": shares(0.79, 0.012)}))
    assert made.headline.startswith("b beats plain") and "Also above plain beyond chance: a; which" in made.text


def test_a_higher_mean_that_is_not_decided_does_not_win(tmp_path):
    right = {"plain": shares(0.70), "sure": shares(0.75, 0.012), "wild": {s: 0.70 + 0.08 * (s % 4) for s in range(5)}}
    made = answer(arms(tmp_path, right))
    assert made.headline.startswith("sure beats plain")
    assert made.cautions[0].startswith("wild has a higher mean difference, +") and "not decided" in made.cautions[0]


def test_a_difference_within_the_spread_wins_nothing(tmp_path):
    made = answer(arms(tmp_path, {"plain": shares(0.70), "wild": {s: 0.70 + 0.02 * (s % 3 - 0.5) for s in range(5)}}))
    assert made.headline == "No arm beats plain beyond chance"
    assert facts(made)[::2] == ["Nothing so far", "Not decided"] and "That may be chance (p = 0." in made.text
    assert "would need about" in made.text


@pytest.mark.parametrize("seeds, words", [(1, "1 common seed; a test needs 3"), (2, "2 common seeds; a test needs 3")])
def test_too_few_seeds_are_said_to_be_too_few(tmp_path, seeds, words):
    made = answer(arms(tmp_path, {"plain": shares(0.70, seeds=seeds), "far": shares(0.95, seeds=seeds)}))
    assert made.headline == "Too few seeds to say whether any arm beats plain"
    assert made.facts[2].answer == "Cannot be told" and made.facts[2].note == words
    assert "run more seeds" in made.text and "+25.00 points, without an interval." in made.text


def test_the_highest_of_many_untested_means_is_partly_luck(tmp_path):
    right = {"plain": {0: 0.7}} | {f"a{i}": {0: 0.6 + i / 50} for i in range(6)}
    assert "6 arms are untested: the highest of so many means is partly luck." in answer(arms(tmp_path, right)).cautions


def test_a_baseline_that_beats_all_wins(tmp_path):
    made = answer(arms(tmp_path, {"plain": shares(0.80), "a": shares(0.70, 0.012), "b": shares(0.60, 0.012)}))
    assert made.headline == "plain, the baseline, beats all 2 other arms beyond chance"
    assert (
        facts(made)[:3] == ["plain", "-10.00 points", "Yes, beyond chance"] and "Nearest to plain comes a" in made.text
    )


def test_a_baseline_that_beats_some_does_not_win(tmp_path):
    right = {"plain": shares(0.80), "near": shares(0.798, 0.03), "far": shares(0.60, 0.012)}
    made = answer(arms(tmp_path, right))
    assert made.headline == "No arm beats plain, the baseline, which has the highest mean"
    assert "1 of 2 arms are below plain beyond chance." in made.text and made.facts[2].answer == "Not decided"


def test_equal_differences_are_no_winner(tmp_path):
    made = answer(arms(tmp_path, {"plain": shares(0.7), "shifted": shares(0.75)}, predictions=False))
    assert made.headline == "No test says whether any arm beats plain"
    assert made.facts[2].note == "no test: 5 equal differences"


def test_no_common_seed(tmp_path):
    made = answer(arms(tmp_path, {"plain": shares(0.7), "other": shares(0.9, first=9)}))
    assert made.headline == "No seed in common with plain: nothing can be compared"
    assert facts(made)[:3] == ["Cannot be told", "–", "Cannot be told"]


def test_an_arm_that_is_not_compared_is_not_beaten(tmp_path):
    made = answer(arms(tmp_path, {"plain": shares(0.7), "low": shares(0.6), "high": shares(0.9, first=9)}))
    assert "highest mean" not in made.headline + made.facts[0].note and "of 3 arms" not in made.facts[0].note
    assert "high: no seed in common with plain, and not compared." in made.text


def test_other_images_take_a_winner_back(tmp_path):
    """Three images more on each seed are certain on these images; each arm has easy ones of its own."""
    base = shares(0.5, 0.03)
    right = {"plain": base, "one": {s: v + 0.003 + s % 2 / 1000 for s, v in base.items()}}
    root = arms(tmp_path, right)
    for place, (name, seeds) in enumerate(right.items()):
        rank = np.random.default_rng(place).permutation(1000)
        for seed, share in seeds.items():
            write_predictions(root / "points" / f"{name}-s{seed}", rank < round(1000 * share))
    made = answer(root)
    assert made.headline.startswith("one beats plain") and "on other test images it may vanish" in made.cautions[0]


def test_runs_that_do_not_count_are_told_beside_the_answer(tmp_path):
    root = arms(tmp_path, {"plain": shares(0.7), "good": shares(0.8, 0.012)})
    write_run(tmp_path / "points" / "lost", {"operator.blend": 0.1}, seed=9, status="diverged", reason="nan")
    assert "runs that are not complete and do not count: 1 diverged" in answer(root).cautions


def test_without_a_baseline_nothing_is_tested(tmp_path):
    for i, blend in enumerate((0.0, 0.5, 1.0)):
        write_run(tmp_path / f"r{i}", {"operator.blend": blend}, 80.0 + 2 * i, gflops=2.5)
    made = answer(tmp_path)
    assert made.headline == "blend=1 has the highest mean; whether it is real was not tested"
    assert facts(made) == ["Not tested", "+2.00 points", "Not tested", "5 s"] and "baseline=" in made.text
    assert made.costs[:2] == [["training time", "5 s"], ["forward pass of one image", "2.5 GFLOPs"]]


def test_equal_means_have_no_first(tmp_path):
    for i in range(3):
        write_run(tmp_path / f"r{i}", {"operator.blend": i / 2}, 80.0)
    made = answer(tmp_path)
    assert made.headline.startswith("No single configuration has the highest mean") and facts(made)[1] == "+0.00 points"


def test_a_baseline_without_a_name_is_called_by_what_it_is(tmp_path):
    for i, keys in enumerate(({"operator.blend": 0.0}, {"operator.blend": 1.0}, {"swap.match": None})):
        write_run(tmp_path / f"r{i}", {"operator.k": 9 + i} | keys, 80.0 + i)
    assert answer(tmp_path).headline == "No arm beats no layer replaced, the baseline, which has the highest mean"


def test_one_configuration_and_none(tmp_path):
    write_run(tmp_path / "a" / "r", top1=80.0)
    write_run(tmp_path / "b" / "r", status="diverged", reason="nan")
    assert answer(tmp_path / "a").headline == "One configuration: 80.00 (n=1)"
    made = answer(tmp_path / "b")
    assert made.headline == "No run is complete" and "1 runs: 1 diverged" in made.text and not made.costs
    assert answer(tmp_path / "a", metric="val_top1_best").headline == "No run has val_top1_best"
