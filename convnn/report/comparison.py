"""A comparison as files: CSV tables, Markdown, pictures. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from convnn.ops.settings import check_fields
from convnn.report.compare import Differences, compare_arms
from convnn.report.compare_plots import save_differences
from convnn.report.content import Picture
from convnn.report.differences import write_frames
from convnn.report.pages import difference_parts, markdown_cell
from convnn.report.results import find_results
from convnn.report.settings import CompareSettings
from convnn.report.tables import import_pandas, runs_frame, summarize
from convnn.runtime.owned import Owner, naming

COMPARISON = Owner("comparison", ".convnn-comparison", last="comparison.md")


def read_differences(folders: Sequence[Path], settings: CompareSettings, out: Path | None = None) -> Differences:
    """Compare the arms among the runs below some folders; with ``out`` write tables and pictures there.

    Args:
        folders: searched for run folders and sweep folders at any depth.
        settings: see ``CompareSettings``.
        out: made if missing; files of an earlier comparison there are replaced, all others stay.

    Raises:
        ConfigError: if there is nothing to compare, a setting cannot be, pandas or matplotlib is missing, or a file in
            ``out`` that no comparison wrote stands in the way.
        OSError: if the disk refuses, naming the file.
    """
    check_fields(settings, "")
    import_pandas()
    found = find_results(folders)
    frame = runs_frame(found)
    summary = summarize(frame)
    made = compare_arms(found, frame, summary, settings)
    if out is not None:
        with COMPARISON.written_aside(out) as aside:
            with naming(aside / "differences.csv"):
                write_frames(made, aside)
            pictures = save_differences(made, summary, aside)
            with naming(aside / "comparison.md"):
                (aside / "comparison.md").write_text(markdown_of(made, pictures), encoding="utf-8")
    return made


def markdown_of(made: Differences, pictures: Sequence[Picture]) -> str:
    """Return a comparison as a page of Markdown beside its pictures."""
    parts = [f"# Differences to {markdown_cell(made.baseline.name)}", *difference_parts(made)]
    parts += [f"![{markdown_cell(p.title)}]({p.png.name})\n\n{markdown_cell(p.caption)}" for p in pictures]
    return "\n\n".join(parts) + "\n"
