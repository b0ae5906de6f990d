"""scripts/gpu_check.py on a CPU: all stages in tiny sizes; what is done, cut off, failed or left; the verdicts."""

import csv
import json
import sys
import time

import gpu_verdicts as verdicts
import pytest
import torch
from gpu_check import KEY, Check
from gpu_indices import Case, differences
from gpu_stages import ROWS, STAGES
from gpu_units import Context, Stage, Unit
from helpers import write_image_folder
from programs import assert_refused

from convnn.paper.compare import select_rows
from convnn.paper.published import load_table

CPU = Context("cpu", 0, True, None, None, 0)


def lines(folder, stage=None):
    with (folder / (f"gpu_check_{stage}.csv" if stage else "gpu_check.csv")).open() as file:
        return list(csv.DictReader(file))


@pytest.mark.long
def test_all_stages_on_a_cpu(tmp_path, call):
    """The stages that need no images, and those that read them from a folder."""
    write_image_folder(tmp_path / "images", classes=tuple("abcdefghij"), per_class=4, side=32)
    words = ["tiny=true", "device=cpu", f"out={tmp_path}/out", f"work={tmp_path}/work", f"data={tmp_path}/images"]
    code, err = call("scripts/gpu_check.py", words)
    found = {row["stage"]: row for row in lines(tmp_path / "out")}
    assert code == 0, (err, found)
    assert list(found) == [stage.name for stage in STAGES]
    passed = {"tests", "indices", "resume", "nccl"}
    assert {name for name, row in found.items() if row["verdict"] == "pass"} == passed
    assert {row["verdict"] for row in found.values()} == {"pass", "figure"}
    for name in found:
        rows = lines(tmp_path / "out", name)
        assert rows and all(row["torch"] and row["commit"] and row["date"] for row in rows), name
    assert {row["outcome"] for row in lines(tmp_path / "out", "tests")} == {"passed"}
    assert {row["case"] for row in lines(tmp_path / "out", "resume")} == {"ResNet", "ViT"}
    assert {row["code"] for row in lines(tmp_path / "out", "warm")} == {"0"}
    assert {row["rows"] for row in lines(tmp_path / "out", "indices")} == {"64"}
    assert [row["graph_breaks"] for row in lines(tmp_path / "out", "compile")] == ["0", "0"]
    assert lines(tmp_path / "out", "rows")[0]["status"].startswith("SHORTENED")


def unit(name, code, ends=(0,), least=0.0):
    """A part that writes what it is told to, or sleeps."""

    def read(folder):
        path = folder / "rows.json"
        return json.loads(path.read_text()) if path.is_file() else []

    writing = "import json, sys, time; write = lambda *r: open(sys.argv[1] + '/rows.json', 'w').write(json.dumps(r));"
    return Unit(name, lambda folder, _: [[sys.executable, "-c", writing + code, str(folder)]], read, least, ends)


@pytest.fixture
def check(tmp_path):
    def make(**facts):
        return Check(tmp_path / "out", tmp_path / "work", dict.fromkeys(KEY, "") | {"commit": "c1"} | facts)

    return make


def stage(*units):
    return Stage("some", "", 1, lambda _: list(units), lambda rows: ("figure", ",".join(r["a"] for r in rows)))


def only(check):
    (line,) = check.lines().values()
    return line


def test_what_is_done_is_not_done_again(check, tmp_path, capsys):
    first = stage(unit("x", "write({'a': 1})"), unit("y", "write({'a': 2}, {'a': 3})"))
    check().carry_out(first, CPU, 60)
    assert [(r["unit"], r["a"], r["commit"]) for r in lines(tmp_path / "out", "some")] == [
        ("x", "1", "c1"),
        ("y", "2", "c1"),
        ("y", "3", "c1"),
    ]
    assert only(check())["verdict"] == "figure" and only(check())["says"] == "1,2,3"
    check().carry_out(stage(unit("x", "1 / 0"), unit("y", "1 / 0")), CPU, 60)
    assert "done before: figure" in capsys.readouterr().out
    check(commit="c2").carry_out(stage(unit("x", "write({'a': 7})")), CPU, 60)
    assert only(check(commit="c2"))["says"] == "7" and only(check())["says"] == "1,2,3"
    assert len(lines(tmp_path / "out")) == 2


