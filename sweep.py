"""Train every point of a grid between convolution and attention; see README.md and ``--help``."""

import sys

from convnn.cli.program import guarded
from convnn.runtime import distributed
from convnn.sweep.job import main
from convnn.sweep.sweep import run_sweep


def sweep() -> int:
    """Carry out the sweep; a sweep starts its own processes."""
    distributed.refuse_several("sweep.py")
    return run_sweep(arguments)


if __name__ == "__main__":
    arguments = [arg for arg in sys.argv[1:] if arg not in ("-m", "--multirun")]  # a sweep always is one
    if any(arg.startswith("-") for arg in arguments):  # --help, --cfg, --info
        main()
    else:
        sys.exit(guarded(sweep, debug="debug=true" in [arg.lower() for arg in arguments]))
