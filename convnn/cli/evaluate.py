"""Evaluate a finished run's checkpoint on its test set."""

from __future__ import annotations

import json
from dataclasses import dataclass

from convnn.cli.program import RunOptions, chosen_run, run_program, script_options

USAGE = """
usage: uv run scripts/evaluate.py run=DIR [checkpoint=last|best] [data_root=DIR] [device=auto|cpu|cuda]
       convnn-evaluate run=DIR ...     the same where convnn is installed

Prints loss, top-1 and top-5 (percent) of a run's checkpoint on its test set as one line of JSON.
  run         run folder, as train.py printed it
  checkpoint  last (default) or best
  data_root   where the data is now, if it moved
  device      default auto
Exit codes: 0 done, 1 the checkpoint cannot be used, 2 wrong arguments.
"""


@dataclass
class Options(RunOptions):
    """Arguments of this script."""

    device: str = "auto"


def evaluate(argv: list[str]) -> None:
    """Evaluate and print."""
    options: Options = script_options(Options, argv, USAGE)
    folder, config = chosen_run(options)
    config.device = options.device
    from convnn.train.restore import evaluate_run

    print(json.dumps(evaluate_run(config, folder, options.checkpoint)))


def main() -> None:
    """Run the program."""
    run_program(evaluate)


if __name__ == "__main__":
    main()