def test_a_stage_that_was_cut_off_goes_on(check, tmp_path):
    slow = unit("y", "write({'a': 2}); time.sleep(60)")
    begin = time.monotonic()
    check().carry_out(stage(unit("x", "write({'a': 1})"), slow, unit("z", "write({'a': 3})", least=50)), CPU, 6)
    assert time.monotonic() - begin < 20
    line = only(check())
    assert line["verdict"] == "cut off" and line["done"] == "x" and "left: y, z" in line["says"]
    assert [row["a"] for row in lines(tmp_path / "out", "some")] == ["1", "2"]  # what y had until then
    again = unit("y", "write({'a': 4})")
    check().carry_out(stage(unit("x", "1 / 0"), again, unit("z", "write({'a': 5})")), CPU, 60)
    assert only(check())["done"] == "x; y; z" and only(check())["says"] == "1,4,5"


def test_parts_are_told_their_share_and_may_take_what_is_left(check, tmp_path):
    told = []

    def given(name, least=0.0):
        def commands(folder, seconds):
            told.append((name, round(seconds)))
            return [[sys.executable, "-c", ""]]

        return Unit(name, commands, lambda _: [{"a": 1}], least)

    check().carry_out(stage(given("x"), given("y", least=250.0), given("z")), CPU, 400)
    assert [name for name, _ in told] == ["x", "y", "z"] and told[0][1] == 133 and told[1][1] == 250
    assert told[2][1] > 300 and only(check())["done"] == "x; y; z"


def test_what_fails_is_said_and_tried_again(check, capsys):
    check().carry_out(stage(unit("x", "write({'a': 1}); raise SystemExit('it is broken')"), unit("y", "")), CPU, 60)
    line = only(check())
    assert line["verdict"] == "fail" and line["says"] == "1; failed: x" and line["done"] == "y"
    assert "it is broken" in capsys.readouterr().out
    check().carry_out(stage(unit("x", "write({'a': 6}); sys.exit(5)", ends=(0, 5)), unit("y", "1 / 0")), CPU, 60)
    assert only(check())["verdict"] == "figure" and only(check())["says"] == "6"


def test_what_has_no_data_or_no_time_is_left(check):
    check().carry_out(stage(), CPU, 60)
    assert only(check())["verdict"] == "left" and "data=PATH" in only(check())["says"]
    check().carry_out(stage(unit("x", "", least=100)), CPU, 60)
    assert only(check())["verdict"] == "left" and "too few" in only(check())["says"]


def test_what_cannot_work_is_refused(call):
    words = {"device=cpu": "tiny=true", "stages=some": "matches none of warm, tests", "data=none": "no such file"}
    for word, hint in words.items():
        assert_refused(call, "scripts/gpu_check.py", [word], hint)


def test_the_rows_are_in_the_tables():
    for table, names in ROWS:
        assert select_rows(load_table(table), names)


def test_a_log_of_pytest_is_read(tmp_path):
    (tmp_path / "log").write_text(
        "[gw1] [ 20%] PASSED tests/support/kernel_checks.py::test_selection[self first] \n"
        "[gw0] [ 40%] FAILED tests/ops/test_a.py::test_b \n"
        "tests/ops/test_c.py::test_d[a b] SKIPPED (needs a CUDA device)   [ 50%]\n"
        "tests/ops/test_c.py::test_e \n"
    )
    rows = verdicts.read_tests(tmp_path)
    assert [row["outcome"] for row in rows] == ["passed", "failed", "skipped"]
    assert verdicts.judge_tests(rows) == ("fail", "1 failed, 1 passed, 1 skipped: test_b")
    assert verdicts.judge_tests(rows[2:])[0] == "fail" and verdicts.judge_tests(rows[:1]) == ("pass", "1 passed")


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_rows_that_differ_are_explained_by_rounding_or_not(similarity):
    case = Case(similarity, 8, torch.float32)
    x = case.draw(2, 16, torch.Generator().manual_seed(0), torch.device("cpu"))
    x[1, 0, 4] = x[1, 0, 5] * (1 + 2**-22)
    score = x.double() @ x.double().mT
    if similarity == "cosine":
        score /= x.double().norm(dim=-1)[..., None] * x.double().norm(dim=-1)[..., None, :]
    best = score.argsort(-1, descending=True)[..., :6]
    assert differences(x, best, best, case)[0] == 0
    near, wrong = best.clone(), best.clone()
    near[1] = torch.where(best[1] == 4, 5, torch.where(best[1] == 5, 4, best[1]))
    wrong[0, 0, 3, :2] = best[0, 0, 3, :2].flip(0)
    number, far = differences(x, best, near, case)
    assert number == len(far) == int((best[1] != near[1]).any(-1).sum()) > 0 and 0 < far.max() <= 1
    number, far = differences(x, best, wrong, case)
    assert number == 1 and far.item() > 1
    exact = Case(similarity, 8, torch.float32, exact=True)
    assert (differences(x, best, near, exact)[1] > 1).all()


