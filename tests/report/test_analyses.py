"""The numbers and pictures of analyses in a report."""

import csv
import json

import pytest
from fake_runs import write_run

from convnn.report.build import make_report

pytest.importorskip("pandas")
pytest.importorskip("matplotlib")


def keep(folder, name, settings=None, **headline):
    (folder / "analyses").mkdir(exist_ok=True)
    entry = {"analysis": name, "title": f"The {name}", "headline": headline, "settings": settings or {}, "result": {}}
    (folder / "analyses" / f"{name}.json").write_text(json.dumps(entry))


def test_numbers_are_averaged_over_seeds_and_pictures_are_taken_along(tmp_path):
    for blend in (0.0, 1.0):
        for seed in (0, 1):
            folder = write_run(tmp_path / "s" / f"b{blend}-s{seed}", {"operator.blend": blend}, seed=seed)
            keep(folder, "erf", erf_radius=blend + seed)
            if blend:
                keep(folder, "cka", cka_adjacent=0.5)
    (folder / "analyses" / "broken.json").write_text('{"analysis"')
    (folder / "analyses" / "notes.json").write_text("{}")
    (tmp_path / "s" / "analyses").mkdir()
    for kind in ("png", "svg"):
        (tmp_path / "s" / "analyses" / f"erf.{kind}").write_text("<svg xmlns='http://www.w3.org/2000/svg'></svg>")
    report = make_report([tmp_path / "s"], tmp_path / "out")
    (section,) = report.sections
    ((header, rows),) = section.tables
    assert header[0] == "arm" and set(header[1:]) == {"erf_radius", "cka_adjacent"}
    cells = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert cells["blend=0"]["erf_radius"] == "0.5 ± 0.71 (n=2)" and cells["blend=0"]["cka_adjacent"] == "–"
    assert cells["blend=1"]["cka_adjacent"] == "0.5 ± 0 (n=2)"
    (picture,) = section.pictures
    assert picture.title == "The erf" and picture.svg == tmp_path / "out" / "analysis_erf.svg" and picture.svg.exists()
    with (tmp_path / "out" / "analyses.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(row["arm"], row["seed"], float(row["erf_radius"])) for row in table] == [
        ("blend=0", "0", 0.0),
        ("blend=0", "1", 1.0),
        ("blend=1", "0", 1.0),
        ("blend=1", "1", 2.0),
    ]


def test_results_of_other_settings_and_checkpoints_are_left_out(tmp_path):
    for seed, images in ((0, 64), (1, 64), (2, 4), (3, 64)):
        folder = write_run(tmp_path / "s" / f"s{seed}", seed=seed)
        keep(folder, "erf", {"images": images, "checkpoint": "last", "sha256": f"{seed}"}, erf_radius=float(seed))
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "last.pt").write_bytes(b"trained on")
    (section,) = make_report([tmp_path / "s"], tmp_path / "out").sections
    assert section.tables[0][1][0][1] == "0.5 ± 0.71 (n=2)" and "1 results with other settings" in section.text


def test_without_analyses_there_is_no_section(tmp_path):
    report = make_report([write_run(tmp_path / "r")], tmp_path / "out")
    assert not report.sections and not (tmp_path / "out" / "analyses.csv").exists()
