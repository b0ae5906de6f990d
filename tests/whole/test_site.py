"""The documentation as a site: it builds without a warning, the same each time, and fetches nothing."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import convnn
from convnn.config.keys import all_keys
from convnn.config.reference import groups

pytest.importorskip("mkdocs")
pytest.importorskip("material")
pytest.importorskip("mkdocstrings")
pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]


def build(root, out, **environment):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    path = os.pathsep.join([str(root), *sys.path])
    return subprocess.run(
        command,
        cwd=root,
        env=os.environ | {"PYTHONPATH": path, "NO_MKDOCS_2_WARNING": "1"} | environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site") / "first"
    done = build(ROOT, out)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return out


def test_every_page_is_in_the_navigation_in_reading_order(site):
    index = (ROOT / "docs" / "README.md").read_text()
    order = [Path(name).stem for name in re.findall(r"\]\((\w+)\.md\)", index)]
    navigation = (site / "index.html").read_text().split('<nav class="md-nav md-nav--primary')[1]
    shown = re.findall(r'<a href="\.?/?(\w+)\.html" class="md-nav__link', navigation)
    assert shown == ["index", "contents", *order, "keys", "api", "changelog"]
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} - {"README"} == set(order)


def test_keys_and_public_names_have_anchors(site):
    keys, names = (set(re.findall(r'id="([^"]+)"', (site / page).read_text())) for page in ("keys.html", "api.html"))
    every = {key.name for group in groups() for key in group.keys}
    assert len(every) > 100 and every <= keys and every <= set(all_keys())
    shown = {name.rpartition(".")[2] for name in names}
    assert set(convnn.__all__) - {"__version__"} <= shown
    assert any(name.endswith("ConvNN2d.set_spectrum") for name in names)  # inherited


def test_files_of_the_repository_are_shown_where_pages_link_to_them(site):
    page = (site / "configuration.html").read_text()
    assert 'href="repository/convnn/config/schema.py.html"' in page
    assert "class" in (site / "repository/convnn/config/schema.py.html").read_text()


def test_nothing_is_fetched(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img|iframe)[^>]*?(?:src|href)=\"?([^\"\s>]+)", page.read_text())
        assert loaded and not [target for target in loaded if re.match(r"(https?:)?//", target)], page


def test_another_day_the_site_is_the_same(site, tmp_path):
    assert build(ROOT, tmp_path / "again", SOURCE_DATE_EPOCH="86400").returncode == 0
    first, again = (
        {path.relative_to(top): path.read_bytes() for path in top.rglob("*") if path.is_file()}
        for top in (site, tmp_path / "again")
    )
    assert first.keys() == again.keys() and [name for name in first if first[name] != again[name]] == []


def test_a_broken_link_fails_the_build(tmp_path):
    (tmp_path / "copy").mkdir()
    for name in ("docs", "convnn", "conf", "scripts", "tests"):
        shutil.copytree(ROOT / name, tmp_path / "copy" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mkdocs.yml", "README.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path / "copy" / name)
    page = tmp_path / "copy" / "docs" / "tour.md"
    page.write_text(
        page.read_text() + "\n[a](nowhere.md) [b](../convnn/nowhere.py) [c](sweeps.md#nowhere) ![d](tour/nowhere.png)\n"
    )
    done = build(tmp_path / "copy", tmp_path / "out")
    assert done.returncode == 1
    for lost in ("nowhere.md", "convnn/nowhere.py", "sweeps.md#nowhere", "tour/nowhere.png"):
        assert lost in done.stderr, lost


def test_the_output_is_ignored_and_the_command_is_documented():
    assert "/build/" in (ROOT / ".gitignore").read_text().split()
    assert "uv run --group docs mkdocs build --strict" in (ROOT / "docs" / "README.md").read_text()
