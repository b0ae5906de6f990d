"""Evaluate a finished run's checkpoint on its test set."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from convnn.cli.program import guarded, script_options
from convnn.errors import ConfigError

USAGE = """
usage: uv run scripts/evaluate.py run=DIR [checkpoint=last|best] [data_root=DIR] [device=auto|cpu|cuda]

Prints loss, top-1 and top-5 (percent) of a run's checkpoint on its test set as one line of JSON.
  run         run folder, as train.py printed it
  checkpoint  last (default) or best
  data_root   where the data is now, if it moved
  device      default auto
Exit codes: 0 done, 1 the checkpoint cannot be used, 2 wrong arguments.
"""


@dataclass
class Options:
    """Arguments of this script."""

    run: str = MISSING
    checkpoint: str = "last"
    data_root: str | None = None
    device: str = "auto"


def main(argv: list[str]) -> None:
    """Evaluate and print."""
    options: Options = script_options(Options, argv, USAGE)
    if options.checkpoint not in ("last", "best"):
        raise ConfigError(f"checkpoint={options.checkpoint} is not one of last, best")
    from convnn.config.load import load_config

    config = load_config(Path(options.run))
    if options.data_root:
        config.data.root = options.data_root
    config.device = options.device
    from convnn.train.restore import evaluate_run

    print(json.dumps(evaluate_run(config, Path(options.run), options.checkpoint)))


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:]))
