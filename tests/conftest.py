import os

import pytest

# Tests run side by side (pytest-xdist), so each process takes one thread; child processes inherit it. One number of
# threads also makes the sums of a run, and so its metrics, the same in every process.
os.environ["OMP_NUM_THREADS"] = "1"

from programs import call  # noqa: F401  (a fixture of all tests; it imports NumPy, which reads the number above)
from sweeps import driver  # noqa: F401


@pytest.fixture(autouse=True, scope="session")
def trackio_folder(tmp_path_factory):
    """What trackio writes stays with the tests, those in other processes too; it reads the variable when imported."""
    os.environ["TRACKIO_DIR"] = str(tmp_path_factory.mktemp("trackio"))
