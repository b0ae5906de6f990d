"""A report's files, among those of others (see ``convnn.runtime.owned``)."""

from __future__ import annotations

import base64
from pathlib import Path

from convnn.runtime.owned import Digests, Owner, digest_of

_PAGE = "Mean ± sample standard deviation over n seeds; only complete runs count."
"""Stands in every page, also of version 0.1, which wrote no list."""


def _of_version_0_1(out: Path) -> Digests:
    page = out / "index.html"
    text = page.read_text(errors="replace") if page.is_file() else ""
    if _PAGE not in text:
        return {}
    # A page of version 0.1 holds its pictures.
    pictures = [path for path in out.glob("*.svg") if base64.b64encode(path.read_bytes()).decode() in text]
    files = [out / name for name in ("index.html", "table.md", "summary.csv", "results.csv")]
    files += [path.with_suffix(kind) for path in pictures for kind in (".svg", ".png")]
    return {path.name: [digest_of(path)] for path in files if path.is_file()}


REPORT = Owner("report", ".convnn-report", last="index.html", older=_of_version_0_1)
