"""What the command-line programs share: composing with Hydra, one-line errors, exit codes."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from convnn import distributed
from convnn.checks import all_keys, check_keys, nearest, unknown_key_error
from convnn.config import Config, ConfigError
from convnn.rundir import to_config

CONF_DIR = Path(__file__).resolve().parent.parent / "conf"

EXIT_FAILED, EXIT_CONFIG, EXIT_DIVERGED = 1, 2, 3

ConfigStore.instance().store(name="schema", node=Config)


def config_groups() -> dict[str, list[str]]:
    """Return the options of each configuration group."""
    return {d.name: sorted(f.stem for f in d.glob("*.yaml")) for d in sorted(CONF_DIR.iterdir()) if d.is_dir()}


def compose_config(overrides: Sequence[str] = (), config_name: str = "config") -> Config:
    """Compose ``conf/`` with Hydra overrides into a checked Config. Imports no torch.

    Raises:
        ConfigError: one line, naming the key and the way out.
    """
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            values = compose(config_name, list(overrides))
        return from_hydra(values)
    except (HydraException, OmegaConfBaseException) as error:
        raise translate(error, overrides) from error


def from_hydra(values: DictConfig) -> Config:
    """Turn what Hydra composed into a checked Config."""
    return to_config(OmegaConf.to_container(values, resolve=True))


_ELSEWHERE = {"grid": "sweep.py grid=NAME", "table": "scripts/reproduce.py table=NAME"}
"""Folders of conf/ that are no groups of a run."""


def translate(error: Exception, overrides: Sequence[str], schema: type = Config) -> ConfigError:
    """Say what Hydra means in one line."""
    text = str(error)
    groups = config_groups()
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        if group in groups:
            return ConfigError(f"{group}={option}: no such option{nearest(option, groups[group])}")
        if error.options:
            return ConfigError(f"{group}={option}: no such option{nearest(option, error.options)}")
    found = re.search(r"Could not override '([^']+)'", text)
    if found:
        key = found.group(1).split("@")[0]
        if "." in key:
            return unknown_key_error(key, schema)
        if key in _ELSEWHERE:
            return ConfigError(f"{key}= is no part of this command; use {_ELSEWHERE[key]}")
        return ConfigError(f"unknown key '{key}'{nearest(key, [*all_keys(schema), *groups])}")
    if "Ambiguous value for argument" in text or "requires --multirun" in text:
        given = next((o for o in overrides if "," in o or "(" in o), "")
        return ConfigError(f"{given} is a sweep over several values, where one is needed; sweep.py takes several")
    if isinstance(error, OverrideParseException):
        return ConfigError(f"{error.override}: Hydra cannot read this override: {text.splitlines()[0]}")
    key = getattr(error, "full_key", None) or getattr(error.__cause__, "full_key", None)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if key and error.__cause__ is not None:
        lines = [str(error.__cause__).splitlines()[0]]
    shown = next((o for o in overrides if key and o.lstrip("+~").startswith(f"{key}=")), key)
    return ConfigError(f"{shown}: {lines[0]}" if shown else " ".join(lines[:2]))


def setup_logging() -> None:
    """Send the program's messages to standard output."""
    logger = logging.getLogger("convnn")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not any(isinstance(h, _TqdmHandler) for h in logger.handlers):
        handler = _TqdmHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)


class _TqdmHandler(logging.Handler):
    """Prints lines above a progress bar; warnings and errors go to standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        tqdm.write(self.format(record), file=stream)
        stream.flush()


def fail(error: Exception, code: int) -> NoReturn:
    """Print an error as one line, unless another process of the run speaks, and leave."""
    if distributed.speaks():
        print(f"error: {distributed.name()}" + " ".join(str(error).split()), file=sys.stderr)
    sys.exit(code)


def guarded(call: Callable[[], Any], debug: bool = False) -> Any:
    """Call, and turn the errors that a user can mend into one line and an exit code (``debug`` shows the traceback)."""
    try:
        return call()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except distributed.PeerError as error:
        distributed.stand_back()
        sys.exit(EXIT_CONFIG if error.config else EXIT_FAILED)
    except Exception as error:
        config, lost = isinstance(error, ConfigError), distributed.lost(error)
        if not debug and (config or lost or isinstance(error, OSError) or type(error).__name__ == "CheckpointError"):
            fail(
                RuntimeError(f"another process of the run has ended ({error})") if lost else error,
                EXIT_CONFIG if config else EXIT_FAILED,
            )
        if not distributed.speaks():
            sys.exit(EXIT_CONFIG if config else EXIT_FAILED)
        if distributed.name():
            print(f"error: {distributed.name()}{type(error).__name__}", file=sys.stderr)
        raise


PARENT = "CONVNN_PARENT"
"""Environment variable by which sweep.py tells a run its process number."""


def follow_parent() -> None:
    """End with the sweep that started this process, however that ends (Linux): TERM comes, and leaves a checkpoint."""
    parent = os.environ.get(PARENT)
    if parent and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != int(parent):
            sys.exit(128 + signal.SIGTERM)


def check_arguments(argv: Sequence[str]) -> None:
    """Compose and check a single run's command line before Hydra and torch start, and leave with one line if it fails.

    Flags such as --help, --cfg and --multirun are left to Hydra.
    """
    follow_parent()
    if any(arg.startswith("-") for arg in argv):
        return
    guarded(lambda: compose_config(argv), debug="debug=true" in [a.lower() for a in argv])


def run_job(values: DictConfig) -> float | None:
    """Carry out the run that Hydra composed; in a multirun return top-1, otherwise leave with the exit code."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    setup_logging()
    debug = bool(values.get("debug", False))

    def job() -> dict[str, Any]:
        config = from_hydra(values)
        from convnn.engine import run  # torch and timm load only after the configuration is known to be good

        return run(config)

    multirun = HydraConfig.get().mode == RunMode.MULTIRUN
    result = job() if multirun else guarded(job, debug)
    if not multirun and result.get("exit_code"):
        sys.exit(result["exit_code"])
    return result["top1_last"]


def script_options(schema: type, argv: Sequence[str], usage: str) -> Any:
    """Read ``key=value`` arguments of a script into a dataclass; ``--help`` prints ``usage``.

    Raises:
        ConfigError: for unknown or missing keys and wrong types.
    """
    if any(arg in ("-h", "--help") for arg in argv):
        print(usage.strip())
        sys.exit(0)
    for arg in argv:
        if "=" not in arg:
            raise ConfigError(f"'{arg}' is not key=value; see --help")
    given = OmegaConf.from_dotlist(list(argv))
    check_keys(OmegaConf.to_container(given), schema)  # type: ignore[arg-type]
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), given))
    except OmegaConfBaseException as error:
        missing = "is required; see --help" if "missing" in str(error).lower() else str(error).splitlines()[0]
        raise ConfigError(f"{getattr(error, 'full_key', '')}: {missing}") from error
