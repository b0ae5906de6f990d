"""The reference that the command in docs/library.md makes from the docstrings."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import convnn

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_reference_builds_and_names_what_is_public(tmp_path):
    pytest.importorskip("pdoc")
    (given,) = re.findall(r"`uv run pdoc (.+) -o build/api`", (ROOT / "docs" / "library.md").read_text())
    words = [str(path.relative_to(ROOT)) for word in given.split() for path in ROOT.glob(word)]  # as the shell does
    command = [sys.executable, "-m", "pdoc", *sorted(set(words)), "-o", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    # Inherited annotations that another module imports for the type checker alone stay text.
    warnings = [line for line in done.stderr.splitlines() if "Warn" in line and "type annotation" not in line]
    assert done.returncode == 0 and not warnings, done.stderr
    assert "/build/" in (ROOT / ".gitignore").read_text().split()
    page = (tmp_path / "convnn" / "ops" / "neighborhood.html").read_text()
    assert "Token indices" in page and "find_neighborhood" in page
    public = (tmp_path / "convnn.html").read_text()
    assert all(hasattr(convnn, name) and name in public for name in convnn.__all__ if not name.startswith("_"))
    for path in (ROOT / "convnn").rglob("[a-z]*.py"):
        assert (tmp_path / path.relative_to(ROOT)).with_suffix(".html").is_file(), path
