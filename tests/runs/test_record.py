"""A complete run's numbers count only where metrics.jsonl has all its epochs and says what result.json says."""

import json

import pytest
from fake_runs import write_run

from convnn.runs.record import damage_of, read_record, read_result


def lines(folder):
    return (folder / "metrics.jsonl").read_text().splitlines(keepends=True)


FAULTS = {
    "torn in the middle": lambda rows: [*rows[:3], rows[3][:20] + "\n", *rows[4:]],
    "torn at the start": lambda rows: [rows[0][:20] + "\n", *rows[1:]],
    "torn at the end": lambda rows: [*rows[:-1], rows[-1][:20]],
    "a row is missing": lambda rows: [*rows[:2], *rows[3:]],
    "a row is there twice": lambda rows: [*rows[:2], rows[1], *rows[2:]],
    "a row too many": lambda rows: [*rows, rows[-1].replace('"epoch": 5', '"epoch": 6')],
    "nothing": lambda rows: [],
    "another last accuracy": lambda rows: [*rows[:-1], rows[-1].replace("80.0", "79.0")],
    "another best accuracy": lambda rows: [row.replace("81.0", "80.5") for row in rows],
    "no accuracy": lambda rows: [row.replace("test_top1", "test_top2") for row in rows],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_history_is_no_history(fault, tmp_path):
    folder = write_run(tmp_path / "r", epochs=6)
    assert read_record(folder).damage is None and len(read_record(folder).whole_rows) == 6
    (folder / "metrics.jsonl").write_text("".join(FAULTS[fault](lines(folder))))
    record = read_record(folder)
    assert record.complete and record.damage and record.whole_rows == []


def test_a_run_that_goes_on_has_the_rows_so_far(tmp_path):
    for status in (None, "interrupted", "diverged"):
        folder = write_run(tmp_path / str(status), status=status, epochs=4)
        (folder / "metrics.jsonl").write_text("".join(lines(folder)[:2]))
        record = read_record(folder)
        assert not record.complete and record.damage is None and len(record.whole_rows) == 2


def test_the_best_on_validation_images_agrees_too():
    rows = [{"epoch": e, "test_top1": 50.0, "val_top1": 60.0 - e} for e in range(3)]
    result = {"status": "complete", "epochs": 3, "top1_last": 50.0, "top1_best_on_test": None, "val_top1_best": 60.0}
    assert damage_of(result, rows) is None
    assert damage_of(result | {"val_top1_best": 61.0}, rows) == (
        "val_top1_best is 61 in result.json and 60 in metrics.jsonl"
    )
    assert "how many epochs" in damage_of(result | {"epochs": None}, rows)


OTHER = ["[1, 2]", "3", "null", '"complete"', "{}", '{"status": 1}', '{"status": "complete"}', "not JSON"]
OTHER += ['{"status": "complete", "top1_last": "80"}', '{"status": "complete", "top1_last": 80, "params": [1]}']


@pytest.mark.parametrize("text", OTHER)
def test_a_result_with_other_content_is_none(text, tmp_path):
    folder = write_run(tmp_path / "r")
    assert read_result(folder)["top1_last"] == 80.0
    (folder / "result.json").write_text(text)
    assert read_result(folder) is None and read_record(folder).damage == "result.json cannot be read"


def test_zero_is_a_number(tmp_path):
    folder = write_run(tmp_path / "r", top1=0.0, epochs=1)
    assert json.loads(lines(folder)[0])["test_top1"] == 0.0
    assert read_record(folder).complete and read_record(folder).damage is None
