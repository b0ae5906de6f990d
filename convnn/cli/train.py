"""Train one model on the spectrum between convolution and attention: check the command line, compose, run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from convnn.cli.continuing import FROM_RUN, RESUME, config_from_folder
from convnn.cli.early import check_early
from convnn.cli.folders import take_config_folders
from convnn.cli.program import guarded, run_program, setup_logging
from convnn.config.compose import compose_config, from_hydra
from convnn.config.folders import CONF_DIR
from convnn.config.overrides import key_of
from convnn.config.schema import Config
from convnn.errors import ConfigError
from convnn.runtime.signals import follow_parent


def check_arguments(argv: Sequence[str]) -> None:
    """Compose and check a single run's command line before Hydra and torch start, and leave with one line if it fails.

    Flags such as --help, --cfg and --multirun are left to Hydra.
    """
    if any(arg.startswith("-") for arg in argv):
        return
    guarded(lambda: check_early(compose_config(argv)), debug="debug=true" in [a.lower() for a in argv])


def run_from_folder(argv: Sequence[str]) -> bool:
    """Carry out the run of a command line that names a run folder to start from; return whether it does.

    Raises:
        ConfigError: if it cannot be carried out.
    """
    argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--cfg=") else [arg])]
    flags = [arg for arg in argv if arg.startswith("-")]
    if any(flag in ("-h", "--help", "--version") or flag.startswith(("--hydra-help", "--info")) for flag in flags):
        return False
    setup_logging()
    at = next((i for i, arg in enumerate(argv) if arg in ("--cfg", "-c")), len(argv))
    overrides = [arg for arg in (*argv[:at], *argv[at + 2 :]) if not arg.startswith("-")]
    config = config_from_folder(overrides)
    if config is None:
        return False
    if at < len(argv):
        print(OmegaConf.to_yaml(OmegaConf.create(asdict(config))), end="")
        return True
    if flags:
        raise ConfigError(f"{flags[0]} does not go with a run folder to start from, which makes one run; leave it out")
    _finish(_run(config))
    return True


def _run(config: Config) -> dict[str, Any]:
    from convnn.train.run import run  # torch and timm load only after the configuration is known to be good

    return run(config)


def _finish(result: dict[str, Any]) -> None:
    if result.get("exit_code"):
        sys.exit(result["exit_code"])


def run_job(values: DictConfig) -> float | None:
    """Carry out the run that Hydra composed; in a multirun return top-1, otherwise leave with the exit code."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    setup_logging()
    debug = bool(values.get("debug", False))

    def job() -> dict[str, Any]:
        return _run(from_hydra(values))

    multirun = HydraConfig.get().mode == RunMode.MULTIRUN
    result = job() if multirun else guarded(job, debug)
    if not multirun:
        _finish(result)
    return result["top1_last"]


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")
def _composed(values: DictConfig) -> float | None:
    return run_job(values)


def train(argv: list[str]) -> None:
    """Hand the checked command line to Hydra, which reads ``sys.argv``, unless it names a run folder to start from."""
    sys.argv[1:] = take_config_folders(argv)
    follow_parent()
    if run_from_folder(sys.argv[1:]):
        return
    sys.argv[1:] = [arg for arg in sys.argv[1:] if key_of(arg) not in (RESUME, FROM_RUN)]  # beside --help
    check_arguments(sys.argv[1:])
    _composed()


def main() -> None:
    """Run the program."""
    run_program(train, debug=True)


if __name__ == "__main__":
    main()