def test_verdicts():
    """Rows are as a CSV file has them."""
    row = {"case": "c", "stopped_at_step": "9", "steps": "16", "tensors": "5", "unequal": "0", "equal_metrics": "True"}
    row |= {"largest_difference": "0.0", "note": ""}
    assert verdicts.judge_resume([row]) == ("pass", "c, resumed at step 9 of 16: 5 tensors equal")
    assert verdicts.judge_resume([row, row | {"unequal": "2"}])[0] == "fail"
    assert verdicts.judge_resume([row | {"equal_metrics": "False"}])[0] == "fail"
    assert verdicts.judge_resume([{"case": "c", "note": "no kernel"}]) == ("fail", "c: no kernel")
    arms = [("plain", "2", "1.0", "1.0", ""), ("auto", "3", "1.5", "1.25", ""), ("triton", "", "", "", "none")]
    columns = ("arm", "step_ms", "ratio", "peak_ratio", "note")
    steps = [{"case": "V"} | dict(zip(columns, arm, strict=True)) for arm in arms]
    assert verdicts.judge_steps(steps) == ("figure", "V auto x1.50, memory x1.25; V triton: none")
    assert verdicts.judge_steps(steps[2:])[0] == "fail"
    held = {"peak_mib": "1000", "counted_mib": ""}, {"peak_mib": "1250", "counted_mib": "300"}
    known = [row | own for row, own in zip(steps, held, strict=False)]
    assert verdicts.judge_steps(known)[1] == "V auto x1.50, memory x1.25 (1250 MiB, 1800 allowed)"
    warm = [{"case": "a", "code": "0"}, {"case": "b", "code": "cut off"}]
    assert verdicts.judge_warm(warm) == ("figure", "1 of 2 ended; not: b")
    rows = {"case": "c", "rows": "100", "differ": "3", "unexplained": "0", "largest": "0.25", "note": ""}
    assert verdicts.judge_indices([rows])[0] == "pass" and verdicts.judge_indices([])[0] == "fail"
    assert verdicts.judge_indices([rows, rows | {"unexplained": "1"}])[0] == "fail"
    assert verdicts.judge_indices([rows | {"note": "it cannot"}])[1].endswith("; it cannot")
    shares = [{"group": "input share", "case": case, "ms_median": ms} for case, ms in (("still", "9"), ("new", "10"))]
    assert verdicts.judge_input(shares) == ("figure", "the input takes 10.0 % of a step of 10.00 ms")
    one = {"case": "1 process(es)", "backend": "nccl", "processes": "1", "apart": "0.0", "as_without": "True"}
    assert verdicts.judge_groups([one])[0] == "pass" and verdicts.judge_groups([])[0] == "fail"
    assert verdicts.judge_groups([one | {"as_without": "False"}])[0] == "fail"
    assert verdicts.judge_groups([one | {"processes": "2", "apart": "0.1"}])[0] == "fail"
    epochs = [{"test_top1": top1, "train_seconds": s} for top1, s in (("60", "20"), ("94.2", "25"), ("94.4", "30"))]
    verdict, says = verdicts.judge_fast(epochs)
    assert (
        verdict == "figure" and says.startswith("top-1 94.40 % after 3 epochs") and says.endswith("94 % after 25.0 s")
    )
    assert verdicts.judge_fast(epochs[:1])[1].endswith("94 % not reached")
