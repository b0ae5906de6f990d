"""Names of classes: whether two lists of them are the same, and how they differ."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from convnn.errors import ConfigError


def class_order(known: Sequence[str], found: Sequence[str], sides: tuple[str, str]) -> list[int]:
    """Return, for each class that was found, its index among the known ones: by name, whatever the order.

    Args:
        known: class names whose order counts, such as those that a model learnt.
        found: those of other data.
        sides: what messages call the two, in this order.

    Raises:
        ConfigError: if the names are not the same; it says which side lacks which.
    """
    lacking = [sorted(set(found) - set(known)), sorted(set(known) - set(found))]
    if any(lacking):
        lines = [f"{side} lacks {listed(names)}" for side, names in zip(sides, lacking, strict=True) if names]
        common = {_normal(name) for name in lacking[0]} & {_normal(name) for name in lacking[1]}
        hint = ", which are two spellings of the same name" if common else ""
        raise ConfigError(f"the classes differ: {'; '.join(lines)}{hint}; rename the class folders alike")
    index = {name: i for i, name in enumerate(known)}
    return [index[name] for name in found]


def check_spelling(classes: Sequence[str], what: str) -> None:
    """Raise ConfigError if two classes of a data set have one name, or one that looks the same."""
    first: dict[str, str] = {}
    for name in classes:
        normal = unicodedata.normalize("NFC", name)
        if normal in first:
            raise ConfigError(f"{what} has two classes of one name, {listed([first[normal], name])}; rename one")
        first[normal] = name


def listed(names: Sequence[str], most: int = 5) -> str:
    """Return names in quotes, the first few of many; those with other than ASCII letters also by their code points."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(_shown, names[:most])) + rest


def _shown(name: str) -> str:
    return repr(name) if name.isascii() else f"{name!r} ({name!a})"


def _normal(name: str) -> str:
    """What spellings of one name have in common: composed or not, in capitals or not, with blanks around or not."""
    return unicodedata.normalize("NFKC", name).casefold().strip()
