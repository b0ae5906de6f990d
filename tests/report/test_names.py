"""A report keeps what people call things: sweeps and their points, options, data, epochs, commands."""

import csv
import json
import shutil

import pytest
from fake_runs import write_run, write_sweep

from convnn.report import plots
from convnn.report.build import make_report
from convnn.report.looks import Looks
from convnn.report.plots import accuracy_by_configuration
from convnn.report.tables import find_results, labels_of, main_keys, runs_frame, summarize
from convnn.report.view import BLEND, K, View

pytest.importorskip("pandas")
pytest.importorskip("matplotlib")

POINTS = {
    "none": {"swap.match": None},
    "stage2": {"swap.stages": [2]},
    "stage10": {"swap.stages": [10]},
    "all": {"swap.stages": [2, 10]},
}


def named_sweep(root, points=POINTS, seeds=(0, 1), name="places", choices=None, **more):
    """Write the runs and the plan of a sweep with named points."""
    planned = []
    for i, (label, keys) in enumerate(points.items()):
        for seed in seeds:
            folder = f"z{len(points) - i}-s{seed}"  # the folders' order is the other way round
            own = [f"{key}={json.dumps(value)}" for key, value in keys.items()] + [f"seed={seed}"]
            planned.append((folder, own + (choices or {}).get(label, []), {"status": "complete"}, label))
            write_run(root / "points" / folder, {"data.name": "digits", "train.epochs": 3} | keys, 80.0 + i, seed=seed)
    return write_sweep(root, planned, name=name, **more)


def tables(*roots):
    frame = runs_frame(find_results(roots))
    return frame, summarize(frame)


