"""The programs, called in this process; and what all refusals have in common."""

import logging
import re
import runpy
import sys
from pathlib import Path

import pytest

from convnn.config.folders import CONF_DIR, CONFIG_PATH
from convnn.errors import EXIT_CONFIG

ROOT = CONF_DIR.parent


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Return a function that calls a program in an empty folder and returns its exit code and standard error."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    logger = logging.getLogger("convnn")
    before = logger.handlers[:], logger.level, logger.propagate

    def run(program, args):
        monkeypatch.setattr(sys, "argv", [program, *args])
        monkeypatch.setattr(sys, "path", sys.path[:])  # programs add to it, and set the variable
        monkeypatch.setenv(CONFIG_PATH, "")
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(ROOT / program), run_name="__main__")
        except SystemExit as error:
            code = error.code or 0
        finally:
            from hydra.core.global_hydra import GlobalHydra

            GlobalHydra.instance().clear()
        return code, capsys.readouterr().err

    yield run
    logger.handlers[:], logger.level, logger.propagate = before


def snapshot(folder):
    """Everything below a folder: names and bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def assert_refused(call, program, args, hint, code=EXIT_CONFIG, where=None):
    where = where or Path.cwd()
    before = snapshot(where)
    found, err = call(program, args)
    assert found == code, err
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    assert re.search(hint, lines[0]), err
    assert snapshot(where) == before
