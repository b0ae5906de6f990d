"""Train one model on the spectrum between convolution and attention: check the command line, compose, run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import hydra
from omegaconf import DictConfig

from convnn.cli.early import check_early
from convnn.cli.folders import take_config_folders
from convnn.cli.program import guarded, run_program, setup_logging
from convnn.config.compose import compose_config, from_hydra
from convnn.config.folders import CONF_DIR
from convnn.runtime.signals import follow_parent


def check_arguments(argv: Sequence[str]) -> None:
    """Compose and check a single run's command line before Hydra and torch start, and leave with one line if it fails.

    Flags such as --help, --cfg and --multirun are left to Hydra.
    """
    follow_parent()
    if any(arg.startswith("-") for arg in argv):
        return
    guarded(lambda: check_early(compose_config(argv)), debug="debug=true" in [a.lower() for a in argv])


def run_job(values: DictConfig) -> float | None:
    """Carry out the run that Hydra composed; in a multirun return top-1, otherwise leave with the exit code."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    setup_logging()
    debug = bool(values.get("debug", False))

    def job() -> dict[str, Any]:
        config = from_hydra(values)
        from convnn.train.run import run  # torch and timm load only after the configuration is known to be good

        return run(config)

    multirun = HydraConfig.get().mode == RunMode.MULTIRUN
    result = job() if multirun else guarded(job, debug)
    if not multirun and result.get("exit_code"):
        sys.exit(result["exit_code"])
    return result["top1_last"]


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")
def _composed(values: DictConfig) -> float | None:
    return run_job(values)


def train(argv: list[str]) -> None:
    """Hand the checked command line to Hydra, which reads ``sys.argv``."""
    sys.argv[1:] = take_config_folders(argv)
    check_arguments(sys.argv[1:])
    _composed()


def main() -> None:
    """Run the program."""
    run_program(train, debug=True)


if __name__ == "__main__":
    main()