def test_points_stand_in_tables_and_pictures_by_name_and_in_order(tmp_path):
    report = make_report([named_sweep(tmp_path / "s")], tmp_path / "out")
    assert list(report.summary["point.name"]) == list(POINTS) and set(report.summary["n"]) == {2}
    header, rows = report.table()
    assert header[:2] == ["point.name", "top1_last"] and [row[0] for row in rows] == list(POINTS)
    assert "swap.match, swap.stages" in report.follows()
    figure, _ = accuracy_by_configuration(Looks(View(report.summary, "top1_last")))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(POINTS)
    text = (tmp_path / "out" / "table.md").read_text().split("## Differences")[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == ["point.name", "---", *POINTS]


def test_titles_say_sweep_data_and_epochs(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(plots, "add_title", lambda figure, text: titles.append(text))
    report = make_report([named_sweep(tmp_path / "s")], tmp_path / "out")
    subject = "places: digits, 3 epochs"
    assert report.subject == subject and report.text().startswith(f"{subject}; 8 runs: 8 complete")
    assert titles and all(title.endswith(f" ({subject})") for title in titles)
    assert (tmp_path / "out" / "table.md").read_text().startswith(f"# {subject}\n")
    page = (tmp_path / "out" / "index.html").read_text()
    assert f"<title>{subject}</title>" in page and f"<h1>{subject}</h1>" in page
    assert "top1_last: test top-1 of the last epoch (%)" in page


@pytest.mark.parametrize(
    "changes, subject",
    [
        ([], "digits, 1 epoch"),
        ([{"train.epochs": 5}], "digits, 1 to 5 epochs"),
        ([{"data.name": "cifar10"}], "digits and cifar10, 1 epoch"),
        ([{"data.name": "a"}, {"data.name": "b"}], "3 data sets, 1 epoch"),
        ([{"train.max_steps": 7}], "digits, 1 epoch, 7 steps at most"),
    ],
)
def test_what_runs_without_a_sweep_are(changes, subject, tmp_path):
    for i, change in enumerate([{}, *changes]):
        write_run(tmp_path / f"r{i}", {"data.name": "digits", "train.epochs": 1} | change, seed=i, epochs=2)
    assert make_report([tmp_path], tmp_path / "out").subject == subject


def test_a_plan_without_a_name_has_that_of_its_folder(tmp_path):
    root = named_sweep(tmp_path / "depth")
    plan = json.loads((root / "plan.json").read_text())
    (root / "plan.json").write_text(json.dumps({key: value for key, value in plan.items() if key != "name"}))
    assert make_report([root], tmp_path / "out").subject == "depth: digits, 3 epochs"


def test_options_chosen_by_name_are_shown_by_it(tmp_path):
    points = {"a": {"swap.match": None}, "b": {"swap.fraction": [0.0, 0.5]}, "c": {"swap.every": 2}}
    choices = {"a": ["swap=none"], "b": ["swap=first_half"], "c": ["swap=every_other", "tracker=jsonl"]}
    root = named_sweep(tmp_path / "s", points, choices=choices)
    plan = json.loads((root / "plan.json").read_text())
    for point in plan["points"]:
        point["label"] = ""
    (root / "plan.json").write_text(json.dumps(plan))
    shutil.rmtree(root / "points" / "z1-s1")  # a point without a run has its options too
    frame, summary = tables(root)
    assert list(summary["swap.name"]) == ["none", "first_half", "every_other"]
    assert main_keys(summary) == ["swap.name"] and not [c for c in frame.columns if c.startswith("tracker")]
    assert list(summary["n"]) == [2, 2, 1] and list(summary["n_open"] + summary["n_failed"]) == [0, 0, 1]


def test_two_names_of_one_configuration_share_a_mean(tmp_path):
    named_sweep(tmp_path / "a", {"half": {BLEND: 0.5}, "whole": {BLEND: 1.0}}, seeds=(0,))
    named_sweep(tmp_path / "b", {"b05": {BLEND: 0.5}}, seeds=(1,))
    write_run(tmp_path / "c", {BLEND: 0.5, "data.name": "digits", "train.epochs": 3}, 83.0, seed=2)
    _, summary = tables(tmp_path)
    assert list(summary["point.name"]) == ["half", "whole"] and list(summary["n"]) == [3, 1]


def test_a_key_that_does_not_follow_from_the_name_stays(tmp_path):
    named_sweep(tmp_path / "a", {"x": {K: 4}})
    named_sweep(tmp_path / "b", {"x": {K: 9}, "y": {K: 16}})
    assert main_keys(tables(tmp_path)[1]) == ["point.name", K]


# ------------------------------------------------------------------------------------------------- blends


def without_blend(folder):
    """Take blend and k from the layers of a run's metrics, as those of ACmix have none."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row["layers"] = [{"name": "conv1", "overlap": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def operators(tmp_path):
    for blend in (0.0, 1.0):
        write_run(tmp_path / f"n{blend}", {"operator.name": "convnn", BLEND: blend}, 90 + blend)
    without_blend(write_run(tmp_path / "acmix", {"operator.name": "acmix", BLEND: 0.0}, 70.0))
    return tables(tmp_path)


def test_an_operator_without_a_blend_is_not_labelled_by_one(tmp_path):
    frame, summary = operators(tmp_path)
    assert dict(zip(frame["name"], frame["on_spectrum"], strict=True)) == {"acmix": False, "n0.0": True, "n1.0": True}
    view = View(summary, "top1_last")
    assert labels_of(view.rows, view.keys) == ["acmix", "convnn, blend=0", "convnn, blend=1"]
    assert [row["operator.name"] for row in view.rows_at(BLEND)] == ["convnn"] * 2
    report = make_report([tmp_path], tmp_path / "out")
    assert [row[:2] for row in report.table()[1]] == [["acmix", "–"], ["convnn", "0"], ["convnn", "1"]]
    assert "Left out: 1 without one fixed blend." in next(p.caption for p in report.pictures if p.name == "over_blend")


def test_a_plain_network_is_not_called_by_an_operator(tmp_path):
    plain = {"operator.name": "convnn", "operator.target": "convnn.ConvNN2d", "swap.match": None, "swap.kind": "auto"}
    hybrid = {"operator.name": "hybrid", "operator.target": "convnn.HybridConvNN2d", "swap.kind": "conv"}
    for seed in (0, 1, 2):
        write_run(tmp_path / f"p{seed}", {"backbone.name": "resnet18", **plain}, 80.0 + seed, seed=seed)
        write_run(tmp_path / f"h{seed}", {"backbone.name": "resnet18", **hybrid}, 82.0 + seed, seed=seed)
    report = make_report([tmp_path], tmp_path / "out")
    names = [row[report.table()[0].index("operator.name")] for row in report.table()[1]]
    assert set(names) == {"no layer replaced", "hybrid"}
    view = View(report.summary, "top1_last")
    assert "no layer replaced" in labels_of(view.rows, view.keys)
    with (tmp_path / "out" / "summary.csv").open() as file:
        rows = {row["operator.name"]: row["operator.target"] for row in csv.DictReader(file)}
    assert rows == {"no layer replaced": "no layer replaced", "hybrid": "convnn.hybrid.HybridConvNN2d"}
    text = (tmp_path / "out" / "table.md").read_text()
    assert "against no layer replaced" in text or "no layer replaced" in report.verdict


def test_metrics_that_list_no_layers_say_nothing_of_the_blend(tmp_path):
    folder = write_run(tmp_path / "r", {BLEND: 0.5})
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({k: v for k, v in row.items() if k != "layers"}) + "\n" for row in rows)
    )
    write_run(tmp_path / "s", {BLEND: 1.0})
    frame, summary = tables(tmp_path)
    assert sorted(frame["on_spectrum"], key=str) == [None, True]
    assert [row[BLEND] for row in View(summary, "top1_last").rows] == [0.5, 1.0]


def test_a_table_says_that_a_blend_moves(tmp_path):
    write_run(tmp_path / "a", {BLEND: 1.0, "schedule.blend.shape": "linear"})
    write_run(tmp_path / "b", {BLEND: 0.5, "operator.learn_blend": "layer"})
    write_run(tmp_path / "c", {BLEND: 1.0})
    header, rows = make_report([tmp_path], tmp_path / "out").table()
    assert {row[header.index(BLEND)] for row in rows} == {"linear schedule", "learned from 0.5", "1"}
    view = View(tables(tmp_path)[1], "top1_last")
    assert set(labels_of(view.rows, view.keys)) == {"blend=learned from 0.5", "blend=linear schedule", "blend=1"}


def test_equal_labels_are_told_apart():
    assert labels_of([{K: 1}, {K: 2}, {K: 1}], [K]) == ["k=1", "k=2", "k=1 (2)"]


# ------------------------------------------------------------------------------------------------- commands


def test_commands_are_quoted_once(tmp_path):
    root = named_sweep(tmp_path / "s", command=["sweep.py", "grid=depth", "swap.stages=[1,2]"])
    environment = {"command": ["seed=0", "tracker.group='places'", "run.dir='/data/my run'"]}
    (root / "points" / "z1-s0" / "env.json").write_text(json.dumps(environment))
    report = make_report([root], tmp_path / "out")
    assert report.commands == ["sweep.py grid=depth 'swap.stages=[1,2]'"]
    assert "train.py seed=0 tracker.group=places 'run.dir=/data/my run'" in report.run_commands
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.index("sweep.py grid=depth") < page.index("<details>") < page.index("tracker.group=places")
