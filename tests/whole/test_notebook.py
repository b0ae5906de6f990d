"""docs/finished_run.ipynb runs from its first cell to its last, on a run that was just trained."""

import os

import pytest
from helpers import tiny

from convnn.config.compose import CONF_DIR
from convnn.train.run import run

NOTEBOOK = CONF_DIR.parent / "docs" / "finished_run.ipynb"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    given = ["data=digits", "data.limit_test=48", "operator=spectrum", "operator.blend=0.5", "swap.min_kernel=3"]
    run(tiny(*given, f"run.dir={tmp_path}/r"))
    monkeypatch.setenv("CONVNN_RUN", str(tmp_path / "r"))
    monkeypatch.setenv("PYTHONPATH", f"{CONF_DIR.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # what is in the repository shows none
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    text = "".join(o.get("text", "") + o.get("data", {}).get("text/plain", "") for one in outputs for o in one)
    assert "'complete'" in text and "of 48 images are right" in text and "0.75: " in text
    assert sum("image/png" in o.get("data", {}) for one in outputs for o in one) == 2
