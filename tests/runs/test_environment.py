"""The commit that a run records is that of our own checkout, or none."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from convnn.runs.environment import own_commit, record_choices, record_environment


def git(folder, *args):
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(["git", *who, *args], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture(autouse=True)
def outside(monkeypatch):
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):  # where the tests run in a hook
        monkeypatch.delenv(name, raising=False)


def repository(folder, *package, tracked=True):
    """Make a repository with a file of its own, and the package somewhere in it; return the package's folder."""
    place = folder.joinpath(*package, "convnn")
    place.mkdir(parents=True)
    (folder / "own.txt").write_text("x")
    (place / "__init__.py").write_text("")
    git(folder, "init", "-q")
    if not tracked:
        (folder / ".gitignore").write_text("convnn\n")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "first")
    return place


def test_our_own_checkout(tmp_path, monkeypatch):
    place = repository(tmp_path / "a")
    commit = git(tmp_path / "a", "rev-parse", "HEAD")
    assert own_commit(place) == (commit, False)
    (tmp_path / "a" / "untracked.txt").write_text("x")
    assert own_commit(place) == (commit, False)
    (place / "__init__.py").write_text("changed = 1\n")
    assert own_commit(place) == (commit, True)
    repository(tmp_path / "b")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "b" / ".git"))  # as in a hook of another repository
    assert own_commit(place) == (commit, True)
    (tmp_path / "link").symlink_to(place, target_is_directory=True)
    assert own_commit(tmp_path / "link") == (commit, True)
    git_dir = tmp_path / "tree"
    monkeypatch.delenv("GIT_DIR")
    git(tmp_path / "a", "worktree", "add", "-q", str(git_dir))
    assert own_commit(git_dir / "convnn") == (commit, False)


@pytest.mark.parametrize("package", [(".venv", "lib", "python3.11", "site-packages"), ("vendor",), ("src",)])
@pytest.mark.parametrize("tracked", [True, False])
def test_a_package_inside_another_repository_has_none(package, tracked, tmp_path):
    assert own_commit(repository(tmp_path, *package, tracked=tracked)) == (None, None)


def test_an_untracked_copy_has_none(tmp_path):
    assert own_commit(repository(tmp_path / "a", tracked=False)) == (None, None)
    place = repository(tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / ".git")
    assert own_commit(place) == (None, None)
    assert own_commit(tmp_path / "missing" / "convnn") == (None, None)


def test_without_git_there_is_none(tmp_path, monkeypatch):
    place = repository(tmp_path)
    monkeypatch.setenv("PATH", str(Path(tmp_path / "empty")))
    assert own_commit(place) == (None, None)


def test_what_was_measured_is_added(tmp_path):
    record_environment(tmp_path, "cuda", 0)
    before = json.loads((tmp_path / "env.json").read_text())
    record_choices(tmp_path, {})
    assert json.loads((tmp_path / "env.json").read_text()) == before
    found = {"selection k=9": {"way": "triton", "ms": {"torch": 2.0, "triton": 1.0}}}
    record_choices(tmp_path, found)
    assert json.loads((tmp_path / "env.json").read_text()) == before | {"choices": found}
