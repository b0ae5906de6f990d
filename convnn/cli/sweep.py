"""Train every point of a grid between convolution and attention, each in a process of its own."""

from __future__ import annotations

import sys

from convnn.cli.folders import take_config_folders
from convnn.cli.program import called_as, run_program
from convnn.runtime import distributed
from convnn.sweep.job import main as hydra_main
from convnn.sweep.sweep import run_sweep


def sweep(argv: list[str]) -> int:
    """Carry out the sweep, which starts its own processes; return the exit code."""
    given = [arg for arg in argv if arg not in ("-m", "--multirun")]  # a sweep always is one
    rest = take_config_folders(given)
    if any(arg.startswith("-") for arg in rest):  # --help, --cfg, --info
        sys.argv[1:] = rest
        hydra_main()
        return 0
    distributed.refuse_several("sweep.py")
    return run_sweep(rest, [called_as("sweep.py"), *given])


def main() -> None:
    """Run the program."""
    run_program(sweep, debug=True)


if __name__ == "__main__":
    main()
