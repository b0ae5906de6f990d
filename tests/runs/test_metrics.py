"""metrics.jsonl is read up to its first damaged row, whatever has become of it."""

import json

import pytest

from convnn.runs.metrics import epochs_done, read_metrics

GOOD = [{"epoch": 0, "x": 1}, {"epoch": 1, "x": None}]


@pytest.mark.parametrize(
    "more", ["", "\n", '{"epoch": 2, "torn', '[{"epoch": 2}]', "{}", '{"epoch": NaN}', "[" * 10**5]
)
def test_rows_before_a_damaged_one_count(more, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in GOOD) + more + '\n{"epoch": 3}\n' * bool(more.strip()))
    assert read_metrics(path) == GOOD


def test_a_file_that_cannot_be_read_has_no_rows(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        assert read_metrics(path) == [] and epochs_done(path) is None
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    assert read_metrics(tmp_path / "binary") == [] and epochs_done(tmp_path / "binary") is None


def test_epochs_are_counted_from_the_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"epoch": epoch, "layers": "x" * 1000} for epoch in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"epoch": 200, "torn')
    assert epochs_done(path) == 200
