"""Errors that the programs turn into one line and an exit code. Imports nothing of ours."""

import re

EXIT_FAILED, EXIT_CONFIG, EXIT_DIVERGED = 1, 2, 3
"""Exit codes besides 0 and 128 + signal."""


class ConfigError(ValueError):
    """A configuration that cannot work. The message is one line that names the key and the way out."""


class WeightsError(ConfigError):
    """Weights that a network is to begin from cannot be had; a run that has begun does not need them."""


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged or of another run. The message is one line."""


class DivergedError(RuntimeError):
    """Loss or gradient is no longer finite."""


class StoppedError(Exception):
    """A signal asked the run to stop where it cannot return."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class PeerError(RuntimeError):
    """Another process of the run has failed, and says why itself."""

    def __init__(self, rank: int, config: bool) -> None:
        super().__init__(f"process {rank} failed")
        self.config = config
        """With a ConfigError."""


def load_failure(error: BaseException) -> str:
    """Return the first line of an error of ``torch.load``; not torch's advice to load an unsafe file all the same."""
    text = str(error)
    if "weights_only" not in text:
        return first_line(error)
    named = re.search(r"(?:GLOBAL|global:?|class|function) `?([A-Za-z_]\w*(?:\.\w+)+)", text)
    what = f" ({named.group(1)})" if named else ""
    return f"it holds objects other than tensors and plain values{what}, which can run code; nothing of it was run"


def first_line(error: BaseException | str) -> str:
    """Return the first line of an error's message; the error's type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
