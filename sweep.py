"""Train every point of a grid between convolution and attention; see README.md and ``--help``."""

import sys

from convnn.cli import guarded
from convnn.sweeping import main, run_sweep

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if any(arg.startswith("-") for arg in arguments):  # --help, --cfg, --info
        main()
    else:
        sys.exit(guarded(lambda: run_sweep(arguments), debug="debug=true" in arguments))
