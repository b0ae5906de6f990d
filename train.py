"""Train one model on the spectrum between convolution and attention; see README.md and ``--help``."""

import sys

import hydra
from omegaconf import DictConfig

from convnn.cli import check_arguments, run_job


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(values: DictConfig) -> float | None:
    """Carry out the composed run."""
    return run_job(values)


if __name__ == "__main__":
    check_arguments(sys.argv[1:])
    main()
