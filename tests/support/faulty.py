"""A data set that fails in the way that ``data.options.fault`` says, once per file ``data.options.once``."""

import os
import signal
import sys
from pathlib import Path

from convnn.data.datasets import load_synthetic


def load(config):
    fault, once = config.options.get("fault"), Path(config.options["once"])
    if fault and not once.with_suffix(f".{fault}").exists():
        once.with_suffix(f".{fault}").touch()
        if fault == "raise":
            raise RuntimeError("a fault of the test")
        if fault == "exit":
            sys.exit(7)
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
    return load_synthetic(config)
