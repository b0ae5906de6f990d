"""What an import costs: commands, plans and reports load no torch, and ``import convnn`` next to nothing."""

import json
import pkgutil
import statistics
import subprocess
import sys

import convnn

TORCH = {"convnn.sweep.cost", "convnn.paper.counts"}
"""They build models; whoever needs them imports them in a function."""

ALL_MODULES = """
import importlib, json, pkgutil, sys
import convnn
seen, offenders = dir(convnn), []
for name in sys.argv[1:]:
    importlib.import_module(name)
    if "torch" in sys.modules:
        offenders.append(name)
        break
print(json.dumps([seen, offenders]))
"""


def modules_without_torch():
    found = ["convnn"]
    for package in ("config", "sweep", "report", "stats", "cli", "paper"):
        path = [f"{convnn.__path__[0]}/{package}"]
        found += [f"convnn.{package}", *(m.name for m in pkgutil.iter_modules(path, f"convnn.{package}."))]
    assert len(found) > 40 and set(found) > TORCH
    return [name for name in found if name not in TORCH]


def python(code, *args):
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_no_torch_and_all_public_names():
    seen, offenders = python(ALL_MODULES, *modules_without_torch())
    assert offenders == []
    assert {name for name in seen if not name.startswith("__")} == {*convnn.__all__, "version"} - {"__version__"}
    assert all(getattr(convnn, name) is not None for name in convnn.__all__)


def test_the_package_imports_at_once():
    code = "import time\nstart = time.process_time()\nimport convnn\nprint(time.process_time() - start)"
    assert statistics.median(python(code) for _ in range(5)) < 0.2  # CPU seconds, so that a busy machine does not count
