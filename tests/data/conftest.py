import logging

import pytest
from helpers import write_image_folder


@pytest.fixture
def root(tmp_path):
    write_image_folder(tmp_path, per_class=4)
    return tmp_path


@pytest.fixture
def lines():
    """The messages of the program since the test began."""
    log, seen = logging.getLogger("convnn"), []
    handler, level = logging.Handler(), log.level
    handler.emit = lambda record: seen.append(record.getMessage())
    log.addHandler(handler), log.setLevel(logging.INFO)
    yield seen
    log.removeHandler(handler), log.setLevel(level)
