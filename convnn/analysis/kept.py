"""The results that a run folder keeps: ``analyses/NAME.json``, and ``NAME.npz`` for arrays. Loads no torch."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from convnn.analysis.base import Result
from convnn.runs.contents import ANALYSES
from convnn.runtime.files import read_json, write_atomically, write_json
from convnn.runtime.owned import digest_of

Settings = dict[str, Any]
"""What a result depends on: the checkpoint, the number of images and the like."""


def kept_result(folder: Path, name: str, settings: Settings) -> Result | None:
    """Return what a run folder keeps of an analysis, if it is of these settings; None: it is to be measured."""
    file = folder / ANALYSES / f"{name}.json"
    kept = read_json(file)
    if kept is None or kept.get("settings") != settings or not isinstance(kept.get("result"), dict):
        return None
    result: Result = kept["result"]
    if kept.get("arrays") is None:
        return result
    arrays = file.with_suffix(".npz")
    try:
        if digest_of(arrays) != kept["arrays"]:
            return None
        with np.load(arrays, allow_pickle=False) as found:
            return result | {"arrays": dict(found)}
    except (OSError, ValueError):
        return None


def keep_result(
    folder: Path, name: str, settings: Settings, result: Result, headline: dict[str, float], facts: dict[str, Any]
) -> None:
    """Write a result into its run folder; a kill leaves the old or the new one.

    Args:
        folder: of the run.
        name: of the analysis.
        settings: what it depends on.
        result: as ``measure`` returned it.
        headline: the numbers that stand for it.
        facts: for the reader, such as title and source.

    Raises:
        OSError: if the disk refuses.
    """
    file = folder / ANALYSES / f"{name}.json"
    file.parent.mkdir(exist_ok=True)
    digest = None
    if arrays := result.get("arrays"):
        content = io.BytesIO()
        np.savez_compressed(content, **arrays)
        write_atomically(file.with_suffix(".npz"), lambda f: f.write(content.getvalue()))
        digest = digest_of(file.with_suffix(".npz"))
    values = {key: value for key, value in result.items() if key != "arrays"}
    entry = {"analysis": name, **facts, "settings": settings, "headline": headline, "arrays": digest, "result": values}
    write_json(file, entry)
