"""The tour's commands as they stand in docs/tour.md: all are composed, and with small sizes all are run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import write_image_folder

from convnn.config.compose import compose_config

ROOT = Path(__file__).resolve().parents[2]
TOUR = (ROOT / "docs" / "tour.md").read_text()
STEP = re.compile(r"<!-- small:(.*?)-->\n(?:<!-- makes:(.*?)-->\n)?```sh\n(.*?)```", re.S)


def steps():
    """(small settings, files made, words of the command after `uv run`) of each step."""
    found = []
    for small, made, code in STEP.findall(TOUR):
        found.append((small.split(), (made or "").split(), shlex.split(code.replace("\\\n", " "))))
    assert all(words[:2] == ["uv", "run"] for *_, words in found)
    return [(small, made, words[2:]) for small, made, words in found]


def test_every_command_has_sizes_and_every_picture_is_there():
    assert len(steps()) == TOUR.count("```sh") == 6
    pictures = re.findall(r"!\[.+\]\((.+\.png)\)", TOUR)
    assert len(pictures) >= 6
    for name in pictures:
        assert 5_000 < (ROOT / "docs" / name).stat().st_size < 200_000, name
    for *_, words in steps():
        assert (ROOT / words[0]).is_file()


@pytest.mark.parametrize("step", [step for step in steps() if step[2][0] == "train.py"], ids=lambda s: s[2][-1])
def test_training_commands_compose(step):
    small, _, words = step
    assert compose_config(words[1:]).run.dir
    assert compose_config([*words[1:], *small]).data.limit == 40


@pytest.mark.slow
def test_the_commands_run_as_written(tmp_path):
    """In order, in an empty folder; only the sizes in the comments differ from what is shown."""
    write_image_folder(tmp_path / "cifar3k", classes=tuple("abcd"), per_class=12, side=32, suffix="jpg")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    for small, made, words in steps():
        given = {word.split("=")[0] for word in small}
        kept = [word for word in words[1:] if word.split("=")[0] not in given]
        command = [sys.executable, str(ROOT / words[0]), *kept, *small]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        for name in made:
            assert (tmp_path / name).stat().st_size > 500, name
