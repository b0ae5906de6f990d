"""Published and measured side by side: whole runs are compared, changed ones are named, nothing is run twice."""

import csv
import json
import os
import subprocess
import sys

import pytest
from sweeps import ROOT

from convnn.errors import ConfigError
from convnn.paper.compare import Comparison, Score, compare, parse_seeds, select_rows, sweep_of, write_comparison
from convnn.paper.published import load_table

TABLE = load_table("vgg11_branching")
ROWS = "cifar10-features-r0,cifar10-features-r0.5"


def reproduce(driver, tmp_path, *overrides):
    command = [sys.executable, str(ROOT / "scripts" / "reproduce.py"), "table=vgg11_branching", f"rows={ROWS}"]
    environment = os.environ | {"PYTHONPATH": f"{driver}:{ROOT}"}
    done = subprocess.run(
        [*command, f"dir={tmp_path}/r", "tracker=jsonl", *overrides],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def table_of(tmp_path):
    with (tmp_path / "r" / "reproduction.csv").open() as file:
        return {line["row"]: line for line in csv.DictReader(file)}


@pytest.mark.long
def test_a_whole_run_is_compared(driver, tmp_path):
    code, text = reproduce(driver, tmp_path)
    assert code == 0, text
    line = table_of(tmp_path)["cifar10-features-r0"]
    assert line["status"] == "whole" and float(line["top1_best"]) == 93.0  # seed 42: 50 + 42 + 1
    assert float(line["top1_best_published"]) == 80.8008 and line["params"] == line["params_published"] == "130015690"
    assert float(line["top1_last"]) == 92.0 and float(line["top1_last5_mean"]) == pytest.approx(92.2)
    assert line["source"].startswith("Convolutional-Nearest-Neighbor@")
    assert "+12.20" in text and "no" in text.split()
    first = sorted(p.read_text() for p in tmp_path.glob("r/points/*/calls"))
    assert reproduce(driver, tmp_path)[0] == 0  # nothing is run again
    assert sorted(p.read_text() for p in tmp_path.glob("r/points/*/calls")) == first and len(first) == 2


def spoil(folder, fault):
    metrics, result = folder / "metrics.jsonl", folder / "result.json"
    rows = metrics.read_text().splitlines()
    if fault == "torn in the middle":
        metrics.write_text("\n".join([*rows[:3], rows[3][:9], *rows[4:]]) + "\n")
    elif fault == "a row lost":
        metrics.write_text("\n".join(rows[:-1]) + "\n")
    elif fault == "another best":
        metrics.write_text(metrics.read_text().replace("51.0", "57.0"))
    elif fault == "no metrics":
        metrics.unlink()
    elif fault == "no result":
        result.write_text("[]")


@pytest.fixture
def finished(tmp_path):
    """Return options and folder of a sweep of one row that a stand-in has run."""
    from fake_runs import write_run

    from convnn.config.composer import Composer
    from convnn.config.identity import fingerprint
    from convnn.config.overrides import merge_overrides

    rows = select_rows(TABLE, "cifar10-features-r0")
    options = sweep_of(TABLE, rows, str(tmp_path), careful=False, seeds=[])
    digest = fingerprint(Composer()(merge_overrides(options.base, options.points[rows[0].row])))
    folder = write_run(tmp_path / "points" / "p", top1=50.0, epochs=6, fingerprint=digest)
    point = {"name": "p", "fingerprint": digest, "overrides": [], "label": "", "folder": "points/p"}
    (tmp_path / "plan.json").write_text(json.dumps({"points": [point]}))
    return rows, options, folder


@pytest.mark.parametrize("fault", ["torn in the middle", "a row lost", "another best", "no metrics", "no result"])
def test_a_run_whose_files_disagree_is_not_scored(fault, finished, tmp_path):
    rows, options, folder = finished
    (found,) = compare(TABLE, rows, options, [])
    assert found.label == "whole" and found.scores["top1_best"].mean == 51.0 and found.difference("top1_best")
    spoil(folder, fault)
    (found,) = compare(TABLE, rows, options, [])
    assert found.label == "damaged" and found.scores == {}
    assert found.difference("top1_best") is None and found.within_noise(0.39) is None
    write_comparison(TABLE, [found], tmp_path, "command")
    assert f"Damaged, and not scored: {folder}: " in (tmp_path / "reproduction.md").read_text()
    with (tmp_path / "reproduction.csv").open() as file:
        (line,) = csv.DictReader(file)
    assert line["status"] == "damaged" and line["top1_best"] == line["top1_last5_mean"] == ""


@pytest.mark.long
def test_a_shortened_run_is_named_and_not_compared(driver, tmp_path):
    code, text = reproduce(driver, tmp_path, "train.epochs=2", "data=imagefolder", "data.root=x")
    assert code == 0, text
    line = table_of(tmp_path)["cifar10-features-r0.5"]
    assert line["status"] == "SHORTENED, not comparable"
    assert "train.epochs: 150 -> 2" in line["changed"] and "data.name: cifar10 -> imagefolder" in line["changed"]
    written = (tmp_path / "r" / "reproduction.md").read_text()
    for where in (text, written):
        assert "+12.20" not in where and "SHORTENED" in where and line["changed"] in where


@pytest.mark.long
def test_the_careful_variant_has_seeds_and_is_not_compared(driver, tmp_path):
    code, text = reproduce(driver, tmp_path, "careful=true", "seeds=0,2")
    assert code == 0, text
    line = table_of(tmp_path)["cifar10-features-r0"]
    assert line["n"] == "2" and float(line["top1_last"]) == 51.0
    assert float(line["top1_last_std"]) == pytest.approx(2**0.5)
    assert line["status"] == "not comparable" and line["changed"].startswith("data.crop_padding: 0 -> 4")


def test_rows_that_are_not_run_are_listed(tmp_path):
    rows = select_rows(TABLE, "cifar10-features-r0*")
    options = sweep_of(TABLE, rows, str(tmp_path), careful=False, seeds=[])
    assert {c.label for c in compare(TABLE, rows, options, [])} == {"not run"}


def test_within_noise_counts_both_sides():
    (row,) = select_rows(TABLE, "cifar10-features-r0")
    for ours, n, verdict in ((81.9, 1, True), (82.0, 1, False), (81.7, 4, False), (81.6, 4, True)):
        found = Comparison(row, {"top1_best": Score(ours, None, n)}, (), None, None, n, n)
        assert found.within_noise(0.39) is verdict
        assert found.difference("top1_best") == pytest.approx(ours - 80.8008)
    changed = Comparison(row, {"top1_best": Score(80.8, None, 1)}, ("train.epochs: 150 -> 2",), None, None, 1, 1)
    assert changed.within_noise(0.39) is None and changed.difference("top1_best") is None


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["table=vgg11_branchin"], "did you mean 'vgg11_branching'"),
        (["rows=cifar10-feature-r0"], "did you mean 'cifar10-features-r0'"),
        (["table=vgg11_*"], "several tables only with dry_run=true"),
        (["seeds=a"], "seeds=a is not a list of integers"),
        (["operator.kk=1"], "did you mean 'operator.k'"),
    ],
)
def test_bad_commands_end_with_one_line(overrides, message, driver, tmp_path):
    code, text = reproduce(driver, tmp_path, *overrides)
    assert code == 2 and message in text and "Traceback" not in text


def test_seeds():
    assert (
        parse_seeds("3,4", False) == [3, 4] and parse_seeds(None, True) == [0, 1, 2] and parse_seeds(None, False) == []
    )
    with pytest.raises(ConfigError):
        parse_seeds("1,,2", False)
