"""Reports: what counts in a mean, what is listed instead, and what hostile or damaged folders can do."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from fake_runs import by_name, grid, write_run, write_sweep

from convnn.config.identity import fingerprint
from convnn.errors import ConfigError
from convnn.report.build import make_report
from convnn.report.spectrum import _last_loss
from convnn.report.tables import main_keys, read_runs, summarize, varying_keys

pytest.importorskip("pandas")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[2]
ENV = os.environ | {"PYTHONPATH": str(ROOT)}


# -------------------------------------------------------------------------------------------------- tables


def test_one_row_a_run_and_one_a_configuration(tmp_path):
    runs = read_runs([grid(tmp_path)])
    assert len(runs) == 18
    assert varying_keys(runs) == ["operator.k", "operator.blend"]
    assert sorted(runs["seed"]) == [0] * 9 + [1] * 9
    summary = summarize(runs)
    assert len(summary) == 9
    assert set(summary["n"]) == {2} and set(summary["n_failed"]) == {0}
    assert list(summary["operator.k"]) == [4] * 3 + [9] * 3 + [16] * 3
    assert list(summary["operator.blend"]) == [0.0, 0.5, 1.0] * 3
    first = summary.iloc[0]
    assert first["top1_last_mean"] == 84.5  # of 84 and 85
    assert first["top1_last_std"] == pytest.approx(0.5**0.5)  # sample standard deviation of two numbers one apart
    assert first["top1_best_on_test_mean"] == 85.5
    assert (first["gflops"], first["seconds"], first["params"]) == (1.0, 4.0, 11e6)
    assert "val_top1_best_mean" not in summary


def test_single_runs_have_no_deviation(tmp_path):
    summary = summarize(read_runs([grid(tmp_path, seeds=(0,))]))
    assert set(summary["n"]) == {1}
    assert summary["top1_last_std"].isna().all() and summary["top1_last_mean"].notna().all()


def test_only_complete_runs_count_in_a_mean(tmp_path):
    write_run(tmp_path / "good", top1=80.0, seed=0)
    write_run(tmp_path / "diverged", top1=10.0, seed=1, status="diverged", reason="loss is nan\nat step 3", exit_code=3)
    write_run(tmp_path / "interrupted", top1=20.0, seed=2, status="interrupted", exit_code=143)
    write_run(tmp_path / "unfinished", top1=30.0, seed=3, epochs=2, status=None)
    with (write_run(tmp_path / "torn", seed=4, epochs=3, status=None) / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "tor')
    runs = read_runs([tmp_path])
    rows = by_name(runs)
    assert rows["diverged"]["reason"] == "loss is nan at step 3" and rows["diverged"]["exit_code"] == 3
    assert rows["unfinished"]["status"] == "unfinished" and rows["unfinished"]["epochs"] == 2
    assert rows["torn"]["epochs"] == 3
    assert math.isnan(rows["unfinished"]["top1_last"])
    (row,) = summarize(runs).to_dict("records")
    assert (row["n"], row["n_failed"], row["n_open"], row["top1_last_mean"]) == (1, 1, 3, 80.0)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", "{}", '{"top1_last": 99.0}', "\x00", "[" * 100_000])
def test_damaged_results_are_listed_with_a_reason(tmp_path, text):
    write_run(tmp_path / "good", top1=80.0)
    (write_run(tmp_path / "bad", top1=99.0, seed=1) / "result.json").write_text(text)
    runs = read_runs([tmp_path])
    assert by_name(runs)["bad"]["status"] == "damaged"
    assert by_name(runs)["bad"]["reason"].startswith("result.json is damaged: ")
    (row,) = summarize(runs).to_dict("records")
    assert (row["n"], row["n_failed"], row["top1_last_mean"]) == (1, 1, 80.0)


@pytest.mark.parametrize(
    "text", ["", "a: [", "- 1", "defaults: [x]", "data: 3", "\x00", "a: &a [*a]", "data: {name: &x {y: *x}}"]
)
def test_damaged_configurations_are_listed_with_a_reason(tmp_path, text):
    grid(tmp_path)
    (write_run(tmp_path / "bad", seed=9) / "config.yaml").write_text(text)
    runs = read_runs([tmp_path])
    assert len(runs) == 19
    assert by_name(runs)["bad"]["status"] == "damaged"
    assert by_name(runs)["bad"]["reason"].startswith("config.yaml is damaged: ")
    assert len(summarize(runs)) == 9


@pytest.mark.parametrize("old, new", [('"epoch": 1', '"epoch: 1'), ("80.0", "70.0"), ('"epoch": 2', '"epoch": 3')])
def test_a_complete_run_whose_epochs_disagree_is_damaged(tmp_path, old, new):
    for name, seed in (("good", 0), ("bad", 1)):
        folder = write_run(tmp_path / name, {"operator.blend": 0.5}, seed=seed)
    assert [_last_loss(tmp_path / name) for name in ("good", "bad")] == [2.0 / 3] * 2
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace(old, new))
    runs = read_runs([tmp_path])
    assert by_name(runs)["bad"]["status"] == "damaged" and "metrics.jsonl" in by_name(runs)["bad"]["reason"]
    (row,) = summarize(runs).to_dict("records")
    assert (row["n"], row["n_failed"]) == (1, 1)
    assert math.isnan(_last_loss(folder)) and _last_loss(tmp_path / "good") == 2.0 / 3


def test_numbers_of_the_wrong_type_are_left_out(tmp_path):
    write_run(tmp_path / "good", top1=80.0)
    write_run(tmp_path / "odd", seed=1, top1_last="99", seconds=float("inf"), params=1.5, versions=[1], reason=3)
    (row,) = summarize(read_runs([tmp_path])).to_dict("records")
    assert (row["n"], row["top1_last_n"], row["top1_last_mean"], row["seconds"]) == (2, 1, 80.0, 5.0)


def test_the_same_configuration_counts_once_and_complete_wins(tmp_path):
    write_run(tmp_path / "a" / "r0", top1=80.0, status=None)
    write_run(tmp_path / "b" / "r0", top1=90.0)
    write_run(tmp_path / "b" / "r1", top1=91.0, seed=1)
    runs = read_runs([tmp_path / "a", tmp_path / "b", tmp_path / "b" / "r1"])
    assert sorted(runs["folder"]) == ["b/r0", "b/r1"]
    assert make_report([tmp_path], tmp_path / "report").duplicates == 1


def test_fingerprint_of_a_run_without_result_is_that_of_its_configuration(tmp_path):
    from convnn.config.load import load_config

    folder = write_run(tmp_path / "r", {"operator.k": 4, "optim.warmup_lr": 1e-6}, status=None)
    assert list(read_runs([folder])["fingerprint"]) == [fingerprint(load_config(folder))]


def test_folders_that_hold_no_runs_are_not_entered(tmp_path):
    write_run(tmp_path / "run")
    for place in ("report/r", ".hidden/r", "run/checkpoints/r"):
        write_run(tmp_path / place, seed=5)
    write_run(tmp_path / "deep" / "er" / "r", seed=6)
    assert sorted(read_runs([tmp_path])["folder"]) == ["deep/er/r", "report/r", "run"]


def test_a_configuration_of_another_project_hides_no_runs(tmp_path):
    write_run(tmp_path / "run")
    (tmp_path / "config.yaml").write_text("defaults: []\n")
    assert [folder.rsplit("/", 1)[-1] for folder in read_runs([tmp_path])["folder"]] == ["run"]


def test_an_edited_configuration_takes_no_result_for_its_own(tmp_path):
    for old, new in (("k: 9", "k: 4"), ("lr: 0.001", "lr: 0.5")):
        path = write_run(tmp_path / new[-3:].strip()) / "config.yaml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
    runs = read_runs([tmp_path])
    assert set(runs["status"]) == {"damaged"} and all("config.yaml is not that of result" in r for r in runs["reason"])


def test_where_runs_are_kept_and_computed_does_not_vary(tmp_path):
    write_run(tmp_path / "a", {"run.name": "x", "data.root": "/a", "tracker.name": "jsonl", "device": "cpu"})
    write_run(tmp_path / "b", {"run.name": "y", "data.root": "/b", "debug": True}, seed=1)
    runs = read_runs([tmp_path])
    assert varying_keys(runs) == []
    assert len(summarize(runs)) == 1


def test_keys_that_follow_from_a_name_are_not_in_the_short_table(tmp_path):
    for i, (name, size, seed) in enumerate((n, s, d) for n, s in (("vit", 4), ("resnet", None)) for d in (0, 1)):
        write_run(tmp_path / f"r{i}", {"backbone.name": name, "backbone.patch_size": size}, seed=seed)
    summary = summarize(read_runs([tmp_path]))
    assert varying_keys(summary) == ["backbone.name", "backbone.patch_size"]
    assert main_keys(summary) == ["backbone.name"]


# -------------------------------------------------------------------------------------------------- sweeps


def test_partial_sweep_lists_each_point_once(tmp_path):
    points = [
        ("done", ["operator.k=4", "operator.blend=0", "seed=0"], {"status": "failed", "reason": "old"}),
        ("oom", ["operator.k=9", "operator.blend=0", "seed=0"], {"status": "failed", "reason": "out of memory"}),
        ("killed", ["operator.k=9", "operator.blend=0.5", "seed=0"], {"status": "killed", "exit_code": 137}),
        ("todo", ["operator.k=4", "operator.blend=0.5", "seed=0"], None),
        ("lost", ["operator.k=16", "operator.blend=0.5", "seed=0"], {"status": "complete", "exit_code": 0}),
    ]
    invalid = [{"overrides": ["operator.k=0"], "reason": "operator.k=0 is below 1"}]
    root = write_sweep(tmp_path / "sweep", points, invalid)
    run = write_run(root / "points" / "done", {"operator.k": 4, "operator.blend": 0.0})
    known = json.loads((run / "result.json").read_text())["fingerprint"]
    (root / "plan.json").write_text((root / "plan.json").read_text().replace(f"{0:016x}", known))
    (root / "status" / f"{0:016x}.json").rename(root / "status" / f"{known}.json")
    write_run(root / "points" / "killed", {"operator.k": 9, "operator.blend": 0.5}, status=None)
    report = make_report([root], tmp_path / "out")
    rows = by_name(report.runs)
    assert {name: row["status"] for name, row in rows.items()} == {
        "done": "complete",
        "oom": "failed",
        "killed": "killed",
        "todo": "todo",
        "lost": "damaged",
    }
    assert (rows["oom"]["reason"], rows["oom"]["exit_code"], rows["oom"]["log"]) == ("out of memory", 1, "logs/oom.log")
    assert (rows["oom"]["operator.k"], rows["oom"]["operator.blend"], rows["oom"]["seed"]) == (9, 0.0, 0)
    assert rows["killed"]["epochs"] == 3 and rows["killed"]["exit_code"] == 137
    assert len(report.summary) == 5 and report.summary["n"].sum() == 1
    for page in ("table.md", "index.html"):
        text = (tmp_path / "out" / page).read_text()
        assert "out of memory" in text and "logs/oom.log" in text and "operator.k=0 is below 1" in text
    assert "sweep.py grid=spectrum" in (tmp_path / "out" / "index.html").read_text()


def test_todo_points_take_what_their_overrides_leave_open_from_a_sibling(tmp_path):
    points = [(f"{o}-{b}", [f"operator={o}", f"operator.blend={b}"], None) for o in ("a", "b") for b in (0, 1)]
    root = write_sweep(tmp_path, points)
    for o, slots in (("a", "rank"), ("b", "window")):
        write_run(root / "points" / f"{o}-0", {"operator.name": o, "operator.slots": slots, "operator.blend": 0.0})
    rows = by_name(read_runs([root]))
    assert (rows["b-1"]["status"], rows["b-1"]["operator.name"], rows["b-1"]["operator.slots"]) == (
        "todo",
        "b",
        "window",
    )
    assert (rows["a-1"]["operator.slots"], rows["a-1"]["operator.blend"]) == ("rank", 1.0)


@pytest.mark.parametrize(
    "plan", ["", "[]", "{", '{"points": [3, {"name": 1, "overrides": 7}], "invalid": 5, "command": "x"}']
)
def test_damaged_plans_leave_the_runs_readable(tmp_path, plan):
    grid(tmp_path / "points")
    (tmp_path / "plan.json").write_text(plan)
    assert summarize(read_runs([tmp_path]))["n"].sum() == 18


def test_a_sweep_without_a_valid_point_is_reported(tmp_path):
    write_sweep(tmp_path, [], [{"overrides": ["operator.k=0"], "reason": "too small"}])
    report = make_report([tmp_path], tmp_path / "out")
    assert len(report.runs) == len(report.summary) == 0
    assert "too small" in (tmp_path / "out" / "table.md").read_text()
    assert "; 0 runs\n" in report.text()


# ------------------------------------------------------------------------------------- pictures and pages


@pytest.mark.long
def test_pictures_for_a_grid(tmp_path):
    report = make_report([grid(tmp_path)], tmp_path / "out")
    assert [p.name for p in report.pictures] == ["over_blend", "heatmap", "gflops", "seconds", "spectrum", "curves"]
    for picture in report.pictures:
        assert picture.png.stat().st_size > 10_000
        assert ElementTree.parse(picture.svg).getroot().tag.endswith("svg")
    assert "± one sample standard deviation" in report.pictures[0].caption


@pytest.mark.long
def test_no_pictures_where_nothing_varies_and_old_ones_go(tmp_path):
    write_run(tmp_path / "r", epochs=1)
    make_report([grid(tmp_path / "runs", ks=(4, 9), seeds=(0,))], tmp_path / "out")
    assert (tmp_path / "out" / "heatmap.png").exists()
    assert make_report([tmp_path / "r"], tmp_path / "out").pictures == []
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        ".convnn-report",
        "index.html",
        "results.csv",
        "summary.csv",
        "table.md",
    ]


@pytest.mark.long
def test_random_search_text_keys_and_failures_alone_are_drawn_or_skipped(tmp_path):
    for i in range(5):
        write_run(tmp_path / "random" / f"r{i}", {"optim.lr": 10.0**-i, "optim.weight_decay": 0.01 * i})
        write_run(tmp_path / "text" / f"r{i}", {"operator.name": f"o{i}", "operator.k": i}, 80.0 + i, gflops=1.0 + i)
        write_run(tmp_path / "failed" / f"r{i}", {"operator.k": i}, status="diverged", reason="nan")
    names = {
        kind: [p.name for p in make_report([tmp_path / kind], tmp_path / kind / "report").pictures]
        for kind in ("random", "text", "failed")
    }
    assert names == {
        "random": ["over_optim_lr", "curves"],
        "text": ["configurations", "gflops", "curves"],
        "failed": [],
    }


def test_table_says_what_the_metric_is(tmp_path):
    report = make_report(
        [grid(tmp_path, blends=(0.0,), ks=(4,), seeds=(0, 1, 2))], tmp_path / "out", "top1_best_on_test"
    )
    text = (tmp_path / "out" / "table.md").read_text()
    assert "top1_best_on_test: best test top-1, chosen on the test set (%)" in text
    assert "| 86.00 ± 1.00 (n=3) | 85.00 ± 1.00 (n=3) |" in text
    assert "86.00 ± 1.00 (n=3)" in report.text()


def test_home_directory_is_not_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = write_run(tmp_path / "runs" / "r", status="diverged", reason=f"see {tmp_path}/x")
    (folder / "env.json").write_text(json.dumps({"command": [f"data.root={tmp_path}/data"]}))
    make_report([tmp_path / "runs"], tmp_path / "out")
    for name in ("index.html", "table.md", "results.csv"):
        text = (tmp_path / "out" / name).read_text()
        assert str(tmp_path) not in text and "see ~/x" in text
    assert "train.py data.root=~/data" in (tmp_path / "out" / "index.html").read_text()


# ------------------------------------------------------------------------------------- the script, and speed


def script(*args):
    command = [sys.executable, str(ROOT / "scripts" / "report.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENV)


@pytest.mark.long
def test_script_writes_and_prints(tmp_path):
    grid(tmp_path / "a=b", blends=(0.5,), ks=(4,))
    done = script(tmp_path / "a=b")
    assert done.returncode == 0, done.stderr
    assert "84.50 ± 0.71 (n=2)" in done.stdout and "index.html" in done.stdout
    with (tmp_path / "a=b" / "report" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    assert rows[0]["version_hydra-core"] == "1.3" and rows[0]["params"] == "11000000" and rows[0]["val_top1_best"] == ""


@pytest.mark.long
def test_script_fails_with_one_line(tmp_path):
    for args in ([tmp_path], [tmp_path, "outt=x"]):
        done = script(*args)
        assert done.returncode == 2, (args, done.stderr)
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_named(tmp_path):
    for folder, metric, word in ((tmp_path, "top1", "metric=top1"), (tmp_path / "x", "top1_last", "no such folder")):
        with pytest.raises(ConfigError, match=word):
            make_report([folder], tmp_path / "out", metric)
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError, match="uv sync --extra report"):
        make_report([tmp_path], tmp_path / "out")


@pytest.mark.long
def test_hundreds_of_runs_take_seconds_and_no_torch(tmp_path):
    template = write_run(tmp_path / "r")
    files = {f.name: f.read_text() for f in template.iterdir()}
    for i in range(300):
        (tmp_path / f"r{i}").mkdir()
        for name, text in files.items():
            text = text.replace("seed: 0", f"seed: {i + 1}").replace('"fingerprint"', '"before"')
            (tmp_path / f"r{i}" / name).write_text(text)
    code = f"""if True:
        import sys, time
        from pathlib import Path
        from convnn.report.tables import read_runs, summarize
        start = time.perf_counter()
        runs = read_runs([Path({str(tmp_path)!r})])
        assert len(runs) == 301 and summarize(runs)["n"].sum() == 301
        assert "torch" not in sys.modules
        print(time.perf_counter() - start)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 15
