"""Evaluate a finished run's checkpoint on its test set."""

from __future__ import annotations

import json
from dataclasses import dataclass

from convnn.cli.program import RunOptions, chosen_run, run_program, script_options

USAGE = """
usage: uv run scripts/evaluate.py run=DIR [checkpoint=last|best] [data_root=DIR] [device=auto|cpu|cuda|mps]
       convnn-evaluate run=DIR ...     the same where convnn is installed

Prints loss, top-1 and top-5 (percent) of a run's checkpoint on its test set as one line of JSON: the run's own numbers.
Refused if config.yaml is not what the run was trained with, or the test images or classes are not those of the run.
{options}
With data_root of other images, same_images=false says so.
Exit codes: 0 done, 1 the checkpoint cannot be used, 2 wrong arguments.
"""


@dataclass
class Options(RunOptions):
    """Arguments of this script."""

    device: str = "auto"
    """What to compute on, as ``device=`` of train.py."""


def evaluate(argv: list[str]) -> None:
    """Evaluate and print."""
    options: Options = script_options(Options, argv, USAGE)
    folder, config = chosen_run(options)
    config.device = options.device
    from convnn.train.restore import evaluate_run

    print(json.dumps(evaluate_run(config, folder, options.checkpoint, other_data=bool(options.data_root))))


def main() -> None:
    """Run the program."""
    run_program(evaluate)


if __name__ == "__main__":
    main()
