"""What the command-line programs share: their opening, one-line errors, exit codes, options of a run."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from convnn.config.keys import check_keys
from convnn.config.load import expanded, load_config
from convnn.config.reference import groups
from convnn.config.schema import Config
from convnn.errors import EXIT_CONFIG, EXIT_FAILED, ConfigError, first_line
from convnn.ops.settings import check_fields, choice
from convnn.runtime import distributed


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


def run_program(call: Callable[[list[str]], int | None], *, debug: bool = False) -> None:
    """Open a program, carry it out with the command line, and leave with the exit code that it returns.

    Args:
        call: takes the arguments.
        debug: ``debug=true`` among them shows the traceback of an error.
    """

    def opened() -> int | None:
        if str(Path.cwd()) not in sys.path:  # a user's operators lie beside the command, where python -m finds them
            sys.path.insert(0, str(Path.cwd()))
        return call(sys.argv[1:])

    code = guarded(opened, debug and "debug=true" in [arg.lower() for arg in sys.argv[1:]])
    if code:
        sys.exit(code)


def called_as(script: str) -> str:
    """Return how the user called this program: the name of the installed command, else the script's."""
    name = Path(sys.argv[0]).stem
    return name if name.startswith("convnn-") else script


def fail(error: Exception, code: int) -> NoReturn:
    """Print an error as one line, unless another process of the run speaks, and leave."""
    if distributed.reports_error():
        print(f"error: {distributed.rank_prefix()}" + " ".join(str(error).split()), file=sys.stderr)
    sys.exit(code)


def guarded(call: Callable[[], Any], debug: bool = False) -> Any:
    """Call, and turn the errors that a user can mend into one line and an exit code (``debug`` shows the traceback)."""
    try:
        return call()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        _leave_if_nobody_reads()
        raise
    except distributed.PeerError as error:
        distributed.leave_error_to_others()
        sys.exit(EXIT_CONFIG if error.config else EXIT_FAILED)
    except Exception as error:
        config, lost = isinstance(error, ConfigError), distributed.is_lost_connection(error)
        if not debug and (config or lost or isinstance(error, OSError) or type(error).__name__ == "CheckpointError"):
            fail(
                RuntimeError(f"{distributed.LOST_PEER} ({error})") if lost else error,
                EXIT_CONFIG if config else EXIT_FAILED,
            )
        if not distributed.reports_error():
            sys.exit(EXIT_CONFIG if config else EXIT_FAILED)
        if distributed.rank_prefix():
            print(f"error: {distributed.rank_prefix()}{type(error).__name__}", file=sys.stderr)
        raise


def _leave_if_nobody_reads() -> None:
    """Leave quietly, as programs do, if whoever reads the output, such as ``head``, has read enough."""
    with contextlib.suppress(OSError, ValueError):  # of an output that is no file
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes as it ends
            sys.exit(128 + signal.SIGPIPE)


def path(default: Any = None) -> Any:
    """Declare an option that names a file or folder, in which ``~`` is the home folder."""
    return field(default=default, metadata={"path": True})


def option_lines(schema: type) -> str:
    """Return the options of a program as its help shows them: name, description, choices and default."""
    (group,) = groups(schema)
    width = max(len(key.name) for key in group.keys)
    lines = []
    for key in group.keys:
        given = [", ".join(key.choices)] if key.choices else []
        given += [f"default {key.default}"] if key.default not in ("", "null") else []
        text = f"{key.about.rstrip('.')} ({'; '.join(given)})" if given else key.about.rstrip(".")
        about = textwrap.wrap(text.replace("`", ""), 114 - width, break_on_hyphens=False)
        lines += [f"  {key.name if i == 0 else '':{width}}  {line}" for i, line in enumerate(about)]
    return "\n".join(lines)


def script_options(schema: type, argv: Sequence[str], usage: str) -> Any:
    """Read ``key=value`` arguments of a script into a dataclass; ``--help`` prints ``usage``.

    ``{options}`` in it stands for the fields of the dataclass, as ``option_lines`` describes them.

    Raises:
        ConfigError: for unknown or missing keys and wrong types.
    """
    if any(arg in ("-h", "--help") for arg in argv):
        print(usage.strip().replace("{options}", option_lines(schema)))
        sys.exit(0)
    for arg in argv:
        if "=" not in arg:
            raise ConfigError(f"'{arg}' is not key=value; see --help")
    given = OmegaConf.create()
    for arg in argv:
        try:
            given.merge_with_dotlist([f"{arg[:-1]}'~'" if arg.endswith("=~") else arg])  # YAML takes it for null
        except yaml.YAMLError as error:
            key, _, value = arg.partition("=")
            raise ConfigError(f"{arg} cannot be read; put quotes into it: '{key}=\"{value}\"'") from error
    check_keys(OmegaConf.to_container(given), schema)  # type: ignore[arg-type]
    try:
        options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), given))
        for f in fields(schema):
            if f.metadata.get("path") and getattr(options, f.name):
                setattr(options, f.name, expanded(getattr(options, f.name), f.name))
        return options
    except OmegaConfBaseException as error:
        missing = "is required; see --help" if "missing" in str(error).lower() else first_line(error)
        raise ConfigError(f"{getattr(error, 'full_key', '')}: {missing}") from error


def names_and_options(schema: type, argv: Sequence[str], usage: str) -> tuple[list[Path], Any]:
    """Read a script's arguments: files and folders by their names, all others as of ``script_options``.

    Raises:
        ConfigError: as of ``script_options``.
    """
    names = [arg for arg in argv if not arg.startswith("-") and ("=" not in arg or Path(arg).exists())]
    options = script_options(schema, [arg for arg in argv if arg not in names], usage)
    return [Path(expanded(name, "DIR")) for name in names], options


def folders_and_options(schema: type, argv: Sequence[str], usage: str) -> tuple[list[Path], Any]:
    """Do so for folders that hold runs.

    Raises:
        ConfigError: as of ``script_options``, or if no folder is named.
    """
    names, options = names_and_options(schema, argv, usage)
    if not names:
        raise ConfigError("name a folder that holds runs; see --help")
    return names, options


@dataclass
class RunOptions:
    """Options of the programs that read a run."""

    run: str = path(MISSING)
    """Run folder, as train.py printed it."""
    checkpoint: str = choice("last", "best")
    """Which of the run's checkpoints."""
    data_root: str | None = path()
    """Where the data is now, if it moved, or other images of the same classes."""


def chosen_run(options: RunOptions) -> tuple[Path, Config]:
    """Return the folder of the run that the options name, and its configuration, with the data where it is now.

    Raises:
        ConfigError: for an unknown checkpoint, or if the folder is none of a run.
    """
    check_fields(options, "")
    config = load_config(Path(options.run))
    if options.data_root:
        config.data.root = options.data_root
    return Path(options.run), config
