"""Runs of one configuration: the newest counts, and runs of other data are others."""

import json
import os

import pytest
from fake_runs import write_run

from convnn.cli.report import report
from convnn.report.build import make_report
from convnn.report.results import find_results

pytest.importorskip("pandas")
pytest.importorskip("matplotlib")
DAYS = {"old": "2026-01-01T10:00:00+0000", "new": "2026-03-01T10:00:00+0000", "noon": "2026-03-01T11:30:00+0200"}


def write(folder, day=None, commit=None, **kwargs):
    write_run(folder, **kwargs)
    environment = json.loads((folder / "env.json").read_text()) | {"git_commit": commit}
    environment["started"] = DAYS.get(day, day)
    (folder / "env.json").write_text(json.dumps(environment))
    return folder


def data(content="aa", classes=("cat", "dog")):
    return {"classes": list(classes), "images": {"train": 8, "test": 4}, "content": {"train": content, "test": "bb"}}


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
@pytest.mark.parametrize("days", [("old", "new"), ("noon", "new"), (None, None), ("new", "broken")])
def test_the_newest_counts_whatever_the_order(days, order, tmp_path):
    for name, day, top1 in zip("ab", days, (70.0, 75.0), strict=True):
        write(tmp_path / name, day, top1=top1)
    for name, seconds in (("a", 1_000_000_000), ("b", 4_000_000_000)):  # counts where env.json has no date
        os.utime(tmp_path / name, (seconds, seconds))
    found = find_results([tmp_path / name for name in order])
    assert [run.folder.name for run in found.runs] == ["b"] and found.duplicates == 1
    (line,) = found.conflicts
    assert line.index("b (top-1 75") < line.index("not a (top-1 70") and "commit" not in line


def test_commits_are_shown_where_they_differ(tmp_path):
    write(tmp_path / "a", "old", "1" * 40, top1=70.0)
    write(tmp_path / "b", "new", "2" * 40, top1=75.0)
    write(tmp_path / "c", "old", None, top1=76.0)
    lines = find_results([tmp_path]).conflicts
    assert len(lines) == 2
    assert f"commit {'2' * 10})" in lines[0] and f"commit {'1' * 10})" in lines[0]
    assert "commit unknown)" in lines[1]


def test_the_warning_is_in_every_form_of_a_report(tmp_path, capsys):
    write(tmp_path / "a", "old", top1=70.0)
    write(tmp_path / "b", "new", top1=75.0)
    report([str(tmp_path / "a"), str(tmp_path / "b"), f"out={tmp_path}/out"])
    said = "of two results of one configuration the newest counts: b (top-1 75"
    assert f"warning: {said}" in capsys.readouterr().out
    for name in ("table.md", "index.html"):
        assert said in (tmp_path / "out" / name).read_text()
    assert "75.0" in (tmp_path / "out" / "summary.csv").read_text()


def test_equal_results_and_unfinished_runs_need_no_warning(tmp_path):
    write(tmp_path / "a", "old", top1=70.0)
    write(tmp_path / "b", "new", top1=70.0)
    write(tmp_path / "c", "new", top1=80.0, status="diverged")
    write(tmp_path / "d", "new", status=None)
    found = find_results([tmp_path])
    assert [run.folder.name for run in found.runs] == ["b"] and found.conflicts == []


@pytest.mark.parametrize("other", [data("cc"), data(classes=("cat", "wolf")), data(classes=("dog", "cat"))])
def test_runs_of_other_data_are_others(other, tmp_path):
    write(tmp_path / "a", "old", top1=70.0, data=data())
    write(tmp_path / "b", "new", top1=75.0, data=other)
    write(tmp_path / "c", "new", top1=71.0, data=data())
    made = make_report([tmp_path], tmp_path / "out")
    assert sorted(made.runs["name"]) == ["b", "c"] and made.duplicates == 1 and len(made.conflicts) == 1
    assert len(made.summary) == 2 and made.summary["data.content"].nunique() == 2  # no mean over both


def test_seeds_on_other_data_are_no_seeds_of_one_configuration(tmp_path):
    for seed, content in enumerate(("aa", "aa", "cc")):
        write(tmp_path / f"s{seed}", "new", top1=70.0 + seed, seed=seed, data=data(content))
    summary = make_report([tmp_path], tmp_path / "out").summary
    assert sorted(zip(summary["n"], summary["top1_last_mean"], strict=True)) == [(1, 72.0), (2, 70.5)]


def test_the_same_data_makes_no_column(tmp_path):
    for seed in range(2):
        write(tmp_path / f"s{seed}", "new", seed=seed, data=data())
    write(tmp_path / "without", "new", seed=2)
    made = make_report([tmp_path], tmp_path / "out")
    assert len(made.summary) == 1 and "data.content" not in made.summary and list(made.summary["n"]) == [3]
