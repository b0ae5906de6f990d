"""Every key of a schema with its type, default, choices or range, and description, read from the schema itself.

A field is described by the string after it, which Python does not keep; it is read from the class's source. Imports no
torch.
"""

from __future__ import annotations

import ast
import inspect
import math
import re
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import lru_cache
from typing import Any

import omegaconf

from convnn.config.schema import Config


@dataclass(frozen=True)
class Key:
    """One key of a schema."""

    name: str
    """Dotted, as on the command line."""
    type: str
    """As annotated, such as ``int | None``."""
    default: str
    """As YAML writes it; empty: it must be given."""
    choices: tuple[str, ...]
    """What it may be; empty: whatever has the type."""
    range: str
    """Of a number, such as ``>= 0 and < 1``; empty: all."""
    about: str
    """Its description, in Markdown."""


@dataclass(frozen=True)
class Group:
    """The keys of one dataclass that have no keys below them."""

    name: str
    """Prefix of the keys; empty for those of the whole."""
    about: str
    """Of the dataclass, in Markdown."""
    keys: tuple[Key, ...]


@lru_cache
def field_docs(kind: type) -> dict[str, str]:
    """Return the descriptions of a dataclass's fields by name, inherited ones too; "" for a field without one."""
    docs: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        if not is_dataclass(owner):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body  # type: ignore[attr-defined]
        for node, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                docs[node.target.id] = _text(after)
    return {f.name: docs[f.name] for f in fields(kind)}


def _text(node: ast.stmt | None) -> str:
    """Return the string that a statement consists of, on one line, or ""."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return " ".join(node.value.value.split())
    return ""


def groups(schema: type = Config, name: str = "") -> Iterator[Group]:
    """Return the keys of a schema in its order: first its own, then those of each group in it.

    Args:
        schema: a dataclass.
        name: what stands before its keys, without the dot.
    """
    docs, own, inner = field_docs(schema), [], []
    for f in fields(schema):
        default = _default(f)
        written = f.name.rstrip("_")  # which a word of Python's own, such as from, needs in a class
        full = f"{name}.{written}" if name else written
        if is_dataclass(default):
            inner.append((type(default), full))
        else:
            kind = re.sub(r"\bAny\b", "any", inspect.formatannotation(f.type).strip("'"))
            choices = f.metadata.get("choices", ())
            own.append(Key(full, kind, _yaml(default), choices, _range(f), markdown(docs[f.name])))
    if own:
        yield Group(name, markdown(inspect.cleandoc(schema.__doc__ or "")), tuple(own))
    for kind_of, full in inner:
        yield from groups(kind_of, full)


def _default(f: Field[Any]) -> Any:
    return f.default_factory() if f.default_factory is not MISSING else f.default


def _yaml(value: Any) -> str:
    """Return a default as it is written on the command line."""
    if value == omegaconf.MISSING or value is MISSING:
        return ""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _range(f: Field[Any]) -> str:
    low, high, above, below = f.metadata.get("range", (-math.inf, math.inf, False, False))
    bounds = [(low, ">" if above else ">="), (high, "<" if below else "<=")]
    told = [f"{sign} {bound:.10g}" for bound, sign in bounds if math.isfinite(bound)]
    return " or ".join([" and ".join(told), *f.metadata.get("words", ())]) if told else ""


def markdown(text: str) -> str:
    """Return a docstring's text with Markdown's code marks."""
    return text.replace("``", "`")
