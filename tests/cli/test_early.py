"""What is refused before torch loads, and what is left for the run to say."""

import json
import subprocess
import sys

import pytest
from helpers import tiny

from convnn.cli.early import check_early
from convnn.errors import EXIT_CONFIG, ConfigError

MISTAKES = ["data=imagefolder data.root=none", "data.download=false data.root=none", "operator=kvt", "run.dir=taken"]
CODE = """
import json, sys
from convnn.cli.train import check_arguments
codes = []
for line in sys.argv[1:]:
    try:
        check_arguments(line.split())
        codes.append(0)
    except SystemExit as error:
        codes.append(error.code)
print(json.dumps([codes, "torch" in sys.modules]))
"""


def test_mistakes_that_need_no_torch_are_found_without_it(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "photo.jpg").write_text("x")
    command = [sys.executable, "-c", CODE, *MISTAKES]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert json.loads(done.stdout) == [[EXIT_CONFIG] * len(MISTAKES), False], done.stderr
    assert len(done.stderr.splitlines()) == len(MISTAKES)


def test_only_a_run_that_may_be_complete_is_spared_the_look_at_its_data(tmp_path):
    gone = ["data=imagefolder", f"data.root={tmp_path}/gone"]
    for policy in ("skip", "resume"):
        check_early(tiny(*gone, f"run.if_exists={policy}"))
    for policy in ("fail", "overwrite"):
        with pytest.raises(ConfigError, match=r"no folder .*gone/train"):
            check_early(tiny(*gone, f"run.if_exists={policy}"))
