"""The reference that the README's command makes from the docstrings."""

import subprocess
import sys
from pathlib import Path

import pytest

import convnn


@pytest.mark.slow
def test_the_reference_builds_and_names_what_is_public(tmp_path):
    pytest.importorskip("pdoc")
    root = Path(__file__).resolve().parents[2]
    modules = sorted(str(path) for path in (root / "convnn").glob("[a-z]*.py"))
    command = [sys.executable, "-m", "pdoc", *modules, "-o", str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    # Inherited annotations that another module imports for the type checker alone stay text.
    warnings = [line for line in done.stderr.splitlines() if "Warn" in line and "type annotation" not in line]
    assert done.returncode == 0 and not warnings, done.stderr
    assert "uv run pdoc convnn/[a-z]*.py -o build/api" in (root / "README.md").read_text()
    assert "build/" in (root / ".gitignore").read_text().split()
    page = (tmp_path / "convnn" / "neighborhood.html").read_text()
    assert "Token indices" in page and "neighbors_of" in page
    for path in (root / "convnn").glob("[a-z]*.py"):
        assert (tmp_path / "convnn" / f"{path.stem}.html").is_file(), path
    assert all(hasattr(convnn, name) for name in convnn.__all__)
