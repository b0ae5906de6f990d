"""Train every point of a grid between convolution and attention; see README.md and ``--help``."""

import sys

import hydra
from omegaconf import DictConfig

from convnn.cli import guarded
from convnn.sweeping import run_sweep, sweep_job


@hydra.main(version_base="1.3", config_path="conf", config_name="sweep")
def main(values: DictConfig) -> float | str | None:
    """Carry out one job: a point in its own process."""
    return sweep_job(values)


def launch(argv: list[str]) -> None:
    """Run Hydra with this command line."""
    sys.argv[1:] = argv
    main()


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if any(arg.startswith("-") for arg in arguments):  # --help, --cfg, --info
        main()
    else:
        sys.exit(guarded(lambda: run_sweep(arguments, launch), debug="debug=true" in arguments))
