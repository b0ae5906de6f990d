"""Published and measured side by side: whole runs are compared, changed ones are named, nothing is run twice."""

import csv
import os
import subprocess
import sys

import pytest
from sweeps import ROOT

from convnn.errors import ConfigError
from convnn.paper.compare import Comparison, Score, compare, parse_seeds, select_rows, sweep_of
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


@pytest.mark.slow
def test_a_shortened_run_is_named_and_not_compared(driver, tmp_path):
    code, text = reproduce(driver, tmp_path, "train.epochs=2", "data=imagefolder", "data.root=x")
    assert code == 0, text
    line = table_of(tmp_path)["cifar10-features-r0.5"]
    assert line["status"] == "SHORTENED, not comparable"
    assert "train.epochs: 150 -> 2" in line["changed"] and "data.name: cifar10 -> imagefolder" in line["changed"]
    written = (tmp_path / "r" / "reproduction.md").read_text()
    for where in (text, written):
        assert "+12.20" not in where and "SHORTENED" in where and line["changed"] in where


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
