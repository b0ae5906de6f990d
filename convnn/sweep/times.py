"""Times as a command line gives them. Imports no torch."""

from __future__ import annotations

import re

from convnn.errors import ConfigError

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_PART = r"(\d+(?:\.\d+)?)\s*([smhd])"


def budget_seconds(text: str | None, key: str = "sweep.budget") -> float | None:
    """Return the seconds of a time such as ``90s``, ``30m`` or ``1h30m``; None of None.

    Raises:
        ConfigError: naming ``key``, if it cannot be read or is zero.
    """
    if text is None:
        return None
    parts = re.findall(_PART, text)
    seconds: float = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if not re.fullmatch(rf"(?:{_PART}\s*)+", text.strip()) or not seconds:
        raise ConfigError(f"{key}={text} is no time; write 90s, 30m or 1h30m")
    return seconds
